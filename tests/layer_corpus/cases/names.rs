//! Names: every way to write a long one, every byte that one may have, and every spelling of the same.

use crate::case::Case;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::case::symlink;
use crate::image_support::Entry;
use crate::image_support::Tar;

fn named(name: &[u8]) -> Tar {
    Tar::new().entry(&Entry { name, content: b"1", ..Entry::default() })
}

pub(super) fn cases() -> Vec<Case> {
    let (long_folder, long_name) = ("d".repeat(150), "n".repeat(255));
    let long = format!("{long_folder}/{long_name}");
    let tree = || [folder(&long_folder).implied(), file(&long, "1")];
    let mut cases = vec![
        case("a name of 100 bytes, which fills the field").layer(named(&[b'n'; 100])).tree([file([b'n'; 100], "1")]),
        case("a long name of GNU tar").layer(Tar::new().file(&long, b"1")).tree(tree()),
        case("a long name of GNU tar without the NUL")
            .layer(Tar::new().raw(b'L', b"././@LongLink", long.as_bytes()).file("cut", b"1"))
            .tree(tree()),
        case("a long target of GNU tar")
            .layer(Tar::new().symlink("l", &format!("/{long}")))
            .tree([symlink("l", format!("/{long}"))]),
        case("a long name and a long target of GNU tar")
            .layer(Tar::new().symlink(&long, &format!("/{long}")))
            .tree([folder(&long_folder).implied(), symlink(&long, format!("/{long}"))]),
        case("a name by the prefix of ustar")
            .layer(
                Tar::new().patched(
                    &Entry { name: b"name", content: b"1", ..Entry::default() },
                    &[(345, long_folder.as_bytes())],
                ),
            )
            .tree([folder(&long_folder).implied(), file(format!("{long_folder}/name"), "1")]),
        case("a prefix of ustar of 155 bytes and a name of 100")
            .layer(
                Tar::new()
                    .patched(&Entry { name: &[b'n'; 100], content: b"1", ..Entry::default() }, &[(345, &[b'p'; 155])]),
            )
            .tree([folder([b'p'; 155]).implied(), file([&[b'p'; 155][..], b"/", &[b'n'; 100]].concat(), "1")]),
        case("a long name by a pax record")
            .layer(Tar::new().pax(&[("path", long.as_bytes())]).file("cut", b"1"))
            .tree(tree()),
        case("a long target by a pax record")
            .layer(Tar::new().pax(&[("linkpath", long.as_bytes())]).symlink("l", "cut"))
            .tree([symlink("l", &long)]),
        case("an empty pax record takes nothing from the header")
            .layer(Tar::new().pax(&[("path", b"")]).file("a", b"1"))
            .tree([file("a", "1")]),
        case("a hard link's long target by a pax record")
            .layer(Tar::new().file(&long, b"1").pax(&[("linkpath", long.as_bytes())]).hard_link("l", "cut"))
            .tree(tree())
            .tree([file("l", "1").same_as(&long)]),
        case("a link target of 4,095 bytes")
            .layer(Tar::new().symlink("l", &"t".repeat(4095)))
            .tree([symlink("l", "t".repeat(4095))]),
        case("a name of 255 bytes").layer(named(&[0xfe; 255])).tree([file([0xfe; 255], "1")]),
        case("every byte but NUL and slash")
            .layer(every_byte())
            .tree(all_bytes().map(|byte| file([b'_', byte], [byte]))),
        case("names that start with a dot, or are made of dots")
            .layer(named(b"...").file("..a", b"1").file(".a", b"1").file("a..", b"1").file(".whx", b"1"))
            .tree(["...", "..a", ".a", "a..", ".whx"].map(|name| file(name, "1"))),
        case("`./` before, between and after")
            .layer(Tar::new().folder("./").folder("./a/").file("./a/./b", b"1").folder("c/."))
            .tree([folder(""), folder("a"), file("a/b", "1"), folder("c")]),
        case("doubled slashes")
            .layer(Tar::new().folder("a//").file("a///b", b"1"))
            .tree([folder("a"), file("a/b", "1")]),
        case("a folder without a slash after it")
            .layer(Tar::new().folder("a").file("a/b", b"1"))
            .tree([folder("a"), file("a/b", "1")]),
        case("names that differ in nothing but case")
            .layer(Tar::new().file("readme", b"1").file("README", b"2").folder("Readme/"))
            .tree([file("readme", "1"), file("README", "2"), folder("Readme")]),
        case("names of the same text in two forms of Unicode")
            .layer(named("\u{e9}".as_bytes()).file("e\u{301}", b"2"))
            .tree([file("\u{e9}", "1"), file("e\u{301}", "2")]),
        case("names of which one is the start of the other")
            .layer(Tar::new().file("a", b"1").file("aa", b"2").folder("a.d/").file("a.d/a", b"3").file("a-", b"4"))
            .tree([file("a", "1"), file("aa", "2"), folder("a.d"), file("a.d/a", "3"), file("a-", "4")]),
        case("folders that no entry names").layer(Tar::new().file("a/b/c", b"1")).tree([
            folder("a").implied(),
            folder("a/b").implied(),
            file("a/b/c", "1"),
        ]),
        case("folders whose entry comes after what is in them")
            .layer(Tar::new().file("a/b", b"1").entry(&Entry {
                name: b"a/",
                kind: b'5',
                mode: 0o700,
                uid: 3,
                mtime: 9,
                ..Entry::default()
            }))
            .tree([folder("a").mode(0o700).owner(3, 0).mtime(9, 0), file("a/b", "1")]),
        case("a path of 1,000 folders").layer(Tar::new().file(&format!("{}f", "d/".repeat(400)), b"1")).tree(deep(400)),
        case("a folder of many names, whose entries need several blocks")
            .layer(many())
            .tree([folder("many")])
            .tree((0..2000).map(|n| file(many_name(n), n.to_string()))),
    ];
    let odd: [(&str, &[u8]); 8] = [
        ("not UTF-8", b"caf\xe9"),
        ("a newline", b"a\nb"),
        ("a space first and last", b" a "),
        ("a backslash", b"a\\b"),
        ("a colon and quotes", b"a:\"'`$b"),
        ("a dash first", b"-rf"),
        ("bytes that end UTF-16 and terminals", b"\x1b[31m\xff\xfe"),
        ("a tilde, as backups have it", b"a~"),
    ];
    cases.extend(odd.map(|(what, name)| case(what).layer(named(name)).tree([file(name, "1")])));
    cases
}

fn all_bytes() -> impl Iterator<Item = u8> {
    (1..=255).filter(|byte| *byte != b'/')
}

fn every_byte() -> Tar {
    all_bytes()
        .fold(Tar::new(), |tar, byte| tar.entry(&Entry { name: &[b'_', byte], content: &[byte], ..Entry::default() }))
}

fn deep(depth: usize) -> impl Iterator<Item = crate::case::Node> {
    let folders = (1..=depth).map(|depth| folder(["d"].repeat(depth).join("/")).implied());
    folders.chain([file(format!("{}f", "d/".repeat(depth)), "1")])
}

fn many_name(n: usize) -> String {
    format!("many/file-{n}-{}", "x".repeat(n % 200))
}

fn many() -> Tar {
    (0..2000).fold(Tar::new().folder("many"), |tar, n| tar.file(&many_name(n), n.to_string().as_bytes()))
}
