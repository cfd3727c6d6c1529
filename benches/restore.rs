//! From a saved guest to the first byte that a command prints: kiln's `Image::start` on a baked image, and QEMU's migration
//! file.
//!
//! `cargo bench --bench restore`. Guests of 128 MiB with the same kernel, root image and agent; all were booted, and saved
//! once the agent answered. The files of the snapshot are in the page cache, but for the rounds that say otherwise.

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use kiln::Image;
use kiln::VmConfig;
use kiln::block::BlockBackend;
use kiln::block::ConcatBackend;
use kiln::exec::AgentInfo;
use kiln::exec::probe;
use kiln::hv::soft::Soft;
use kiln::rootfs::RootImage;
use kiln::snapshot::Snapshot;
use kiln::units::Bytes;

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
    let subject = Subject::make(&image, &root).await;

    let folder = tempfile::tempdir_in(support::image::scratch()).expect("a folder");
    let disk = folder.path().join("root.erofs");
    root.write_to(&disk).await.expect("written");
    let memories = [Memory::Migrated, Memory::Mapped];
    let saved = memories.map(|memory| Saved::make(&kernel, &agent, &disk, memory));
    let mut yardsticks = ["qemu, migration file", "qemu, mapped memory"].map(Sample::new);
    for saved in &saved {
        support::note(&format!("QEMU's migration file: {} KiB", saved.size() >> 10));
        saved.restore(subject.agent).await;
    }

    let mut kiln = Times::new();
    for round in 0..WARM_UP + ROUNDS {
        let times = subject.round().await;
        if round < WARM_UP {
            continue;
        }
        kiln.add(times);
        if round % QEMU_EVERY == 0 {
            for (saved, sample) in saved.iter().zip(&mut yardsticks) {
                sample.add(saved.restore(subject.agent).await.1);
            }
        }
    }
    support::report("restore to the first byte of an exec", &kiln.answered, &yardsticks);
    support::report_tail("restore", &kiln.all().into_iter().chain(&yardsticks).collect::<Vec<_>>());

    let mut kiln = Times::new();
    let mut warm = 0;
    for _ in 0..COLD_ROUNDS {
        warm += subject.files.iter().filter(|file| !cache::evict(file)).count();
        let (started, answered) = subject.start().await;
        warm += subject.files.iter().filter(|file| !cache::evict(file)).count();
        kiln.add([subject.resume().await, started, answered]);
    }
    support::report_tail("restore, files not in the page cache", &kiln.all());
    support::note(&format!("files that stayed in the page cache: {warm} of {}", 2 * COLD_ROUNDS * subject.files.len()));
}

/// What is timed, each from the call.
struct Times {
    /// All is done that comes before the guest's first instruction.
    resumed: Sample,
    /// `Image::start` has returned: the guest's agent has answered.
    started: Sample,
    answered: Sample,
}

impl Times {
    fn new() -> Self {
        let [resumed, started, answered] = ["kiln, resumed", "kiln, started", "kiln, first byte"].map(Sample::new);
        Self { resumed, started, answered }
    }

    fn add(&mut self, [resumed, started, answered]: [Duration; 3]) {
        self.resumed.add(resumed);
        self.started.add(started);
        self.answered.add(answered);
    }

    fn all(&self) -> [&Sample; 3] {
        [&self.resumed, &self.started, &self.answered]
    }
}

/// A baked image.
struct Subject {
    image: Image,
    root: RootImage,
    snapshot: PathBuf,
    agent: AgentInfo,
    /// All that a restore reads.
    files: Vec<PathBuf>,
}

fn config() -> VmConfig {
    VmConfig::new().memory(MEMORY)
}

impl Subject {
    async fn make(image: &Image, root: &RootImage) -> Self {
        let baked = image.bake(config()).await.expect("bakes");
        let vm = baked.start().await.expect("restores");
        let agent = probe(&*vm.connector(), DEADLINE).await.expect("an answer");
        let snapshot = baked.snapshot().folder().to_owned();
        let names = ["snapshot.json", "memory", "memory.sha256"];
        let files = names.iter().map(|name| snapshot.join(name)).chain(root.files().iter().cloned()).collect();
        Self { image: image.clone(), root: root.clone(), snapshot, agent, files }
    }

    async fn round(&self) -> [Duration; 3] {
        let (started, answered) = self.start().await;
        [self.resume().await, started, answered]
    }

    /// The part of a start that comes before the guest's first instruction, by itself.
    async fn resume(&self) -> Duration {
        let began = Instant::now();
        let snapshot = Snapshot::open(&self.snapshot).expect("opens");
        let disk: Arc<dyn BlockBackend> = Arc::new(ConcatBackend::open(self.root.files()).expect("the root image"));
        let mut machine = snapshot.restore(&Soft::new(), &[disk]).await.expect("restores");
        machine.resume();
        let resumed = began.elapsed();
        machine.stop();
        machine.ended().await;
        resumed
    }

    /// Starts a guest, runs `/bin/echo x`, and waits until all of the guest is gone.
    async fn start(&self) -> (Duration, Duration) {
        let began = Instant::now();
        let vm = self.image.start(config()).await.expect("restores");
        let started = began.elapsed();
        support::first_byte(vm.exec_builder()).await;
        let answered = began.elapsed();
        vm.shutdown().await.expect("stops");
        (started, answered)
    }
}
