//! Sparse files as GNU tar writes them, in every format, and as no tool does but each could.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::case::Case;
use crate::case::Second;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::image_support::Entry;
use crate::image_support::Tar;
use crate::image_support::scratch;

const OLD: Second =
    Second::Cannot("it does not know the type; neither does Docker, but GNU tar writes it unless told otherwise");

const FORMATS: [(&str, &[&str], Second); 4] = [
    ("the old format", &["--format=gnu"], OLD),
    ("pax 0.0", &["--format=pax", "--sparse-version=0.0"], Second::Same),
    ("pax 0.1", &["--format=pax", "--sparse-version=0.1"], Second::Same),
    ("pax 1.0", &["--format=pax", "--sparse-version=1.0"], Second::Same),
];

/// The records of pax 0.1; Go's archive/tar insists on the number of runs.
fn map<'a>(size: &'a str, runs: &'a str, map: &'a str) -> [(&'static str, &'a [u8]); 3] {
    let records = [("GNU.sparse.size", size), ("GNU.sparse.numblocks", runs), ("GNU.sparse.map", map)];
    records.map(|(key, value)| (key, value.as_bytes()))
}

/// A file's name, its size, and where it has 1,000 bytes of data.
type Sparse = (&'static str, usize, Vec<usize>);

pub(super) fn cases() -> Vec<Case> {
    let tree = |files: &[Sparse]| -> Vec<_> {
        let content = |file: &Sparse| data(file).1;
        files.iter().map(|sparse| file(sparse.0, content(sparse))).collect()
    };
    let mut cases = Vec::new();
    for (name, format, second) in FORMATS {
        let mut sizes = vec![("empty", 300_000, vec![]), ("tail", 300_000, vec![0]), ("head", 301_000, vec![300_000])];
        sizes.push(("many", 2_100_000, (0..50).map(|run| run * 40_960).collect()));
        cases.push(case(name).archive(tar(format, &sizes)).tree(tree(&sizes)).second(second));
        let mut between = Tar::new().file("before", b"1").into_entries();
        between.extend(tar(format, &sizes[1..2]));
        let between = case(name).archive(between).tree([file("before", "1")]).tree(tree(&sizes[1..2]));
        cases.push(between.second(second));
    }
    cases.extend([
        case("a map of pax without a hole")
            .layer(Tar::new().pax(&map("3", "1", "0,3")).file("f", b"abc"))
            .tree([file("f", "abc")]),
        case("small enough to be kept beside its inode")
            .layer(Tar::new().pax(&map("9", "2", "3,1,5,2")).file("f", b"abc"))
            .tree([file("f", b"\0\0\0a\0bc\0\0")]),
        case("holes that start and end inside blocks")
            .layer(Tar::new().pax(&map("200000", "2", "5,1,100001,2")).file("f", b"abc"))
            .tree([file("f", with(200_000, &[(5, b"a"), (100_001, b"bc")]))]),
        case("a name in the records beside that of the entry")
            .layer(
                Tar::new()
                    .pax(&[&map("4", "1", "0,1")[..], &[("GNU.sparse.name", b"d/real")]].concat())
                    .file("d/GNUSparseFile.7/real", b"a"),
            )
            .tree([folder("d").implied(), file("d/real", b"a\0\0\0")]),
        case("a sparse file replaces one, and is replaced")
            .layer(Tar::new().file("a", b"1").file("b", b"old"))
            .layer(Tar::new().pax(&map("90000", "1", "0,1")).file("a", b"x"))
            .layer(Tar::new().pax(&map("90000", "1", "0,1")).file("b", b"x"))
            .layer(Tar::new().file("b", b"new"))
            .tree([file("a", with(90_000, &[(0, b"x")])), file("b", "new")]),
        case("a hard link to a sparse file, and its owner and attributes")
            .layer(
                Tar::new()
                    .pax(&[&map("90000", "1", "0,1")[..], &[("SCHILY.xattr.user.a", b"1"), ("uid", b"77")]].concat())
                    .file("f", b"x")
                    .entry(&Entry { name: b"g", kind: b'1', link: b"f", uid: 77, ..Entry::default() }),
            )
            .tree([
                file("f", with(90_000, &[(0, b"x")])).owner(77, 0).xattr("user.a", &b"1"[..]),
                file("g", with(90_000, &[(0, b"x")])).owner(77, 0).xattr("user.a", &b"1"[..]).same_as("f"),
            ]),
    ]);
    cases
}

fn with(size: usize, runs: &[(usize, &[u8])]) -> Vec<u8> {
    let mut content = vec![0; size];
    for (start, data) in runs {
        content[*start..start + data.len()].copy_from_slice(data);
    }
    content
}

fn data((_, size, starts): &Sparse) -> (Vec<u8>, Vec<u8>) {
    let run = vec![0x5a; 1000];
    let content = starts.iter().fold(vec![0; *size], |mut content, start| {
        content[*start..start + run.len()].copy_from_slice(&run);
        content
    });
    (run, content)
}

/// The archive that GNU tar makes of them.
fn tar(format: &[&str], files: &[Sparse]) -> Vec<u8> {
    let folder = scratch();
    for sparse in files {
        let (run, _) = data(sparse);
        let (name, size, starts) = sparse;
        let file = File::create(folder.path().join(name)).expect("made");
        starts.iter().for_each(|start| file.write_all_at(&run, *start as u64).expect("written"));
        file.set_len(*size as u64).expect("set");
    }
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sparse", "--hole-detection=raw", "--owner=0", "--group=0", "--mode=0644"]);
    tar.args(["--mtime=@1700000000", "--file=-"]).args(format).args(files.iter().map(|(name, ..)| name));
    let output = tar.current_dir(folder.path()).output().expect("GNU tar is needed by this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
