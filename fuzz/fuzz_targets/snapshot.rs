//! A snapshot's folder from a stranger: no manifest and no memory make opening or restoring panic, nor what the guest does then.
//!
//! The input is a manifest, and after a NUL byte changes to the memory: three bytes of offset and one of content each.
#![no_main]

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

use kiln::hv::soft::Soft;
use kiln::snapshot::Snapshot;
use kiln::vmm::MachineEnd;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use sha2::Digest;
use sha2::Sha256;

/// A guest that was saved by an earlier version, page by page.
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/snapshot-3");
/// Larger memories are refused by the sizes alone, and take too long to make.
const MEMORY_MAX: u64 = 64 << 20;

fuzz_target!(|input: &[u8]| {
    let end = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    let (manifest, changes) = (&input[..end], input.get(end + 1..).unwrap_or_default());
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("snapshot.json"), manifest).expect("written");
    let _ = Snapshot::open(folder.path());
    let Ok(value) = serde_json::from_slice::<Value>(manifest) else { return };
    let size = value["memory"]["size"].as_u64().unwrap_or_default().min(MEMORY_MAX);
    let Some(sealed) = seal(manifest) else { return };
    fs::write(folder.path().join("snapshot.json"), sealed).expect("written");
    make_memory(folder.path(), size, changes);
    let _ = Snapshot::open(folder.path()).map(|snapshot| run(&snapshot));
});

/// The manifest with a digest that fits it, as a forger makes it; of use only when it is compact, as the seeds are.
fn seal(manifest: &[u8]) -> Option<String> {
    const KEY: &str = "\"integrity\":\"";
    let text = std::str::from_utf8(manifest).ok()?;
    let (before, after) = text.split_once(KEY)?;
    let (_, after) = after.split_once('"')?;
    let digest = Sha256::digest(format!("{before}{KEY}\"{after}"));
    Some(format!("{before}{KEY}sha256:{}\"{after}", hex::encode(digest)))
}

fn make_memory(folder: &Path, size: u64, changes: &[u8]) {
    let memory = File::create(folder.join("memory")).expect("made");
    memory.set_len(size).expect("sized");
    let put = |bytes: &[u8], offset: u64| {
        if offset + bytes.len() as u64 <= size {
            memory.write_all_at(bytes, offset).expect("written");
        }
    };
    for entry in fs::read_dir(GOLDEN).expect("the golden snapshot") {
        let path: PathBuf = entry.expect("readable").path();
        let offset = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("page-"));
        if let Some(offset) = offset {
            put(&fs::read(&path).expect("a page"), u64::from_str_radix(offset, 16).expect("an offset"));
        }
    }
    for change in changes.chunks_exact(4) {
        put(&change[3..], u64::from(change[0]) | u64::from(change[1]) << 8 | u64::from(change[2]) << 16);
    }
    let digests = File::create(folder.join("memory.sha256")).expect("made");
    digests.set_len(size.div_ceil(4 << 20) * 32).expect("sized");
}

/// Restores it and lets the guest do a little.
fn run(snapshot: &Snapshot) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let _ = snapshot.verify();
        let Ok(mut machine) = snapshot.restore(&Soft::new(), &[]).await else { return };
        machine.resume();
        let _ = machine.pause().await;
        let _ = machine.save().await;
        machine.resume();
        machine.stop();
        assert!(!matches!(machine.ended().await, MachineEnd::EnginePanicked));
    });
}
