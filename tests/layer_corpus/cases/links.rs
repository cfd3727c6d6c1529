//! Symbolic and hard links, and names that lead through links.

use crate::case::Case;
use crate::case::Second;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::case::special;
use crate::case::symlink;
use crate::image_support::Entry;
use crate::image_support::Tar;

/// A hard link whose header says something else than that of its target.
fn other_metadata(name: &[u8], link: &[u8]) -> Tar {
    Tar::new().entry(&Entry { name, kind: b'1', link, mode: 0o600, uid: 7, gid: 8, mtime: 99, ..Entry::default() })
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("a relative link").layer(Tar::new().file("f", b"1").symlink("d/l", "../f")).tree([
            file("f", "1"),
            folder("d").implied(),
            symlink("d/l", "../f"),
        ]),
        case("an absolute link").layer(Tar::new().symlink("l", "/etc/passwd")).tree([symlink("l", "/etc/passwd")]),
        case("a link to nothing").layer(Tar::new().symlink("l", "nothing")).tree([symlink("l", "nothing")]),
        case("a link out of the image is kept as it is, if nothing goes through it")
            .layer(Tar::new().symlink("l", "../../../etc/passwd"))
            .tree([symlink("l", "../../../etc/passwd")]),
        case("a link to itself, and two to each other")
            .layer(Tar::new().symlink("l", "l").symlink("a", "b").symlink("b", "a"))
            .tree([symlink("l", "l"), symlink("a", "b"), symlink("b", "a")]),
        case("a target of any bytes")
            .layer(Tar::new().entry(&Entry {
                name: b"l",
                kind: b'2',
                mode: 0o777,
                link: b"\xff\n\\ ",
                ..Entry::default()
            }))
            .tree([symlink("l", b"\xff\n\\ ")]),
        case("a hard link")
            .layer(Tar::new().file("a", b"1").hard_link("b", "a"))
            .tree([file("a", "1"), file("b", "1").same_as("a")]),
        case("a hard link to a file in blocks")
            .layer(Tar::new().file("a", &[1; 9000]).hard_link("b", "a"))
            .tree([file("a", [1; 9000]), file("b", [1; 9000]).same_as("a")]),
        case("a hard link whose target is spelled otherwise")
            .layer(Tar::new().folder("d/").file("d/a", b"1").hard_link("b", "./d//a").hard_link("c", "/d/a"))
            .tree([folder("d"), file("d/a", "1"), file("b", "1").same_as("d/a"), file("c", "1").same_as("d/a")]),
        case("a chain of hard links")
            .layer(Tar::new().file("a", b"1").hard_link("b", "a").hard_link("c", "b").hard_link("d", "c"))
            .tree([
                file("a", "1"),
                file("b", "1").same_as("a"),
                file("c", "1").same_as("a"),
                file("d", "1").same_as("a"),
            ]),
        case("a hard link to a file of an earlier layer")
            .layer(Tar::new().file("a", b"1"))
            .layer(Tar::new().hard_link("b", "a"))
            .tree([file("a", "1"), file("b", "1").same_as("a")]),
        case("a hard link to a symbolic link is another name of the link")
            .layer(Tar::new().file("f", b"1").symlink("l", "f").entry(&Entry {
                name: b"h",
                kind: b'1',
                mode: 0o777,
                link: b"l",
                ..Entry::default()
            }))
            .tree([file("f", "1"), symlink("l", "f"), symlink("h", "f").same_as("l")]),
        case("a hard link to a device and to a fifo")
            .layer(
                Tar::new()
                    .entry(&Entry { name: b"c", kind: b'3', device: (1, 3), ..Entry::default() })
                    .hard_link("c2", "c")
                    .entry(&Entry { name: b"p", kind: b'6', ..Entry::default() })
                    .hard_link("p2", "p"),
            )
            .tree([
                special("c", "char 1:3"),
                special("c2", "char 1:3").same_as("c"),
                special("p", "fifo"),
                special("p2", "fifo").same_as("p"),
            ]),
        case("a hard link that states a size, for which there is no content")
            .layer(
                Tar::new()
                    .file("a", b"1")
                    .patched(
                        &Entry { name: b"b", kind: b'1', link: b"a", ..Entry::default() },
                        &[(124, b"00000000001")],
                    )
                    .file("c", b"2"),
            )
            .tree([file("a", "1"), file("b", "1").same_as("a"), file("c", "2")]),
        case("a hard link's own owner, mode and time are those of the file from then on")
            .layer(Tar::new().file("a", b"1").append_raw(&other_metadata(b"b", b"a").into_entries()))
            .tree([
                file("a", "1").mode(0o600).owner(7, 8).mtime(99, 0),
                file("b", "1").mode(0o600).owner(7, 8).mtime(99, 0).same_as("a"),
            ])
            .second(Second::Differs("it does not look at them; Docker and containerd set them on the file")),
        case("a hard link to a symbolic link changes its owner alone")
            .layer(Tar::new().symlink("a", "t").append_raw(&other_metadata(b"b", b"a").into_entries()))
            .tree([symlink("a", "t").owner(7, 8), symlink("b", "t").owner(7, 8).same_as("a")])
            .second(Second::Differs("it does not look at it; Docker and containerd set it")),
        case("the original is replaced: the other name keeps the old content")
            .layer(Tar::new().file("a", b"old").hard_link("b", "a"))
            .layer(Tar::new().file("a", b"new"))
            .tree([file("a", "new"), file("b", "old")]),
        case("the original is replaced in the same layer")
            .layer(Tar::new().file("a", b"old").hard_link("b", "a").file("a", b"new"))
            .tree([file("a", "new"), file("b", "old")]),
        case("the original is removed: the other names are one file still")
            .layer(Tar::new().file("a", b"1").hard_link("b", "a").hard_link("c", "a"))
            .layer(Tar::new().file(".wh.a", b""))
            .tree([file("b", "1"), file("c", "1").same_as("b")]),
        case("a hard link replaces a file")
            .layer(Tar::new().file("a", b"1").file("b", b"2"))
            .layer(Tar::new().hard_link("b", "a"))
            .tree([file("a", "1"), file("b", "1").same_as("a")]),
        case("a hard link through a linked folder")
            .layer(Tar::new().folder("real/").file("real/a", b"1").symlink("link", "real"))
            .layer(Tar::new().hard_link("b", "link/a"))
            .tree([folder("real"), file("real/a", "1"), symlink("link", "real"), file("b", "1").same_as("real/a")]),
        case("an entry below a linked folder, as of a merged /usr")
            .layer(Tar::new().folder("usr/").folder("usr/bin/").symlink("bin", "usr/bin"))
            .layer(Tar::new().file("bin/sh", b"1"))
            .tree([folder("usr"), folder("usr/bin"), symlink("bin", "usr/bin"), file("usr/bin/sh", "1")]),
        case("below an absolute link: from the image's root")
            .layer(Tar::new().folder("run/").folder("var/").symlink("var/run", "/run"))
            .layer(Tar::new().file("var/run/pid", b"1"))
            .tree([folder("run"), folder("var"), symlink("var/run", "/run"), file("run/pid", "1")]),
        case("below a link that goes up and stays inside")
            .layer(Tar::new().folder("run/").folder("var/").symlink("var/up", "../run"))
            .layer(Tar::new().file("var/up/pid", b"1"))
            .tree([folder("run"), folder("var"), symlink("var/up", "../run"), file("run/pid", "1")]),
        case("below a link in the same layer")
            .layer(Tar::new().folder("real/").symlink("link", "real").file("link/f", b"1"))
            .tree([folder("real"), symlink("link", "real"), file("real/f", "1")]),
        case("below links to links")
            .layer(Tar::new().folder("real/").symlink("b", "real").symlink("a", "b").file("a/f", b"1"))
            .tree([folder("real"), symlink("b", "real"), symlink("a", "b"), file("real/f", "1")]),
        case("below a link to nothing: the target is made")
            .layer(Tar::new().symlink("link", "made/here").file("link/f", b"1"))
            .tree([
                symlink("link", "made/here"),
                folder("made").implied(),
                folder("made/here").implied(),
                file("made/here/f", "1"),
            ]),
        case("a whiteout below a linked folder")
            .layer(Tar::new().folder("real/").file("real/f", b"1").symlink("link", "real"))
            .layer(Tar::new().file("link/.wh.f", b""))
            .tree([folder("real"), symlink("link", "real")]),
        case("an opaque mark below a linked folder")
            .layer(Tar::new().folder("real/").file("real/f", b"1").symlink("link", "real"))
            .layer(Tar::new().file("link/.wh..wh..opq", b"").file("link/g", b"2"))
            .tree([folder("real"), symlink("link", "real"), file("real/g", "2")]),
    ]
}
