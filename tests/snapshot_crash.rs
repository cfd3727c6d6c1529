//! Processes that bake, keep, restore and collect snapshots: killed at any instant, and several at the same time.
//!
//! The processes are this program again, which finds in its environment what to do. They say on their standard output how
//! far they are.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs;
use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;

use futures::StreamExt;
use guest::DEADLINE;
use guest::busybox_layer;
use guest::sh;
use image_support::Layout;
use kiln::Image;
use kiln::PullPolicy;
use kiln::Vm;
use kiln::VmConfig;
use kiln::image::Collected;
use kiln::image::Digest;
use kiln::image::ImageStore;
use kiln::image::ImportOptions;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::snapshot::Snapshot;
use kiln::units::Bytes;
use tempfile::TempDir;

/// Tells a process what to do and where.
const JOB: &str = "KILN_SNAPSHOT_TEST_JOB";

/// Repeats a run that failed.
const SEED: &str = "KILN_SNAPSHOT_TEST_SEED";

/// Kills of processes that bake, that write one kind of snapshot, that restore, and that collect.
const BAKE_KILLS: u32 = 30;
const WRITE_KILLS: u32 = 30;
const RESTORE_KILLS: u32 = 20;
const COLLECT_KILLS: u32 = 20;

/// Useless snapshots that a collector finds.
const GARBAGE: usize = 40;

/// xorshift64*; a seed names a run.
struct Random(u64);

impl Random {
    fn open() -> (Self, u64) {
        let seed = match std::env::var(SEED) {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => getrandom::u64().unwrap() | 1,
        };
        (Self(seed), seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    /// The one thing here that time decides is when a process ends, which may be at any moment.
    fn sleep(&mut self, longest: Duration) -> Duration {
        let life = Duration::from_micros(self.below(longest.as_micros() as u64 + 1));
        std::thread::sleep(life);
        life
    }
}

#[allow(clippy::print_stdout, reason = "the other process waits for it")]
fn say(line: &str) {
    // What the test harness prints has no line of its own.
    println!("\n{line}");
}

/// How many of the kills met what they were meant for.
#[allow(clippy::print_stderr, reason = "a count that must be seen: the test proves as much as it says")]
fn print_counts(text: &str) {
    eprintln!("{text}");
}

fn config() -> VmConfig {
    guest::config().memory(Bytes::mib(64))
}

/// Where a test keeps a store, the layout to fill it from, and snapshots.
#[derive(Clone)]
struct Place(PathBuf);

impl Place {
    fn fill() -> (TempDir, Self) {
        let folder = image_support::scratch();
        let place = Self(folder.path().to_owned());
        let layout = Layout::of(&[busybox_layer()]);
        image_support::run("cp", &["-r", layout.folder.path().to_str().unwrap(), place.layout().to_str().unwrap()]);
        fs::create_dir(place.kept("")).unwrap();
        (folder, place)
    }

    fn layout(&self) -> PathBuf {
        self.0.join("layout")
    }

    fn kept(&self, name: &str) -> PathBuf {
        self.0.join("kept").join(name)
    }

    fn baked(&self) -> PathBuf {
        self.0.join("images/baked")
    }

    /// Opens the store and finds the image in it.
    async fn image(&self) -> Image {
        let store = ImageStore::open(self.0.join("images")).await.unwrap();
        store.import_path(self.layout(), &ImportOptions::new().name("image:1")).await.unwrap()
    }

    /// Folders of snapshots, and those that somebody was writing or removing.
    fn snapshots(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let entries = fs::read_dir(self.baked()).unwrap().map(|entry| entry.unwrap().path());
        entries.partition(|path| !path.file_name().unwrap().to_str().unwrap().starts_with(".tmp-"))
    }

    fn has_draft(folder: &Path) -> bool {
        let mut names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_str().unwrap().starts_with(".tmp-snapshot-"))
    }

    /// Snapshots that nobody needs: of an image that is not here, and older ones of the variant of `baked`.
    fn litter(&self, baked: &Path) {
        let name = baked.file_name().unwrap().to_str().unwrap();
        for n in 0..GARBAGE {
            let other = Digest::of(&n.to_le_bytes());
            let garbage = match n % 2 {
                0 => self.baked().join(name.replace(&name[..64], &other.hex())),
                _ => self.baked().join(format!("{}-{}", &name[..64 + 1 + 16], other.hex())),
            };
            // As a snapshot appears: whole.
            let draft = self.kept("litter");
            let _ = fs::remove_dir_all(&draft);
            fs::create_dir(&draft).unwrap();
            for file in fs::read_dir(baked).unwrap().map(|entry| entry.unwrap()) {
                // One that is replaced meanwhile loses its files.
                let _ = fs::hard_link(file.path(), draft.join(file.file_name()));
            }
            let manifest = draft.join("snapshot.json");
            let _ = fs::remove_file(&manifest);
            File::create(&manifest).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
            // Else it is there already, left by one that was killed.
            let _ = fs::rename(&draft, &garbage);
        }
    }
}

/// A process with a job, and what it has said so far.
struct Process {
    child: Child,
    lines: mpsc::Receiver<(Instant, String)>,
    said: Vec<String>,
}

impl Process {
    fn start(place: &Place, job: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_process_with_a_job", "--nocapture"]);
        command.env(JOB, format!("{job} {}", place.0.display()));
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = pipes.spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send((Instant::now(), line));
            }
        });
        Self { child, lines, said: Vec::new() }
    }

    /// Waits until it says `line`, and tells when.
    fn expect(&mut self, line: &str) -> Instant {
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok((at, said)) => {
                    let is_it = said == line;
                    self.said.push(said);
                    if is_it {
                        return at;
                    }
                }
                Err(error) => panic!("no {line:?}: {error}, only {:?}", self.said),
            }
        }
    }

    /// Lets it go on.
    fn tell(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    /// Kills it where it is; all that it said.
    fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), None, "it ended by itself: {:?}", self.rest());
        self.rest()
    }

    /// Waits for its end, which must be a good one; all that it said.
    fn finish(mut self) -> Vec<String> {
        let said = self.rest();
        assert!(self.child.wait().unwrap().success(), "{said:?}");
        said
    }

    fn rest(&mut self) -> Vec<String> {
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok((_, line)) => self.said.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => return std::mem::take(&mut self.said),
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("it goes on for ever: {:?}", self.said),
            }
        }
    }
}

fn count(said: &[String], wanted: &str) -> usize {
    said.iter().filter(|line| *line == wanted).count()
}

/// Not a test, unless this process has been started by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_with_a_job() {
    let Ok(job) = std::env::var(JOB) else { return };
    let (job, folder) = job.split_once(' ').unwrap();
    let place = Place(folder.into());
    let image = place.image().await;
    match job {
        "bake" => bake_on(&image).await,
        "once" => bake_once(&image).await,
        "keep" => keep_on(&place, &image).await,
        "diff" => diff_on(&place, &image).await,
        "restore" => restore_on(&image).await,
        "collect" => collect_on(&place, &image).await,
        other => panic!("{other}?"),
    }
}

/// A configuration that says how far its baking is, and when there is nothing more to say.
fn telling(config: VmConfig) -> (VmConfig, tokio::task::JoinHandle<()>) {
    let (progress, mut events) = Progress::channel();
    let teller = tokio::spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                ProgressEvent::Booting { .. } => say("booting"),
                ProgressEvent::WarmingUp { .. } => say("warming"),
                ProgressEvent::Saving { .. } => say("saving"),
                ProgressEvent::Baked { .. } => say("baked"),
                _ => {}
            }
        }
    });
    (config.progress(progress), teller)
}

async fn bake_on(image: &Image) {
    say("ready");
    loop {
        let (config, teller) = telling(config().bake(PullPolicy::Always));
        image.bake(config).await.unwrap();
        teller.await.unwrap();
    }
}

/// Bakes what is not baked, with a warm-up that ends when the process is told so, and uses it.
async fn bake_once(image: &Image) {
    let (config, teller) = telling(config().warmup("told", |_| async {
        let told = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()));
        told.await.map_err(Into::into).and_then(|read| read.map(drop).map_err(Into::into))
    }));
    say("ready");
    let vm = image.start(config).await.unwrap();
    assert_eq!(sh(&vm, "echo here").await, "here\n");
    teller.await.unwrap();
    say("done");
}

/// Keeps one guest again and again at one place, with a number in it that tells which time it was.
async fn keep_on(place: &Place, image: &Image) {
    let vm = image.start(config()).await.unwrap();
    for n in 0.. {
        sh(&vm, &format!("echo {n} > /tmp/n")).await;
        say(&format!("writing {n}"));
        vm.snapshot(place.kept("full")).await.unwrap();
        say(&format!("written {n}"));
    }
}

/// As [`keep_on`], but each time the difference of a new guest to the same snapshot.
async fn diff_on(place: &Place, image: &Image) {
    let base = Snapshot::open(&place.kept("base")).unwrap();
    for n in 0.. {
        let vm = image.restore(&base, config()).await.unwrap();
        sh(&vm, &format!("echo {n} > /tmp/n; cat /bin/busybox /bin/busybox > /tmp/more")).await;
        say(&format!("writing {n}"));
        vm.snapshot_diff(place.kept("diff")).await.unwrap();
        say(&format!("written {n}"));
    }
}

async fn restore_on(image: &Image) {
    say("ready");
    loop {
        say("restoring");
        let vm = image.start(config().bake(PullPolicy::Never)).await.unwrap();
        say("asking");
        assert_eq!(sh(&vm, "cat /proc/uptime > /tmp/up; wc -l < /tmp/up").await, "1\n");
    }
}

async fn collect_on(place: &Place, image: &Image) {
    image.bake(config()).await.unwrap();
    say("ready");
    loop {
        place.litter(&place.snapshots().0.into_iter().find(|path| !is_garbage(path)).unwrap());
        say("collecting");
        image.store().gc().await.unwrap();
        say("collected");
    }
}

/// Garbage has the digest of a number for an image or for a key.
fn is_garbage(folder: &Path) -> bool {
    let name = folder.file_name().unwrap().to_str().unwrap();
    (0..GARBAGE).any(|n| name.contains(&Digest::of(&n.to_le_bytes()).hex()))
}

async fn works(vm: &Vm) {
    assert_eq!(sh(vm, "echo works").await, "works\n");
}

/// The store opens, has swept what the killed left, holds a whole snapshot, and that serves.
async fn check_baked(place: &Place) {
    let image = place.image().await;
    let (whole, drafts) = place.snapshots();
    assert_eq!((whole.len(), drafts), (1, Vec::new()));
    let place = whole[0].clone();
    tokio::task::spawn_blocking(move || Snapshot::open(&place).unwrap().verify().unwrap()).await.unwrap();
    works(&image.start(config().bake(PullPolicy::Never)).await.unwrap()).await;
}

/// Nothing is there that nobody needs, and what is there is not collected.
async fn check_collected(place: &Place) {
    let image = place.image().await;
    image.store().gc().await.unwrap();
    assert_eq!(image.store().gc().await.unwrap(), Collected::default());
    check_baked(place).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bake_that_is_killed_leaves_the_old_snapshot_or_the_new() {
    let (mut random, seed) = Random::open();
    let (_folder, place) = Place::fill();
    // How long a process takes until it writes, and to write.
    let mut first = Process::start(&place, "bake");
    let [booting, saving, baked] = ["booting", "saving", "baked"].map(|line| first.expect(line));
    let (boot, write) = (saving - booting, baked - saving);
    first.kill();
    check_baked(&place).await;
    let (mut while_booting, mut while_writing) = (0, 0);
    for kill in 0..BAKE_KILLS {
        let mut process = Process::start(&place, "bake");
        // A second one, which collects and is killed as well.
        let mut collector = kill.is_multiple_of(3).then(|| Process::start(&place, "collect"));
        let life = if kill.is_multiple_of(4) {
            process.expect("booting");
            random.sleep(boot)
        } else {
            process.expect("saving");
            random.sleep(write)
        };
        if let Some(collector) = collector.take() {
            collector.kill();
        }
        let said = process.kill();
        while_booting += usize::from(said.iter().rfind(|line| !line.is_empty()).is_some_and(|line| line == "booting"));
        while_writing += usize::from(Place::has_draft(&place.baked()));
        let context = format!("{SEED}={seed}, kill {kill}, {life:?} after {said:?}");
        let check = async {
            place.image().await.store().gc().await.unwrap();
            check_baked(&place).await;
        };
        in_context(&context, check).await;
    }
    print_counts(&format!("of {BAKE_KILLS}: {while_booting} booting, {while_writing} writing"));
    assert!(while_booting >= 2 && while_writing >= 5, "{SEED}={seed}: {while_booting} {while_writing}");
    check_collected(&place).await;
}

/// Panics with `context` when `check` does.
async fn in_context(context: &str, check: impl Future<Output = ()>) {
    use futures::FutureExt;
    if std::panic::AssertUnwindSafe(check).catch_unwind().await.is_err() {
        panic!("{context}");
    }
}

/// Kills processes that write a guest over an older one; what is there afterwards is that of before or the new one.
async fn kill_writers(job: &str, place: &Place, image: &Image, base: Option<&Snapshot>) {
    let (mut random, seed) = Random::open();
    let target = place.kept(if base.is_some() { "diff" } else { "full" });
    let (mut while_writing, mut old, mut new) = (0, 0, 0);
    let mut longest = Duration::ZERO;
    for kill in 0..WRITE_KILLS {
        let mut process = Process::start(place, job);
        let (begun, ended) = (process.expect("writing 0"), process.expect("written 0"));
        longest = longest.max(ended - begun);
        process.expect("writing 1");
        let life = random.sleep(longest);
        let said = process.kill();
        while_writing += usize::from(Place::has_draft(&place.kept("")));
        let context = format!("{SEED}={seed}, kill {kill} of {job}, {life:?} after {said:?}");
        let number = |what: &str| said.iter().filter_map(|line| line.strip_prefix(what)?.parse::<u32>().ok()).max();
        let (writing, written) = (number("writing ").unwrap(), number("written ").unwrap());
        let check = async {
            let (target, base) = (target.clone(), base.cloned());
            let open = move || {
                let found = match &base {
                    None => Snapshot::open(&target),
                    Some(base) => Snapshot::open_on(&target, base),
                };
                let found = found.unwrap();
                found.verify().unwrap();
                found
            };
            let found = tokio::task::spawn_blocking(open).await.unwrap();
            let vm = image.restore(&found, config()).await.unwrap();
            let there: u32 = sh(&vm, "cat /tmp/n").await.trim().parse().unwrap();
            assert!((written..=writing).contains(&there), "{there} is neither {written} nor {writing}");
            old += u32::from(there == written && writing > written);
            new += u32::from(there == writing);
        };
        in_context(&context, check).await;
    }
    print_counts(&format!("{job}, of {WRITE_KILLS}: {while_writing} writing; {old} old, {new} new"));
    assert!(while_writing >= 5 && old >= 1, "{SEED}={seed}: {while_writing} {old}");
    // The next writer removes what the killed left.
    let vm = image.start(config()).await.unwrap();
    vm.snapshot(&target).await.unwrap();
    assert!(!Place::has_draft(&place.kept("")));
    works(&image.restore(&Snapshot::open(&target).unwrap(), config()).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_a_running_guest_that_is_cut_short_leaves_the_old_one_or_the_new() {
    let (_folder, place) = Place::fill();
    let image = place.image().await;
    image.bake(config()).await.unwrap();
    kill_writers("keep", &place, &image, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_difference_that_is_cut_short_leaves_the_old_one_or_the_new() {
    let (_folder, place) = Place::fill();
    let image = place.image().await;
    let base = image.start(config()).await.unwrap().snapshot(place.kept("base")).await.unwrap();
    kill_writers("diff", &place, &image, Some(&base)).await;
    base.verify().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_restore_leaves_the_snapshot_as_it_was() {
    let (mut random, seed) = Random::open();
    let (_folder, place) = Place::fill();
    let image = place.image().await;
    let baked = image.bake(config()).await.unwrap();
    let (mut restoring, mut asking) = (0, 0);
    for kill in 0..RESTORE_KILLS {
        let mut process = Process::start(&place, "restore");
        // At any time, or in the few milliseconds of a start.
        let longest = if kill.is_multiple_of(2) {
            process.expect("ready");
            60
        } else {
            process.expect("restoring");
            4
        };
        let life = random.sleep(Duration::from_millis(longest));
        let said = process.kill();
        match said.iter().rfind(|line| !line.is_empty()).map(String::as_str) {
            Some("restoring") => restoring += 1,
            Some("asking") => asking += 1,
            _ => {}
        }
        let context = format!("{SEED}={seed}, kill {kill}, {life:?} after {said:?}");
        in_context(&context, check_baked(&place)).await;
    }
    print_counts(&format!("of {RESTORE_KILLS}: {restoring} restoring, {asking} asking"));
    assert!(restoring >= 1 && asking >= 1, "{SEED}={seed}: {restoring} {asking}");
    assert_eq!(image.bake(config()).await.unwrap().snapshot().digest(), baked.snapshot().digest());
    check_collected(&place).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_collector_leaves_what_is_needed() {
    let (mut random, seed) = Random::open();
    let (_folder, place) = Place::fill();
    let image = place.image().await;
    let baked = image.bake(config()).await.unwrap();
    let mut collecting = 0;
    for kill in 0..COLLECT_KILLS {
        let mut process = Process::start(&place, "collect");
        let (begun, ended) = (process.expect("collecting"), process.expect("collected"));
        process.expect("collecting");
        let life = random.sleep(ended - begun);
        let said = process.kill();
        let left = place.snapshots().0.len() - 1;
        collecting += usize::from((1..GARBAGE).contains(&left));
        let context = format!("{SEED}={seed}, kill {kill}, {life:?} after {said:?}, {left} left");
        let check = async {
            assert_eq!(image.store().gc().await.unwrap().baked, left as u64);
            check_baked(&place).await;
        };
        in_context(&context, check).await;
    }
    print_counts(&format!("of {COLLECT_KILLS}: {collecting} in the middle"));
    assert!(collecting >= 3, "{SEED}={seed}: {collecting}");
    assert_eq!(image.bake(config()).await.unwrap().snapshot().digest(), baked.snapshot().digest());
    check_collected(&place).await;
}

#[test]
fn processes_that_want_the_same_bake_it_once() {
    let (_folder, place) = Place::fill();
    let mut one = Process::start(&place, "once");
    one.expect("warming");
    let mut others: Vec<_> = (0..2).map(|_| Process::start(&place, "once")).collect();
    for other in &mut others {
        other.expect("ready");
    }
    one.tell();
    let booted: usize = [one]
        .into_iter()
        .chain(others)
        .map(|process| (process.finish(), 1))
        .map(|(said, done)| {
            assert_eq!((count(&said, "baked"), count(&said, "done")), (1, done));
            count(&said, "booting")
        })
        .sum();
    assert_eq!(booted, 1);
}

#[test]
fn who_waits_for_a_bake_that_is_killed_takes_over() {
    let (_folder, place) = Place::fill();
    let mut one = Process::start(&place, "once");
    one.expect("warming");
    let mut others: Vec<_> = (0..2).map(|_| Process::start(&place, "once")).collect();
    for other in &mut others {
        other.expect("ready");
    }
    one.kill();
    // Whichever of them it is.
    others.iter_mut().for_each(Process::tell);
    let booted: usize = others.into_iter().map(|other| count(&other.finish(), "booting")).sum();
    assert_eq!(booted, 1);
    assert_eq!(place.snapshots().0.len(), 1);
}
