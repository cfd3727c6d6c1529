//! From a saved guest to the first byte that a command prints: kiln's snapshot, and QEMU's migration file.
//!
//! `cargo bench --bench restore`. Guests of 128 MiB with the same kernel, root image and agent; all were booted, and saved
//! once the agent answered. The files of the snapshot are in the page cache, but for the rounds that say otherwise.

mod support;

use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use kiln::ExecBuilder;
use kiln::Image;
use kiln::block::BlockBackend;
use kiln::block::ConcatBackend;
use kiln::exec;
use kiln::exec::AgentInfo;
use kiln::hv::soft::Soft;
use kiln::rootfs::RootImage;
use kiln::snapshot::Contents;
use kiln::snapshot::Origin;
use kiln::snapshot::Snapshot;
use kiln::units::Bytes;
use kiln::vmm::Machine;
use kiln::vmm::MachineConfig;
use kiln::vmm::boot::cpio;
use kiln_wire::boot::GuestConfig;
use tempfile::TempDir;

use crate::support::Sample;
use crate::support::cache;
use crate::support::qemu_restore::Memory;
use crate::support::qemu_restore::Saved;

const MEMORY: Bytes = Bytes::mib(128);
const WARM_UP: usize = 3;
const ROUNDS: usize = 100;
/// One round in so many is QEMU's too.
const QEMU_EVERY: usize = 10;
const COLD_ROUNDS: usize = 20;
const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() {
    let (kernel, agent) = (support::kernel(), support::agent());
    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    let root = kiln::rootfs::build(&image).await.expect("the image is sound");
    let baked = Baked::make(&kernel, &agent, &root).await;

    let folder = tempfile::tempdir_in(support::image::scratch()).expect("a folder");
    let disk = folder.path().join("root.erofs");
    root.write_to(&disk).await.expect("written");
    let memories = [Memory::Migrated, Memory::Mapped];
    let saved = memories.map(|memory| Saved::make(&kernel, &agent, &disk, memory));
    let mut yardsticks = ["qemu, migration file", "qemu, mapped memory"].map(Sample::new);
    for saved in &saved {
        support::note(&format!("QEMU's migration file: {} KiB", saved.size() >> 10));
        saved.restore(baked.agent).await;
    }

    let (mut resumed, mut answered) = (Sample::new("kiln, resumed"), Sample::new("kiln, first byte"));
    for round in 0..WARM_UP + ROUNDS {
        let times = baked.round().await;
        if round < WARM_UP {
            continue;
        }
        resumed.add(times.resumed);
        answered.add(times.answered);
        if round % QEMU_EVERY == 0 {
            for (saved, sample) in saved.iter().zip(&mut yardsticks) {
                sample.add(saved.restore(baked.agent).await.1);
            }
        }
    }
    support::report("restore to the first byte of an exec", &answered, &yardsticks);
    support::report_tail("restore", &[&resumed, &answered, &yardsticks[0], &yardsticks[1]]);

    let (mut resumed, mut answered) = (Sample::new("kiln, resumed"), Sample::new("kiln, first byte"));
    let mut warm = 0;
    for _ in 0..COLD_ROUNDS {
        warm += baked.files.iter().filter(|file| !cache::evict(file)).count();
        let times = baked.round().await;
        resumed.add(times.resumed);
        answered.add(times.answered);
    }
    support::report_tail("restore, files not in the page cache", &[&resumed, &answered]);
    support::note(&format!("files that stayed in the page cache: {warm} of {}", COLD_ROUNDS * baked.files.len()));
}

/// From the call.
struct Times {
    /// All is done that comes before the guest's first instruction.
    resumed: Duration,
    answered: Duration,
}

/// A snapshot of a guest whose agent answers.
struct Baked {
    folder: TempDir,
    root: RootImage,
    agent: AgentInfo,
    /// All that a restore reads.
    files: Vec<PathBuf>,
}

impl Baked {
    async fn make(kernel: &Path, agent: &Path, root: &RootImage) -> Self {
        let folder = tempfile::tempdir_in(support::image::scratch()).expect("a folder");
        let guest = GuestConfig { overlay_size_bytes: Bytes::mib(64).0, ..GuestConfig::default() };
        let config = MachineConfig {
            memory: MEMORY,
            kernel: File::open(kernel).expect("the kernel is built"),
            initramfs: cpio::initramfs(&fs::read(agent).expect("the agent is built"), &guest.to_json()),
            disks: disks(root),
            verbose_boot: false,
            extra_cmdline: String::new(),
        };
        let mut machine = Machine::start(&Soft::new(), config).expect("starts");
        let info = exec::wait_ready(machine.connector(), DEADLINE).await.expect("boots");
        machine.pause().await.expect("pauses");
        let (state, memory) = (machine.save().await.expect("saves"), machine.memory());
        let contents = Contents { state: &state, memory, origin: &Origin::default(), since: None };
        let target = folder.path().join("snapshot");
        Snapshot::write(&target, &contents).expect("writes");
        let names = ["snapshot.json", "memory", "memory.sha256"];
        let files = names.iter().map(|name| target.join(name)).chain(root.files().iter().cloned()).collect();
        Self { folder, root: root.clone(), agent: info, files }
    }

    /// Restores, runs `/bin/echo x`, and waits until all of the guest is gone.
    async fn round(&self) -> Times {
        let started = Instant::now();
        let snapshot = Snapshot::open(&self.folder.path().join("snapshot")).expect("opens");
        let mut machine = snapshot.restore(&Soft::new(), &disks(&self.root)).await.expect("restores");
        machine.resume();
        let resumed = started.elapsed();
        let exec = ExecBuilder::over(Arc::new(machine.connector().clone())).agent(self.agent);
        support::first_byte(exec).await;
        let answered = started.elapsed();
        machine.stop();
        machine.ended().await;
        Times { resumed, answered }
    }
}

fn disks(root: &RootImage) -> Vec<Arc<dyn BlockBackend>> {
    vec![Arc::new(ConcatBackend::open(root.files()).expect("the root image"))]
}
