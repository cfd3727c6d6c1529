//! Kinds of entries, and sizes that decide where content is kept.

use crate::case::Case;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::case::special;
use crate::case::symlink;
use crate::image_support::Entry;
use crate::image_support::Tar;

/// Nothing; the largest kept beside its inode and the first in a block; a block, two blocks, and their borders.
const SIZES: [usize; 13] = [0, 1, 511, 512, 513, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193];

pub(super) fn cases() -> Vec<Case> {
    let device =
        |kind: u8, device: (u32, u32)| Tar::new().entry(&Entry { name: b"x", kind, device, ..Entry::default() });
    let content = |size: usize| -> Vec<u8> { (0..size).map(|at| at as u8 ^ size as u8).collect() };
    let mut cases: Vec<_> = SIZES
        .map(|size| {
            case("a file of a size").layer(Tar::new().file("f", &content(size))).tree([file("f", content(size))])
        })
        .into();
    cases.extend([
        case("files of all those sizes in one folder")
            .layer(SIZES.iter().fold(Tar::new(), |tar, size| tar.file(&size.to_string(), &content(*size))))
            .tree(SIZES.map(|size| file(size.to_string(), content(size)))),
        case("a file of a megabyte").layer(Tar::new().file("f", &content(1 << 20))).tree([file("f", content(1 << 20))]),
        case("content that looks like a header")
            .layer(Tar::new().file("f", &Tar::new().file("g", b"1").finish()))
            .tree([file("f", Tar::new().file("g", b"1").finish())]),
        case("an empty folder").layer(Tar::new().folder("d/")).tree([folder("d")]),
        case("a fifo").layer(device(b'6', (0, 0))).tree([special("x", "fifo")]),
        case("a character device").layer(device(b'3', (1, 3))).tree([special("x", "char 1:3")]),
        case("a character device 0:0, which overlayfs takes for a whiteout")
            .layer(device(b'3', (0, 0)))
            .tree([special("x", "char 0:0")]),
        case("a block device").layer(device(b'4', (8, 1))).tree([special("x", "block 8:1")]),
        case("a minor number of more than 8 bits")
            .layer(device(b'4', (259, 70_000)))
            .tree([special("x", "block 259:70000")]),
        case("the largest numbers of the kernel")
            .layer(device(b'3', (4095, 1_048_575)))
            .tree([special("x", "char 4095:1048575")]),
        case("a device that states a size")
            .layer(
                Tar::new()
                    .patched(&Entry { kind: b'3', device: (1, 3), ..Entry::default() }, &[(124, b"00000001000")])
                    .file("y", b"1"),
            )
            .tree([special("x", "char 1:3"), file("y", "1")]),
        case("one of each")
            .layer(
                Tar::new()
                    .folder("d/")
                    .file("d/f", b"1")
                    .symlink("d/l", "f")
                    .hard_link("d/h", "d/f")
                    .entry(&Entry { name: b"d/c", kind: b'3', device: (5, 1), ..Entry::default() })
                    .entry(&Entry { name: b"d/b", kind: b'4', device: (7, 0), ..Entry::default() })
                    .entry(&Entry { name: b"d/p", kind: b'6', ..Entry::default() }),
            )
            .tree([
                folder("d"),
                file("d/f", "1"),
                symlink("d/l", "f"),
                file("d/h", "1").same_as("d/f"),
                special("d/c", "char 5:1"),
                special("d/b", "block 7:0"),
                special("d/p", "fifo"),
            ]),
    ]);
    cases
}
