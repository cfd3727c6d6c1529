//! An image's root filesystem: joined from converted layers, and from nothing; against `umoci unpack` and `mkfs.erofs`.
//!
//! `cargo bench --bench rootfs`, as root. Each round is a process of its own. What kiln writes is synced.

mod support;

use std::fs;

use crate::support::Sample;
use crate::support::image;

const ROUNDS: usize = 3;

fn main() {
    image::run_if_child();
    let (layout, folder) = (image::layout(), image::scratch());
    let (store, bundle) = (folder.join("rootfs-store"), folder.join("rootfs-bundle"));
    image::kiln(&store, &layout);

    let mut cold = Sample::new("kiln, whole");
    let mut join = Sample::new("kiln, joined");
    let mut both = Sample::new("umoci, mkfs.erofs");
    let mut mkfs = Sample::new("mkfs.erofs");
    let mut peaks = [0; 3];
    for _ in 0..ROUNDS {
        image::remove_derived(&store, "");
        let [.., whole] = image::kiln(&store, &layout);
        image::remove_derived(&store, ".erofs");
        let [.., joined] = image::kiln(&store, &layout);
        let _ = fs::remove_dir_all(&bundle);
        let reference = format!("{}:latest", layout.display());
        let unpacked = image::run("umoci", &["unpack", "--image", &reference, &bundle.display().to_string()]);
        let (file, tree) = (bundle.join("root.erofs"), bundle.join("rootfs"));
        let made = image::run("mkfs.erofs", &["--quiet", &file.display().to_string(), &tree.display().to_string()]);
        cold.add(whole.time);
        join.add(joined.time);
        both.add(unpacked.time + made.time);
        mkfs.add(made.time);
        let theirs = unpacked.peak.max(made.peak);
        peaks = [peaks[0].max(whole.peak), peaks[1].max(joined.peak), peaks[2].max(theirs)];
    }
    support::report("rootfs, nothing converted", &cold, &[both]);
    support::report("rootfs, layers converted", &join, &[mkfs]);
    let [whole, joined, theirs] = peaks.map(|peak| peak >> 10);
    support::note(&format!(
        "peak memory: kiln {whole} MiB, joining alone {joined} MiB, umoci or mkfs.erofs {theirs} MiB"
    ));
    let _ = fs::remove_dir_all(&bundle);
    let _ = fs::remove_dir_all(&store);
}
