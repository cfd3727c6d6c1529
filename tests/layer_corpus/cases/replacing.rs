//! An entry over one of the same name, in a later layer and in the same.

use crate::case::Case;
use crate::case::Node;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::case::special;
use crate::case::symlink;
use crate::image_support::Entry;
use crate::image_support::Tar;

/// One of each kind by the name `x`: what it is called, how to make it, and what is there then.
type Form = (&'static str, fn(Tar) -> Tar, fn() -> Vec<Node>);

const FORMS: [Form; 5] = [
    ("a file", |tar| tar.file("x", b"1"), || vec![file("x", "1")]),
    ("a folder", |tar| tar.folder("x/").file("x/in", b"1"), || vec![folder("x"), file("x/in", "1")]),
    ("a link", |tar| tar.symlink("x", "else"), || vec![symlink("x", "else")]),
    ("a fifo", |tar| tar.entry(&Entry { kind: b'6', ..Entry::default() }), || vec![special("x", "fifo")]),
    (
        "a device",
        |tar| tar.entry(&Entry { kind: b'3', device: (1, 3), ..Entry::default() }),
        || vec![special("x", "char 1:3")],
    ),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (old_name, old, _) in FORMS {
        for (new_name, new, tree) in FORMS {
            if old_name != new_name {
                let name: &'static str = format!("{new_name} over {old_name}, in a later layer").leak();
                cases.push(case(name).layer(old(Tar::new())).layer(new(Tar::new())).tree(tree()));
                let name: &'static str = format!("{new_name} over {old_name}, in the same layer").leak();
                cases.push(case(name).layer(new(old(Tar::new()))).tree(tree()));
            }
        }
    }
    let changed = Entry { name: b"d", kind: b'5', mode: 0o700, uid: 9, gid: 8, mtime: 5, ..Entry::default() };
    let new_folder = || folder("d").mode(0o700).owner(9, 8).mtime(5, 0);
    cases.extend([
        case("a file over a file")
            .layer(Tar::new().file("f", b"old content"))
            .layer(Tar::new().file("f", b"new"))
            .tree([file("f", "new")]),
        case("a file over a large file")
            .layer(Tar::new().file("f", &[1; 9000]))
            .layer(Tar::new().file("f", b"new"))
            .tree([file("f", "new")]),
        case("a file twice in one layer")
            .layer(Tar::new().file("f", b"1").file("g", b"2").file("f", b"3"))
            .tree([file("f", "3"), file("g", "2")]),
        case("a file twice in one layer, spelled differently")
            .layer(Tar::new().folder("d/").file("d/f", b"1").file("./d//f", b"2"))
            .tree([folder("d"), file("d/f", "2")]),
        case("three layers, of which the last counts")
            .layer(Tar::new().file("f", b"1"))
            .layer(Tar::new().file("f", b"2"))
            .layer(Tar::new().file("f", b"3"))
            .tree([file("f", "3")]),
        case("a folder over a folder keeps what is in it and is what the new entry says")
            .layer(Tar::new().folder("d/").file("d/f", b"1"))
            .layer(Tar::new().entry(&changed))
            .tree([new_folder(), file("d/f", "1")]),
        case("a folder twice in one layer")
            .layer(Tar::new().folder("d/").file("d/f", b"1").entry(&changed))
            .tree([new_folder(), file("d/f", "1")]),
        case("a folder that no entry named gets one in a later layer")
            .layer(Tar::new().file("d/f", b"1"))
            .layer(Tar::new().entry(&changed))
            .tree([new_folder(), file("d/f", "1")]),
        case("a folder keeps what it is when a later layer has entries in it alone")
            .layer(Tar::new().entry(&changed))
            .layer(Tar::new().file("d/f", b"1"))
            .tree([new_folder(), file("d/f", "1")]),
        // As with Docker: the last component is not followed.
        case("a folder over a link to a folder replaces the link")
            .layer(Tar::new().folder("real/").file("real/f", b"1").symlink("d", "real"))
            .layer(Tar::new().folder("d/").file("d/g", b"2"))
            .tree([folder("real"), file("real/f", "1"), folder("d"), file("d/g", "2")]),
        case("a link over a folder: names below go through it from then on")
            .layer(Tar::new().folder("d/").file("d/f", b"1").folder("real/"))
            .layer(Tar::new().symlink("d", "real").file("d/g", b"2"))
            .tree([folder("real"), symlink("d", "real"), file("real/g", "2")]),
        case("a file over a link to a file replaces the link and leaves its target")
            .layer(Tar::new().file("f", b"1").symlink("l", "f"))
            .layer(Tar::new().file("l", b"2"))
            .tree([file("f", "1"), file("l", "2")]),
        case("a link over a link")
            .layer(Tar::new().symlink("l", "a"))
            .layer(Tar::new().symlink("l", "b"))
            .tree([symlink("l", "b")]),
        case("a folder that was replaced by a file comes back empty")
            .layer(Tar::new().folder("d/").file("d/old", b"1"))
            .layer(Tar::new().file("d", b"file"))
            .layer(Tar::new().folder("d/").file("d/new", b"2"))
            .tree([folder("d"), file("d/new", "2")]),
    ]);
    cases
}
