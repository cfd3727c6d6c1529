//! Owners, modes and times.

use crate::case::Case;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::case::symlink;
use crate::image_support::Entry;
use crate::image_support::Tar;

const FILE: Entry<'static> =
    Entry { name: b"f", kind: b'0', mode: 0o644, uid: 0, gid: 0, mtime: 9, link: b"", device: (0, 0), content: b"1" };

fn owned(uid: u32, gid: u32) -> Tar {
    Tar::new().entry(&Entry { uid, gid, ..FILE })
}

fn moded(name: &[u8], kind: u8, mode: u32) -> Tar {
    Tar::new().entry(&Entry { name, kind, mode, content: b"", ..FILE })
}

fn timed(mtime: &str) -> Tar {
    Tar::new().pax(&[("mtime", mtime.as_bytes())]).entry(&FILE)
}

fn f() -> crate::case::Node {
    file("f", "1").mtime(9, 0)
}

pub(super) fn cases() -> Vec<Case> {
    let root = |name| Tar::new().entry(&Entry { name, kind: b'5', mode: 0o711, uid: 3, gid: 4, content: b"", ..FILE });
    let rooted = || [folder("").mode(0o711).owner(3, 4).mtime(9, 0)];
    vec![
        case("owner and group").layer(owned(1000, 100)).tree([f().owner(1000, 100)]),
        case("beyond 16 bits").layer(owned(65_536, 100_000)).tree([f().owner(65_536, 100_000)]),
        case("the largest in octal digits").layer(owned(0o7_777_777, 1)).tree([f().owner(0o7_777_777, 1)]),
        case("beyond octal digits, in base 256")
            .layer(owned(0o10_000_000, 3_000_000_000))
            .tree([f().owner(0o10_000_000, 3_000_000_000)]),
        case("the largest that is not \"none\"")
            .layer(owned(u32::MAX - 1, u32::MAX - 1))
            .tree([f().owner(u32::MAX - 1, u32::MAX - 1)]),
        case("by pax records, over the header")
            .layer(Tar::new().pax(&[("uid", b"4000000000"), ("gid", b"70000")]).entry(&Entry {
                uid: 1,
                gid: 2,
                ..FILE
            }))
            .tree([f().owner(4_000_000_000, 70_000)]),
        case("an empty pax record leaves the header's")
            .layer(Tar::new().pax(&[("uid", b""), ("mtime", b"")]).entry(&Entry { uid: 1, ..FILE }))
            .tree([f().owner(1, 0)]),
        case("names of owners mean nothing in another system")
            .layer(Tar::new().pax(&[("uname", b"nobody"), ("gname", b"nogroup")]).patched(&FILE, &[(265, b"daemon\0")]))
            .tree([f()]),
        case("permissions of nobody").layer(moded(b"f", b'0', 0)).tree([file("f", "").mode(0).mtime(9, 0)]),
        case("permissions of everybody").layer(moded(b"f", b'0', 0o777)).tree([file("f", "").mode(0o777).mtime(9, 0)]),
        case("setuid").layer(moded(b"f", b'0', 0o4755)).tree([file("f", "").mode(0o4755).mtime(9, 0)]),
        case("setuid with an owner, whom to set clears it on Linux")
            .layer(Tar::new().entry(&Entry { mode: 0o4711, uid: 7, ..FILE }))
            .tree([f().mode(0o4711).owner(7, 0)]),
        case("setgid").layer(moded(b"f", b'0', 0o2755)).tree([file("f", "").mode(0o2755).mtime(9, 0)]),
        case("setgid of a folder").layer(moded(b"d", b'5', 0o2775)).tree([folder("d").mode(0o2775).mtime(9, 0)]),
        case("sticky").layer(moded(b"d", b'5', 0o1777)).tree([folder("d").mode(0o1777).mtime(9, 0)]),
        case("all twelve bits").layer(moded(b"f", b'0', 0o7777)).tree([file("f", "").mode(0o7777).mtime(9, 0)]),
        case("a mode with the type of the file, as some write it")
            .layer(moded(b"f", b'0', 0o100_644))
            .tree([file("f", "").mtime(9, 0)]),
        case("a folder that its owner cannot read, with something in it")
            .layer(moded(b"d", b'5', 0).file("d/f", b"1"))
            .tree([folder("d").mode(0).mtime(9, 0), file("d/f", "1")]),
        case("time 0").layer(Tar::new().entry(&Entry { mtime: 0, ..FILE })).tree([file("f", "1").mtime(0, 0)]),
        case("time beyond 31 bits")
            .layer(Tar::new().entry(&Entry { mtime: 1 << 31, ..FILE }))
            .tree([file("f", "1").mtime(1 << 31, 0)]),
        case("time beyond 32 bits")
            .layer(Tar::new().entry(&Entry { mtime: 5_000_000_000, ..FILE }))
            .tree([file("f", "1").mtime(5_000_000_000, 0)]),
        case("time to the nanosecond")
            .layer(timed("1234567890.123456789"))
            .tree([file("f", "1").mtime(1_234_567_890, 123_456_789)]),
        case("more digits than a nanosecond has are cut")
            .layer(timed("7.9999999999"))
            .tree([file("f", "1").mtime(7, 999_999_999)]),
        case("fewer digits").layer(timed("7.5")).tree([file("f", "1").mtime(7, 500_000_000)]),
        case("time before 1970, by a pax record").layer(timed("-5")).tree([file("f", "1").mtime(-5, 0)]),
        case("time before 1970 with a fraction, which counts backwards")
            .layer(timed("-1.25"))
            .tree([file("f", "1").mtime(-2, 750_000_000)]),
        case("time before 1970, in base 256")
            .layer(
                Tar::new().patched(
                    &FILE,
                    &[(136, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfb])],
                ),
            )
            .tree([file("f", "1").mtime(-5, 0)]),
        case("time in base 256")
            .layer(Tar::new().patched(&FILE, &[(136, &[0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0])]))
            .tree([file("f", "1").mtime(1 << 32, 0)]),
        case("owner, time and mode of a link, of which the last is always the same")
            .layer(Tar::new().pax(&[("mtime", b"5.5")]).entry(&Entry {
                name: b"l",
                kind: b'2',
                link: b"t",
                mode: 0o777,
                uid: 7,
                gid: 8,
                content: b"",
                ..FILE
            }))
            .tree([symlink("l", "t").owner(7, 8).mtime(5, 500_000_000)]),
        case("the root as ./").layer(root(b"./")).tree(rooted()),
        case("the root as .").layer(root(b".")).tree(rooted()),
        case("the root as /, as `umoci insert` writes it").layer(root(b"/")).tree(rooted()),
        case("the root's time, when something comes into it later")
            .layer(root(b"./").entry(&FILE))
            .tree(rooted())
            .tree([f()]),
        case("the root, changed by a later layer").layer(Tar::new().folder("./")).layer(root(b"./")).tree(rooted()),
        case("the root keeps what it is when a later layer does not name it")
            .layer(root(b"./"))
            .layer(owned(0, 0))
            .tree(rooted())
            .tree([f()]),
        case("a folder's time, when something comes into it in the same layer")
            .layer(moded(b"d", b'5', 0o755).file("d/f", b"1"))
            .tree([folder("d").mtime(9, 0), file("d/f", "1")]),
        case("a folder's time, when something comes into it in a later layer")
            .layer(moded(b"d", b'5', 0o755))
            .layer(Tar::new().file("d/f", b"1"))
            .tree([folder("d").mtime(9, 0), file("d/f", "1")]),
        case("a folder's time, when something is removed from it in a later layer")
            .layer(moded(b"d", b'5', 0o755).file("d/f", b"1"))
            .layer(Tar::new().file("d/.wh.f", b""))
            .tree([folder("d").mtime(9, 0)]),
    ]
}
