//! `.wh.NAME` and `.wh..wh..opq` (image-spec, layer.md, "Whiteouts").

use crate::case::Case;
use crate::case::Second;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::case::symlink;
use crate::image_support::Entry;
use crate::image_support::Tar;

/// Removing what was in a folder, it sets no time back.
const TIME_OF_REMOVAL: Second =
    Second::Differs("a folder that it removes something from at the end has the time of that");

fn wh(names: &[&str]) -> Tar {
    names.iter().fold(Tar::new(), |tar, name| tar.file(name, b""))
}

/// `d` with a file and a folder of a file, and a file beside it.
fn lower() -> Tar {
    Tar::new().folder("d/").file("d/old", b"1").folder("d/sub/").file("d/sub/old", b"2").file("beside", b"3")
}

pub(super) fn cases() -> Vec<Case> {
    let beside = || file("beside", "3");
    vec![
        case("of a file")
            .layer(Tar::new().file("a", b"1").file("b", b"2"))
            .layer(wh(&[".wh.a"]))
            .tree([file("b", "2")]),
        case("of a file in a folder").layer(lower()).layer(wh(&["d/.wh.old"])).tree([
            folder("d"),
            folder("d/sub"),
            file("d/sub/old", "2"),
            beside(),
        ]),
        case("of a folder, with all that is in it").layer(lower()).layer(wh(&[".wh.d"])).tree([beside()]),
        case("of a symbolic link, which leaves its target")
            .layer(Tar::new().folder("d/").file("d/f", b"1").symlink("l", "d"))
            .layer(wh(&[".wh.l"]))
            .tree([folder("d"), file("d/f", "1")]),
        case("of a device and a fifo")
            .layer(
                Tar::new().entry(&Entry { name: b"c", kind: b'3', device: (1, 3), ..Entry::default() }).entry(&Entry {
                    name: b"p",
                    kind: b'6',
                    ..Entry::default()
                }),
            )
            .layer(wh(&[".wh.c", ".wh.p"])),
        case("of something that is not there").layer(lower()).layer(wh(&[".wh.nothing", "d/.wh.nothing"])).tree([
            folder("d"),
            file("d/old", "1"),
            folder("d/sub"),
            file("d/sub/old", "2"),
            beside(),
        ]),
        case("in a folder that is not there, which does not make it")
            .layer(Tar::new().file("a", b"1"))
            .layer(wh(&["no/such/.wh.x"]))
            .tree([file("a", "1")]),
        case("in the first layer").layer(wh(&[".wh.x"]).file("a", b"1")).tree([file("a", "1")]),
        case("with a slash after its name, and a mode: only the name counts")
            .layer(lower())
            .layer(Tar::new().entry(&Entry {
                name: b"./.wh.d",
                mode: 0o777,
                uid: 5,
                content: b"ignored",
                ..Entry::default()
            }))
            .tree([beside()]),
        case("of a name with spaces and a newline")
            .layer(Tar::new().file(" a\nb ", b"1").file("c", b"2"))
            .layer(wh(&[".wh. a\nb "]))
            .tree([file("c", "2")]),
        case("of a name that starts with a dot")
            .layer(Tar::new().file(".a", b"1").file("a", b"2"))
            .layer(wh(&[".wh..a"]))
            .tree([file("a", "2")]),
        case("of a long name")
            .layer(Tar::new().file(&"n".repeat(251), b"1"))
            .layer(wh(&[&format!(".wh.{}", "n".repeat(251))])),
        case("of one layer before, not of two before: both go")
            .layer(Tar::new().file("a", b"1"))
            .layer(Tar::new().file("a", b"2"))
            .layer(wh(&[".wh.a"])),
        case("of one name of a hard link")
            .layer(Tar::new().file("a", b"1").hard_link("b", "a"))
            .layer(wh(&[".wh.a"]))
            .tree([file("b", "1")]),
        case("then the name again in a later layer")
            .layer(Tar::new().file("a", b"1"))
            .layer(wh(&[".wh.a"]))
            .layer(Tar::new().file("a", b"2"))
            .tree([file("a", "2")]),
        case("of a folder, then the folder again in a later layer: empty")
            .layer(lower())
            .layer(wh(&[".wh.d"]))
            .layer(Tar::new().folder("d/").file("d/new", b"4"))
            .tree([folder("d"), file("d/new", "4"), beside()]),
        case("before the same name in the same layer")
            .layer(Tar::new().file("a", b"1"))
            .layer(wh(&[".wh.a"]).file("a", b"2"))
            .tree([file("a", "2")]),
        case("before the folder of that name in the same layer")
            .layer(lower())
            .layer(wh(&[".wh.d"]).folder("d/").file("d/new", b"4"))
            .tree([folder("d"), file("d/new", "4"), beside()]),
        // "Files that are present in the same layer as a whiteout file can only be hidden by whiteout files in subsequent
        // layers." Docker removes them all the same; no builder writes both in this order.
        case("after the same name in the same layer")
            .layer(Tar::new().file("a", b"1"))
            .layer(Tar::new().file("a", b"2").file(".wh.a", b""))
            .tree([file("a", "2")]),
        case("after the folder of that name in the same layer")
            .layer(lower())
            .layer(Tar::new().folder("d/").file("d/new", b"4").file(".wh.d", b""))
            .tree([folder("d"), file("d/new", "4"), beside()])
            .second(TIME_OF_REMOVAL),
        case("opaque, before the entries")
            .layer(lower())
            .layer(Tar::new().folder("d/").file("d/.wh..wh..opq", b"").file("d/new", b"4"))
            .tree([folder("d"), file("d/new", "4"), beside()]),
        case("opaque, after the entries")
            .layer(lower())
            .layer(Tar::new().folder("d/").file("d/new", b"4").file("d/.wh..wh..opq", b""))
            .tree([folder("d"), file("d/new", "4"), beside()]),
        case("opaque, and nothing else").layer(lower()).layer(wh(&["d/.wh..wh..opq"])).tree([folder("d"), beside()]),
        case("opaque, with the folder in it listed again: that is empty but for the new")
            .layer(lower())
            .layer(Tar::new().file("d/.wh..wh..opq", b"").folder("d/sub/").file("d/sub/new", b"4"))
            .tree([folder("d"), folder("d/sub"), file("d/sub/new", "4"), beside()]),
        case("opaque, after entries in a folder in it")
            .layer(lower())
            .layer(Tar::new().folder("d/sub/").file("d/sub/new", b"4").file("d/.wh..wh..opq", b""))
            .tree([folder("d"), folder("d/sub"), file("d/sub/new", "4"), beside()])
            .second(TIME_OF_REMOVAL),
        case("opaque, and the same name again")
            .layer(lower())
            .layer(Tar::new().file("d/old", b"new").file("d/.wh..wh..opq", b""))
            .tree([folder("d"), file("d/old", "new"), beside()]),
        case("opaque on a folder of a layer before the one before")
            .layer(lower())
            .layer(Tar::new().file("d/middle", b"4").file("d/sub/middle", b"5"))
            .layer(Tar::new().file("d/.wh..wh..opq", b"").file("d/new", b"6"))
            .tree([folder("d"), file("d/new", "6"), beside()]),
        case("opaque on the root")
            .layer(lower())
            .layer(Tar::new().file(".wh..wh..opq", b"").file("new", b"4"))
            .tree([file("new", "4")]),
        case("opaque on a folder that is not there").layer(lower()).layer(wh(&["no/.wh..wh..opq"])).tree([
            folder("d"),
            file("d/old", "1"),
            folder("d/sub"),
            file("d/sub/old", "2"),
            beside(),
        ]),
        case("opaque on a folder of its own layer")
            .layer(Tar::new().folder("d/").file("d/.wh..wh..opq", b"").file("d/new", b"4"))
            .tree([folder("d"), file("d/new", "4")]),
        case("opaque, then entries in a later layer")
            .layer(lower())
            .layer(wh(&["d/.wh..wh..opq"]))
            .layer(Tar::new().file("d/new", b"4"))
            .tree([folder("d"), file("d/new", "4"), beside()]),
        case("names that AUFS keeps for itself")
            .layer(Tar::new().file("a", b"1"))
            .layer(wh(&[".wh..wh.aufs", ".wh..wh.orph"]).folder(".wh..wh.plnk/").file(".wh..wh.plnk/1.2", b"x"))
            .tree([file("a", "1")])
            .second(Second::Differs("it takes them for whiteouts, and makes what is below; Docker leaves them out")),
        case("a hard link to a file that AUFS keeps for itself")
            .layer(Tar::new().folder(".wh..wh.plnk/").file(".wh..wh.plnk/1.2", b"x").hard_link("a", ".wh..wh.plnk/1.2"))
            .tree([file("a", "x")])
            .second(Second::Differs("it keeps the target; Docker does not")),
        case("a name with the mark inside is no whiteout")
            .layer(Tar::new().file("a.wh.b", b"1").file("b", b"2"))
            .tree([file("a.wh.b", "1"), file("b", "2")]),
        case("a link removed, and a folder of its name in the same layer")
            .layer(Tar::new().folder("real/").file("real/f", b"1").symlink("l", "real"))
            .layer(wh(&[".wh.l"]).folder("l/").file("l/g", b"2"))
            .tree([folder("real"), file("real/f", "1"), folder("l"), file("l/g", "2")]),
        case("what is left of a link's target when the link goes")
            .layer(Tar::new().file("f", b"1").symlink("l", "f"))
            .layer(wh(&[".wh.f"]))
            .tree([symlink("l", "f")]),
    ]
}
