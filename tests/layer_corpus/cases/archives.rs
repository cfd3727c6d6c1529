//! The archive as a whole: its end, headers that are for all of it, and dialects.

use crate::case::Case;
use crate::case::Second;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::image_support::Entry;
use crate::image_support::Tar;
use crate::image_support::pax_record;

const NO_GLOBAL: Second = Second::Cannot("it does not know global headers; Docker leaves them out");

pub(super) fn cases() -> Vec<Case> {
    let one = || Tar::new().file("a", b"1");
    let entries = || one().into_entries();
    let global = |records: &[(&str, &[u8])]| -> Vec<u8> {
        records.iter().flat_map(|(key, value)| pax_record(key.as_bytes(), value)).collect()
    };
    vec![
        case("no layers"),
        case("a layer without entries").layer(Tar::new()),
        case("a layer of no bytes at all").archive(Vec::new()),
        case("layers without entries around one that has some")
            .layer(Tar::new())
            .layer(one())
            .layer(Tar::new())
            .tree([file("a", "1")]),
        case("no end mark").archive(entries()).tree([file("a", "1")]),
        case("half an end mark").archive([entries(), vec![0; 512]].concat()).tree([file("a", "1")]),
        case("zeros after the end mark, as records of 10 KiB have them")
            .archive([one().finish(), vec![0; 8192]].concat())
            .tree([file("a", "1")]),
        case("anything after the end mark").archive([one().finish(), vec![b'?'; 777]].concat()).tree([file("a", "1")]),
        case("another archive after the end mark, which does not count")
            .archive([one().finish(), Tar::new().file("b", b"2").finish()].concat())
            .tree([file("a", "1")]),
        case("the same layer twice")
            .layer(one().file(".wh.gone", b""))
            .layer(one().file(".wh.gone", b""))
            .tree([file("a", "1")]),
        case("a global header that names a comment, as `git archive` writes it")
            .layer(Tar::new().raw(b'g', b"pax_global_header", &global(&[("comment", b"0123abcd")])).file("a", b"1"))
            .tree([file("a", "1")])
            .second(NO_GLOBAL),
        // The standard would have them apply; Go's archive/tar gives them to Docker, which skips the entry.
        case("a global header with owner and time, which Docker ignores")
            .layer(
                Tar::new().raw(b'g', b"pax_global_header", &global(&[("uid", b"7"), ("mtime", b"5")])).file("a", b"1"),
            )
            .tree([file("a", "1")])
            .second(NO_GLOBAL),
        case("header of v7, without a magic")
            .layer(Tar::new().patched(&Entry { name: b"a", content: b"1", ..Entry::default() }, &[(257, &[0; 8])]))
            .tree([file("a", "1")]),
        case("type 0 byte, as in v7")
            .layer(Tar::new().entry(&Entry { name: b"a", kind: 0, content: b"1", ..Entry::default() }))
            .tree([file("a", "1")]),
        case("a folder of v7: a file by its type, with a slash after its name")
            .layer(Tar::new().entry(&Entry { name: b"d/", kind: 0, mode: 0o755, ..Entry::default() }))
            .tree([folder("d")]),
        case("type 7, contiguous, which is a file")
            .layer(Tar::new().entry(&Entry { name: b"a", kind: b'7', content: b"1", ..Entry::default() }))
            .tree([file("a", "1")])
            .second(Second::Cannot("it does not know the type; neither does Docker, but POSIX says that it is a file")),
        case("header of GNU tar, where ustar has a prefix it has times")
            .layer(Tar::new().patched(
                &Entry { name: b"a", content: b"1", ..Entry::default() },
                &[(257, b"ustar  \0"), (345, b"14524770000\0"), (357, b"14524770001\0")],
            ))
            .tree([file("a", "1")]),
        case("unknown pax records")
            .layer(Tar::new().pax(&[("VENDOR.thing", b"x"), ("atime", b"1")]).file("a", b"1"))
            .tree([file("a", "1")]),
        case("of two pax headers before one entry the last counts")
            .layer(Tar::new().pax(&[("path", b"first")]).pax(&[("path", b"second")]).file("a", b"1"))
            .tree([file("second", "1")]),
        case("a pax record overrides the size")
            .layer(
                Tar::new()
                    .pax(&[("size", b"3")])
                    .patched(&Entry { name: b"a", content: b"123", ..Entry::default() }, &[(124, b"00000000000")]),
            )
            .tree([file("a", "123")]),
        case("a size in base 256")
            .layer(Tar::new().patched(
                &Entry { name: b"a", content: b"123", ..Entry::default() },
                &[(124, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3])],
            ))
            .tree([file("a", "123")]),
        case("numbers with spaces around, and fields left blank")
            .layer(Tar::new().patched(
                &Entry { name: b"a", content: b"123", ..Entry::default() },
                &[(108, b"    11 \0"), (116, &[0; 8]), (124, b"         3 \0"), (329, &[0; 16])],
            ))
            .tree([file("a", "123").owner(9, 0)]),
        case("a folder and a link that state a size, for which there is no content")
            .layer(
                Tar::new()
                    .patched(
                        &Entry { name: b"d", kind: b'5', mode: 0o755, ..Entry::default() },
                        &[(124, b"00000001000")],
                    )
                    .file("a", b"1"),
            )
            .tree([folder("d"), file("a", "1")]),
        case("a thousand entries").layer(thousand()).tree((0..1000).map(|n| file(format!("{n:04}"), n.to_string()))),
    ]
}

fn thousand() -> Tar {
    (0..1000).fold(Tar::new(), |tar, n| tar.file(&format!("{n:04}"), n.to_string().as_bytes()))
}
