//! Sparse files in every format that GNU tar writes, and maps that lie.

mod support;

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use kiln_tree::ArchiveError;
use kiln_tree::UnpackError;
use kiln_tree::UnpackOptions;
use kiln_tree::reader::Kind;
use kiln_tree::reader::Piece;
use kiln_tree::reader::Reader;
use kiln_tree::reader::Rules;
use proptest::prelude::*;
use support::archive;
use support::entry;
use support::file;
use support::unpack_into;
use tar::EntryType;
use tar::Header;
use tempfile::tempdir;

const FORMATS: [&[&str]; 4] = [
    &["--format=gnu"],
    &["--format=pax", "--sparse-version=0.0"],
    &["--format=pax", "--sparse-version=0.1"],
    &["--format=pax", "--sparse-version=1.0"],
];

const RULES: Rules = Rules {
    extension_bytes: 64 << 10,
    global_bytes: 64 << 10,
    extensions: 16,
    sparse_runs: 1000,
    needs_end_mark: true,
};

/// How GNU tar finds holes: by reading, which is the same on every file system, or by asking, which takes no time.
const RAW: &str = "--hole-detection=raw";
const SEEK: &str = "--hole-detection=seek";

/// The archive that GNU tar makes of what is in `folder`.
fn tar(format: &[&str], detection: &str, folder: &Path) -> Vec<u8> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sparse", "--sort=name", "--file=-", detection]).args(format).arg(".");
    let output = tar.current_dir(folder).env("LC_ALL", "C").output().expect("GNU tar is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A file of `size` bytes with these runs of data.
fn write_sparse(path: &Path, size: u64, runs: &[(u64, Vec<u8>)]) {
    let file = File::create(path).expect("made");
    for (start, data) in runs {
        file.write_all_at(data, *start).expect("written");
    }
    file.set_len(size).expect("set");
}

/// Name, size and pieces of a file; of a piece whether it is data, and its length.
type Read = (Vec<u8>, u64, Vec<(bool, u64)>);

/// The first file in `archive`.
fn pieces(archive: &[u8], rules: Rules) -> Result<Read, ArchiveError> {
    let mut reader = Reader::new(archive, rules);
    loop {
        let entry = reader.next_entry()?.expect("a file");
        let Kind::File { size } = entry.kind else { continue };
        let mut pieces = Vec::new();
        let mut buffer = [0; 100_000];
        loop {
            match reader.read_piece(&mut buffer)? {
                Piece::Data(count) => pieces.push((true, count as u64)),
                Piece::Hole(length) => pieces.push((false, length)),
                Piece::End => break,
            }
        }
        while reader.next_entry()?.is_some() {}
        return Ok((entry.name, size, pieces));
    }
}

#[test]
fn every_format_gives_the_same_file_with_its_holes() {
    let folder = tempdir().expect("temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("made");
    let many: Vec<_> = (0..200).map(|run| (run * 20_000, vec![run as u8 + 1; 700])).collect();
    write_sparse(&source.join("many"), 5_000_000, &many);
    write_sparse(&source.join("hole"), 3_000_000, &[]);
    write_sparse(&source.join("hole-first"), 1_000_010, &[(1_000_000, vec![7; 10])]);
    write_sparse(&source.join("n".repeat(150)), 2_000_000, &[(0, vec![8; 100])]);
    fs::write(source.join("whole"), vec![9; 3000]).expect("written");
    for format in FORMATS {
        let copy = folder.path().join(format.join(""));
        let bytes = tar(format, RAW, &source);
        assert!(bytes.len() < 3_000_000, "{format:?}: tar has left the holes out");
        unpack_into(&bytes, &copy).expect("unpacked");
        for name in ["many", "hole", "hole-first", &"n".repeat(150), "whole"] {
            let (found, wanted) = (copy.join(name), source.join(name));
            assert!(fs::read(&found).expect("there") == fs::read(&wanted).expect("there"), "{format:?} {name}");
            let blocks = |path: &Path| fs::metadata(path).expect("there").blocks();
            assert!(blocks(&found) <= blocks(&wanted) + 16, "{format:?}: {name} has its holes");
        }
        assert_eq!(fs::read_dir(&copy).expect("there").count(), 5, "{format:?}: no other names");
    }
}

#[test]
fn a_hole_of_a_tebibyte_takes_no_time() {
    let folder = tempdir().expect("temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("made");
    write_sparse(&source.join("huge"), 1 << 40, &[(1 << 39, vec![1; 4096])]);
    for format in FORMATS {
        let bytes = tar(format, SEEK, &source);
        let (name, size, pieces) = pieces(&bytes, RULES).expect("read");
        assert_eq!((&name[..], size), (&b"./huge"[..], 1 << 40), "{format:?}");
        let holes: u64 = pieces.iter().filter(|(is_data, _)| !is_data).map(|(_, length)| length).sum();
        assert_eq!(holes, (1 << 40) - 4096, "{format:?}");
        let copy = folder.path().join(format.join(""));
        unpack_into(&bytes, &copy).expect("unpacked");
        let metadata = fs::metadata(copy.join("huge")).expect("there");
        assert_eq!(metadata.len(), 1 << 40);
        assert!(metadata.blocks() < 1000, "{} blocks", metadata.blocks());
    }
    let options = UnpackOptions { max_bytes: (1 << 40) - 1, ..UnpackOptions::guest() };
    let result = kiln_tree::unpack_into(&tar(FORMATS[0], SEEK, &source)[..], &folder.path().join("limited"), &options);
    assert!(matches!(result, Err(UnpackError::Limit { what: "bytes", .. })), "{result:?}");
}

#[test]
fn content_is_read_with_zeros_for_the_holes() {
    let bytes = pax_0_1("10,2,20,1", "30", b"abc");
    let mut reader = Reader::new(&bytes[..], RULES);
    reader.next_entry().expect("read").expect("a file");
    let (mut content, mut buffer) = (Vec::new(), [0xff; 7]);
    loop {
        match reader.read_content(&mut buffer).expect("read") {
            0 => break,
            count => content.extend_from_slice(&buffer[..count]),
        }
    }
    assert_eq!(content, *b"\0\0\0\0\0\0\0\0\0\0ab\0\0\0\0\0\0\0\0c\0\0\0\0\0\0\0\0\0");
}

fn records(pairs: &[(&str, &str)]) -> Vec<u8> {
    let line = |key: &str, value: &str| {
        let rest = key.len() + value.len() + " GNU.sparse.=\n".len();
        let length = (rest..).find(|length| *length == rest + length.to_string().len()).expect("there is one");
        format!("{length} GNU.sparse.{key}={value}\n")
    };
    let text: String = pairs.iter().map(|(key, value)| line(key, value)).collect();
    entry(EntryType::XHeader, b"pax", b"", text.as_bytes())
}

fn pax_0_1(map: &str, size: &str, content: &[u8]) -> Vec<u8> {
    archive(&[records(&[("size", size), ("map", map)]), file("x", content)])
}

fn pax_1_0(size: &str, map: &str, data: &[u8]) -> Vec<u8> {
    let mut content = map.as_bytes().to_vec();
    content.resize(content.len().next_multiple_of(512), 0);
    content.extend_from_slice(data);
    archive(&[records(&[("major", "1"), ("minor", "0"), ("realsize", size)]), file("x", &content)])
}

/// A header in the old format with these runs, then `more` as it is.
fn old(size: u64, runs: &[(u64, u64)], is_extended: bool, stored: u64, more: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_path("x").expect("fits");
    header.set_mode(0o644);
    header.set_size(stored);
    let gnu = header.as_gnu_mut().expect("one");
    gnu.set_real_size(size);
    gnu.set_is_extended(is_extended);
    for (place, (start, length)) in gnu.sparse.iter_mut().zip(runs) {
        place.set_offset(*start);
        place.set_length(*length);
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(more);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    archive(&[bytes])
}

fn malformed(archive: &[u8]) {
    let result = pieces(archive, RULES);
    assert!(matches!(result, Err(ArchiveError::Malformed(_))), "{result:?}");
}

#[test]
fn maps_that_lie_are_refused() {
    // They overlap, descend, go beyond the end or beyond 64 bits, and say more or less than there is.
    for map in ["0,2,1,1", "5,2,0,1", "8,3", "18446744073709551615,3", "0,2", "0,4", "a,b", "-1,3"] {
        malformed(&pax_0_1(map, "10", b"abc"));
        let numbers: Vec<_> = map.split(',').collect();
        malformed(&pax_1_0("10", &format!("{}\n{}\n", numbers.len() / 2, numbers.join("\n")), b"abc"));
    }
    for map in ["", "0", "0,3,", "0,3,5"] {
        malformed(&pax_0_1(map, "10", b"abc"));
    }
    for runs in [&[(0, 2), (1, 1)][..], &[(5, 2), (0, 1)], &[(8, 3)], &[(u64::MAX, 3)], &[(0, 2)], &[(0, 4)], &[]] {
        malformed(&old(10, runs, false, 3, b"abc"));
    }
    assert_eq!(pieces(&pax_0_1("0,3", "10", b"abc"), RULES).expect("true").2, [(true, 3), (false, 7)]);
    assert_eq!(pieces(&pax_1_0("10", "1\n0\n3\n", b"abc"), RULES).expect("true").2, [(true, 3), (false, 7)]);
    assert_eq!(pieces(&old(10, &[(0, 3)], false, 3, b"abc"), RULES).expect("true").2, [(true, 3), (false, 7)]);
    malformed(&archive(&[records(&[("map", "0,3")]), file("x", b"abc")]));
    malformed(&archive(&[entry(EntryType::GNUSparse, b"x", b"", b"")]));
}

#[test]
fn maps_that_do_not_end_are_refused() {
    // In the content: the map goes on to the end of the file, or through the next entry.
    malformed(&pax_1_0("10", "3\n0\n3\n", b""));
    malformed(&pax_1_0("10", &"0".repeat(2000), b""));
    let limit = |result| assert!(matches!(result, Err(ArchiveError::Limit { .. })), "{result:?}");
    let runs: String = (0..1001).map(|run| format!("{run}\n0\n")).collect();
    limit(pieces(&pax_1_0("5000", &format!("1001\n{runs}"), b""), RULES));
    // In blocks after the header, each of which says that there is another.
    let mut block = [0; 512];
    block[504] = 1;
    limit(pieces(&old(10, &[], true, 0, &block.repeat(1000)), RULES));
    let cut = old(10, &[], true, 0, &block);
    assert!(matches!(pieces(&cut[..1024], RULES), Err(ArchiveError::Truncated)));
}

#[test]
fn the_name_is_the_one_for_those_who_know_the_format() {
    let named = records(&[("size", "10"), ("map", "0,3"), ("name", "real")]);
    let path = entry(EntryType::GNULongName, b"long", b"", b"GNUSparseFile.1/real");
    let (name, ..) = pieces(&archive(&[path, named, file("x", b"abc")]), RULES).expect("read");
    assert_eq!(name, b"real");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_sparse_file_comes_back_from_gnu_tar(
        runs in prop::collection::vec((0..400_u64, 1..3000_usize, 1..=255_u8), 0..40),
        tail in 0..30_000_u64,
        format in prop::sample::select(&FORMATS[..]),
    ) {
        let folder = tempdir().expect("temporary folder");
        let source = folder.path().join("source");
        fs::create_dir(&source).expect("made");
        let mut end = 0;
        let runs: Vec<_> = runs.into_iter().map(|(hole, length, byte)| {
            let start = end + hole * 100;
            end = start + length as u64;
            (start, vec![byte; length])
        }).collect();
        write_sparse(&source.join("f"), end + tail, &runs);
        let copy = folder.path().join("copy");
        unpack_into(&tar(format, RAW, &source), &copy).expect("unpacked");
        prop_assert!(fs::read(copy.join("f")).expect("there") == fs::read(source.join("f")).expect("there"));
    }
}

proptest! {
    #[test]
    fn damaged_maps_are_read_or_refused(
        base in 0..3_usize,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = match base {
            0 => pax_0_1("1,1,5,2", "10", b"abc"),
            1 => pax_1_0("10", "2\n1\n1\n5\n2\n", b"abc"),
            _ => old(10, &[(1, 1), (5, 2)], false, 3, b"abc"),
        };
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for block in bytes.chunks_mut(512) {
            let sum: u32 = block.iter().enumerate()
                .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let mut reader = Reader::new(&bytes[..], RULES);
        while let Ok(Some(_)) = reader.next_entry() {
            while let Ok(Piece::Data(_) | Piece::Hole(_)) = reader.read_piece(&mut [0; 1000]) {}
        }
    }
}
