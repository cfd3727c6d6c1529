//! An image's layers, converted for the first time: against `umoci unpack` of the same layout.
//!
//! `cargo bench --bench unpack`, as root, since `umoci` keeps owners. Each round is a process of its own. What kiln writes
//! is synced, and what `umoci` writes is not.

mod support;

use std::fs;

use crate::support::Sample;
use crate::support::image;

const ROUNDS: usize = 3;

fn main() {
    image::run_if_child();
    let (layout, folder) = (image::layout(), image::scratch());
    let (store, bundle) = (folder.join("unpack-store"), folder.join("unpack-bundle"));
    image::kiln(&store, &layout);

    let (mut subject, mut yardstick) = (Sample::new("kiln, layers converted"), Sample::new("umoci unpack"));
    let mut peaks = [0; 2];
    for _ in 0..ROUNDS {
        image::remove_derived(&store, "");
        let [converted, ..] = image::kiln(&store, &layout);
        let _ = fs::remove_dir_all(&bundle);
        let reference = format!("{}:latest", layout.display());
        let unpacked = image::run("umoci", &["unpack", "--image", &reference, &bundle.display().to_string()]);
        subject.add(converted.time);
        yardstick.add(unpacked.time);
        peaks = [peaks[0].max(converted.peak), peaks[1].max(unpacked.peak)];
    }
    support::report("unpack", &subject, &[yardstick]);
    let [ours, theirs] = peaks.map(|peak| peak >> 10);
    support::note(&format!("peak memory: kiln {ours} MiB (joining included), umoci {theirs} MiB"));
    let _ = fs::remove_dir_all(&bundle);
    let _ = fs::remove_dir_all(&store);
}
