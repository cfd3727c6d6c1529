//! GNU tar reads what we write, and we read what it writes.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use support::Listed;
use support::assert_same;
use support::listing;
use support::rich_tree;
use support::unpack_into;
use tempfile::tempdir;

fn tar(arguments: &[&str], folder: &Path) {
    let status = Command::new("tar").args(arguments).current_dir(folder).env("LC_ALL", "C").status();
    assert!(status.expect("GNU tar is installed").success(), "{arguments:?}");
}

fn source(folder: &Path) -> PathBuf {
    let source = folder.join("source");
    fs::create_dir(&source).expect("made");
    rich_tree(&source);
    source
}

/// The format's own headers have whole seconds.
fn without_fractions(mut tree: BTreeMap<PathBuf, Listed>) -> BTreeMap<PathBuf, Listed> {
    tree.values_mut().for_each(Listed::drop_fraction);
    tree
}

#[test]
fn gnu_tar_extracts_what_we_pack() {
    let folder = tempdir().expect("temporary folder");
    let source = source(folder.path());
    let archive = folder.path().join("archive.tar");
    fs::write(&archive, support::pack(&source).expect("packed")).expect("written");
    let copy = folder.path().join("copy");
    fs::create_dir(&copy).expect("made");
    let archive = archive.to_str().expect("text");
    tar(&["-x", "-p", "--atime-preserve", "-f", archive], &copy);
    assert_same(&listing(&copy), &listing(&source));
}

#[test]
fn we_unpack_what_gnu_tar_packs() {
    let folder = tempdir().expect("temporary folder");
    let source = source(folder.path());
    for format in ["pax", "gnu"] {
        let archive = folder.path().join(format);
        tar(&["-c", &format!("--format={format}"), "-f", archive.to_str().expect("text"), "."], &source);
        let copy = folder.path().join(format!("{format}-copy"));
        unpack_into(&fs::read(&archive).expect("there"), &copy).expect("unpacked");
        match format {
            "pax" => assert_same(&listing(&copy), &listing(&source)),
            _ => assert_same(&without_fractions(listing(&copy)), &without_fractions(listing(&source))),
        }
    }
}

#[test]
fn we_unpack_what_the_old_formats_can_hold() {
    let folder = tempdir().expect("temporary folder");
    let source = folder.path().join("source");
    let long = source.join("a".repeat(90)).join("b".repeat(90));
    fs::create_dir_all(&long).expect("made");
    fs::write(long.join("file"), b"prefix and name").expect("written");
    fs::write(source.join("short"), b"short").expect("written");
    fs::hard_link(source.join("short"), source.join("again")).expect("linked");
    for format in ["ustar", "v7"] {
        if format == "v7" {
            fs::remove_dir_all(source.join("a".repeat(90))).expect("removed");
        }
        let archive = folder.path().join(format);
        tar(&["-c", &format!("--format={format}"), "-f", archive.to_str().expect("text"), "."], &source);
        let copy = folder.path().join(format!("{format}-copy"));
        unpack_into(&fs::read(&archive).expect("there"), &copy).expect("unpacked");
        assert_same(&without_fractions(listing(&copy)), &without_fractions(listing(&source)));
    }
}
