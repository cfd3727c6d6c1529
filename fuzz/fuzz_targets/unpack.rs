//! A guest's archive, as the host unpacks it: any bytes give a tree inside the destination or an error.
#![no_main]

use std::fs;
use std::path::Path;

use kiln_tree::UnpackOptions;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|archive: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("precious"), "precious").expect("written");
    let limits = UnpackOptions { max_entries: 100, max_bytes: 1 << 20, ..UnpackOptions::host() };
    let _ = kiln_tree::unpack_into(archive, &folder.path().join("into"), &limits);
    let _ = kiln_tree::unpack_as(archive, &folder.path().join("as"), &limits);
    check(folder.path());
});

/// Nothing beside the two destinations was touched.
fn check(folder: &Path) {
    assert_eq!(fs::read(folder.join("precious")).expect("there"), b"precious");
    for entry in fs::read_dir(folder).expect("there") {
        let name = entry.expect("readable").file_name();
        assert!(["precious", "into", "as"].iter().any(|known| name == *known), "{name:?}");
    }
}
