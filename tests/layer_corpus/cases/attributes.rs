//! Extended attributes, from pax records of star's form.

use crate::case::Case;
use crate::case::Second;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::case::symlink;
use crate::image_support::Tar;

/// `cap_net_raw=ep`, as `setcap` stores it.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// `user::rw-,user:1:r--,group::r--,mask::r--,other::r--`
const ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 1, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 4, 0,
    255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255,
];

fn with(records: &[(&str, &[u8])]) -> Tar {
    Tar::new().pax(records)
}

pub(super) fn cases() -> Vec<Case> {
    let simple: [(&str, &str, &[u8]); 8] = [
        ("user", "user.note", b"value"),
        ("trusted", "trusted.note", b"value"),
        ("security", "security.note", b"value"),
        ("a file capability", "security.capability", CAPABILITY),
        ("a POSIX ACL", "system.posix_acl_access", ACL),
        ("a value of any bytes", "user.bytes", b"\n=\n\0\xff\n 12 path=x\n"),
        ("a name with equals signs has its value after the first", "user.a", b"b=c"),
        ("a value of 4,000 bytes", "user.large", &[7; 4000]),
    ];
    let mut cases: Vec<_> = simple
        .map(|(name, attribute, value)| {
            let record = format!("SCHILY.xattr.{attribute}");
            let tar = with(&[(&record, value)]).file("f", b"1");
            case(name).layer(tar).tree([file("f", "1").xattr(attribute, value)])
        })
        .into();
    let name = format!("user.{}", "n".repeat(250));
    cases.extend([
        case("an empty value")
            .layer(with(&[("SCHILY.xattr.user.empty", b"")]).file("f", b"1"))
            .tree([file("f", "1").xattr("user.empty", &b""[..])])
            .second(Second::Differs(
                "it takes Go's `Header.Xattrs`, which has no empty ones; containerd and Docker from 24 on take `PAXRecords`",
            )),
        case("a name of 255 bytes")
            .layer(with(&[(&format!("SCHILY.xattr.{name}"), b"1")]).file("f", b"1"))
            .tree([file("f", "1").xattr(&name, &b"1"[..])]),
        case("several, and more than one of a namespace")
            .layer(
                with(&[
                    ("SCHILY.xattr.user.b", b"2"),
                    ("SCHILY.xattr.security.capability", CAPABILITY),
                    ("SCHILY.xattr.user.a", b"1"),
                    ("SCHILY.xattr.trusted.a", b"3"),
                ])
                .file("f", b"1"),
            )
            .tree([file("f", "1")
                .xattr("user.a", &b"1"[..])
                .xattr("user.b", &b"2"[..])
                .xattr("trusted.a", &b"3"[..])
                .xattr("security.capability", CAPABILITY)]),
        case("of a file that is in blocks, and of one beside its inode")
            .layer(
                with(&[("SCHILY.xattr.user.a", b"1")])
                    .file("large", &[1; 5000])
                    .pax(&[("SCHILY.xattr.user.a", b"22222")])
                    .file("small", b"1"),
            )
            .tree([
                file("large", [1; 5000]).xattr("user.a", &b"1"[..]),
                file("small", "1").xattr("user.a", &b"22222"[..]),
            ]),
        case("of a folder, with an ACL for what will be in it")
            .layer(
                with(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.system.posix_acl_default", ACL)])
                    .folder("d/"),
            )
            .tree([folder("d").xattr("user.a", &b"1"[..]).xattr("system.posix_acl_default", ACL)]),
        case("of the root")
            .layer(with(&[("SCHILY.xattr.user.a", b"1")]).folder("./"))
            .tree([folder("").xattr("user.a", &b"1"[..])]),
        case("of a link").layer(with(&[("SCHILY.xattr.trusted.a", b"1")]).symlink("l", "t")).tree([
            symlink("l", "t").xattr("trusted.a", &b"1"[..]),
        ]),
        case("a folder that is listed again has the new ones alone")
            .layer(with(&[("SCHILY.xattr.user.old", b"1")]).folder("d/").file("d/f", b"1"))
            .layer(with(&[("SCHILY.xattr.user.new", b"2")]).folder("d/"))
            .tree([folder("d").xattr("user.new", &b"2"[..]), file("d/f", "1")]),
        case("a file that is replaced has none of the old")
            .layer(with(&[("SCHILY.xattr.user.old", b"1")]).file("f", b"1"))
            .layer(Tar::new().file("f", b"2"))
            .tree([file("f", "2")]),
        case("a namespace that Linux has not is left out")
            .layer(with(&[("SCHILY.xattr.com.apple.quarantine", b"1"), ("SCHILY.xattr.user.a", b"1")]).file("f", b"1"))
            .tree([file("f", "1").xattr("user.a", &b"1"[..])]),
        case("other vendors' records of attributes are no records of attributes")
            .layer(with(&[("LIBARCHIVE.xattr.user.a", b"MQ"), ("SCHILY.acl.access", b"user::rw-")]).file("f", b"1"))
            .tree([file("f", "1")]),
    ]);
    cases
}
