//! Keeping a running guest: how long it stands still, how long until it is on disk, and how much that is; in full, and the
//! difference to what it was restored from. The references are QEMU's migration to a file, and writing as many bytes.
//!
//! `cargo bench --bench snapshot`. A guest of 128 MiB with busybox, restored from its baked snapshot, that has written
//! nothing, 1 MB and 50 MB since. It stands still for a part of `Machine::freeze`, which is timed by itself on a guest of the
//! same history: the pause, and from the call to the return; `Vm::snapshot` and `snapshot_diff` are timed until they return, when all is synced.

mod support;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use kiln::GuestFiles;
use kiln::Image;
use kiln::VmConfig;
use kiln::block::BlockBackend;
use kiln::block::ConcatBackend;
use kiln::exec::wait_ready;
use kiln::hv::soft::Soft;
use kiln::rootfs::RootImage;
use kiln::units::Bytes;
use kiln::vm::Baked;

use crate::support::Sample;
use crate::support::qemu_restore::Memory;
use crate::support::qemu_restore::Saved;

const MEMORY: Bytes = Bytes::mib(128);
/// In MB.
const WRITTEN: [usize; 3] = [0, 1, 50];
const PAUSES: usize = 50;
const ROUNDS: usize = 5;
/// Each boots a guest of QEMU's.
const QEMU_ROUNDS: usize = 3;
const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() {
    let (kernel, agent) = (support::kernel(), support::agent());
    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    let root = kiln::rootfs::build(&image).await.expect("the image is sound");
    let baked = image.bake(VmConfig::new().memory(MEMORY)).await.expect("bakes");
    let folder = tempfile::tempdir_in(support::image::scratch()).expect("a folder");
    support::note_load();

    let mut subject = Subject { baked, root, folder: folder.path(), content: Vec::new() };
    let mut unchanged = None;
    for megabytes in WRITTEN {
        subject.content.resize(megabytes * 1_000_000, 0);
        getrandom::fill(&mut subject.content).expect("the host has entropy");
        let title = format!("a guest that wrote {megabytes} MB");
        let [pause, call] = subject.pauses().await;
        support::report_tail(&format!("{title}, standing still"), &[&pause, &call]);
        let snapshot = subject.snapshots(&title).await;
        unchanged.get_or_insert((pause, snapshot));
    }
    let (pause, snapshot) = unchanged.expect("there is a guest");

    let disk = folder.path().join("root.erofs");
    subject.root.write_to(&disk).await.expect("written");
    let [mut qemu_pause, mut qemu_whole] = ["qemu, migrate"; 2].map(Sample::new);
    for _ in 0..QEMU_ROUNDS {
        let saved = Saved::make(&kernel, &agent, &disk, Memory::Migrated);
        qemu_pause.add(saved.cost().pause);
        qemu_whole.add(saved.cost().whole);
        support::note(&format!("QEMU's migration file: {} KiB", saved.size() >> 10));
    }
    support::report("standing still", &pause, &[qemu_pause]);
    support::report("a whole guest to a file (QEMU's is not synced)", &snapshot, &[qemu_whole]);
}

/// Guests that write `content` once they are restored.
struct Subject<'a> {
    baked: Baked,
    root: RootImage,
    folder: &'a Path,
    content: Vec<u8>,
}

impl Subject<'_> {
    /// How long a guest stands still each time, and how long all of it takes.
    async fn pauses(&self) -> [Sample; 2] {
        let disk: Arc<dyn BlockBackend> = Arc::new(ConcatBackend::open(self.root.files()).expect("the root image"));
        let mut machine = self.baked.snapshot().restore(&Soft::new(), &[disk]).await.expect("restores");
        machine.resume();
        let connector = Arc::new(machine.connector().clone());
        wait_ready(&*connector, DEADLINE).await.expect("an answer");
        self.write(GuestFiles::over(connector)).await;
        let mut samples = ["kiln, pause", "kiln, freeze"].map(Sample::new);
        for _ in 0..PAUSES {
            let began = Instant::now();
            let frozen = machine.freeze().await.expect("freezes");
            samples[1].add(began.elapsed());
            samples[0].add(frozen.paused());
        }
        machine.stop();
        machine.ended().await;
        samples
    }

    /// Reports on snapshots in full, whose times are returned, and on differences.
    async fn snapshots(&self, title: &str) -> Sample {
        let [mut full, mut diff] = ["kiln, snapshot", "kiln, snapshot_diff"].map(Sample::new);
        let [mut full_copy, mut diff_copy] = ["write and sync"; 2].map(Sample::new);
        let mut sizes = [Bytes(0); 2];
        for _ in 0..ROUNDS {
            let vm = self.baked.start().await.expect("restores");
            self.write(GuestFiles::over(vm.connector())).await;
            // The difference first, as it is to the last snapshot.
            let began = Instant::now();
            let kept = vm.snapshot_diff(self.folder.join("diff")).await.expect("kept");
            diff.add(began.elapsed());
            sizes[1] = kept.memory_on_disk().expect("a size");
            diff_copy.add(self.copy(sizes[1]));
            let began = Instant::now();
            let kept = vm.snapshot(self.folder.join("full")).await.expect("kept");
            full.add(began.elapsed());
            sizes[0] = kept.memory_on_disk().expect("a size");
            full_copy.add(self.copy(sizes[0]));
            vm.shutdown().await.expect("stops");
        }
        let [full_size, diff_size] = sizes.map(|size| size.0 >> 10);
        support::report(&format!("{title}, in full, {full_size} KiB on disk"), &full, &[full_copy]);
        support::report(&format!("{title}, the difference, {diff_size} KiB on disk"), &diff, &[diff_copy]);
        full
    }

    async fn write(&self, files: GuestFiles) {
        if !self.content.is_empty() {
            files.write("/tmp/written", &self.content).await.expect("there is room");
        }
    }

    /// Writes so many bytes to a new file and syncs it.
    fn copy(&self, size: Bytes) -> Duration {
        let bytes = vec![1; size.0 as usize];
        let began = Instant::now();
        let mut file = File::create(self.folder.join("copy")).expect("created");
        file.write_all(&bytes).and_then(|()| file.sync_all()).expect("written");
        began.elapsed()
    }
}
