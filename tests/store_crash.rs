//! Processes that share a store: killed at any instant, and all at the same time.
//!
//! The processes are this program again, which finds in its environment what to do. All work on one store, and pull from one registry.

mod image_support;

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use image_support::LayerBlob;
use image_support::Layout;
use image_support::Tar;
use image_support::flat;
use image_support::registry::Registry;
use kiln::image::Collected;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageStore;
use kiln::image::ImportOptions;
use kiln::image::PullError;
use kiln::image::PullPolicy;

/// Tells a process what to do, with which seed, from which registry, and where.
const JOB: &str = "KILN_STORE_TEST_JOB";

/// Repeats a run that failed.
const SEED: &str = "KILN_STORE_TEST_SEED";

const IMAGES: usize = 4;

/// Of each kind of operation.
const KILLS: u32 = 40;

/// Longest time that a process gets before it is killed: several turns of its loop.
const LONGEST_LIFE: Duration = Duration::from_millis(40);

#[derive(Clone, Copy, Debug)]
enum Operation {
    Pull,
    Archive,
    Layout,
    Build,
    Collect,
}

const OPERATIONS: [Operation; 5] =
    [Operation::Pull, Operation::Archive, Operation::Layout, Operation::Build, Operation::Collect];

/// xorshift64*; a seed names a run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

/// Where a test keeps a store, and the layouts, archives and the registry to fill it from.
#[derive(Clone)]
struct Place {
    folder: PathBuf,
    registry: String,
}

impl Place {
    fn layout(&self, index: usize) -> PathBuf {
        self.folder.join(format!("layout-{index}"))
    }

    fn archive(&self, index: usize) -> PathBuf {
        self.folder.join(format!("archive-{index}"))
    }

    async fn store(&self) -> ImageStore {
        ImageStore::open(self.folder.join("images")).await.unwrap()
    }

    /// Images that share some layers; half of the layers are too long to be held in memory.
    fn fill(folder: &Path) -> (Self, Registry) {
        let registry = Registry::open();
        let place = Self { folder: folder.to_owned(), registry: registry.address.clone() };
        let bytes = |seed: usize, length: usize| -> Vec<u8> {
            let mut random = Random(seed as u64 + 1);
            (0..length).map(|_| random.below(256) as u8).collect()
        };
        for index in 0..IMAGES {
            let shared = Tar::new().folder("d/").file("d/shared", &bytes(100 + index / 2, 1_000_000)).finish();
            let own = Tar::new().file("own", &bytes(index, 300 + 600_000 * index)).file("small", b"x").finish();
            let layout = Layout::of(&[LayerBlob::gzip(&shared), LayerBlob::plain(own)]);
            let (from, archive) = (layout.folder.path().display().to_string(), place.archive(index));
            image_support::run("tar", &["-C", &from, "-cf", archive.to_str().unwrap(), "."]);
            image_support::run("cp", &["-r", &from, place.layout(index).to_str().unwrap()]);
            registry.push(layout.folder.path(), "latest", &format!("image:{index}"), &[]);
        }
        (place, registry)
    }
}

fn name(index: usize) -> String {
    format!("image:{index}")
}

/// One operation on the store. What it leaves if it is killed is what the tests are about.
async fn operate(place: &Place, store: &ImageStore, operation: Operation, random: &mut Random) -> Option<Image> {
    let index = random.below(IMAGES as u64) as usize;
    let options = ImportOptions::new().name(name(index));
    match operation {
        Operation::Pull => {
            let builder = Image::builder(format!("{}/image:{index}", place.registry)).store(store.clone());
            Some(builder.name(name(index)).pull().await.unwrap())
        }
        Operation::Archive => Some(store.import_archive(place.archive(index), &options).await.unwrap()),
        Operation::Layout => Some(store.import_path(place.layout(index), &options).await.unwrap()),
        Operation::Build => {
            let image = store.import_path(place.layout(index), &options).await.unwrap();
            kiln::rootfs::build(&image).await.unwrap();
            Some(image)
        }
        Operation::Collect => {
            store.remove(&name(index).parse().unwrap()).await.unwrap();
            store.gc().await.unwrap();
            None
        }
    }
}

/// Leaves nothing in the store.
async fn clear(store: &ImageStore) {
    for listed in store.images().await.unwrap() {
        store.remove_image(&listed.digest).await.unwrap();
    }
    store.gc().await.unwrap();
}

/// Starts this program for a job: an operation to repeat, or a number of rounds of all.
fn start(place: &Place, job: &str, seed: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_process_with_a_job", "--nocapture"]);
    command.env(JOB, format!("{job} {seed} {} {}", place.registry, place.folder.display()));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Not a test, unless this process has been started by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_with_a_job() {
    let Ok(job) = std::env::var(JOB) else { return };
    let [job, seed, registry, folder] = job.splitn(4, ' ').collect::<Vec<_>>().try_into().unwrap();
    let place = Place { folder: folder.into(), registry: registry.to_owned() };
    let mut random = Random(seed.parse().unwrap());
    let store = place.store().await;
    // What a process does once, compiling the grammar of references above all, takes longer than it is given to live.
    operate(&place, &store, Operation::Build, &mut random).await;
    #[allow(clippy::print_stdout, reason = "the other process waits for it")]
    {
        println!("\nready");
    }
    if let Some(operation) = OPERATIONS.iter().find(|operation| format!("{operation:?}") == job) {
        loop {
            if matches!(operation, Operation::Collect) {
                operate(&place, &store, Operation::Layout, &mut random).await;
            } else {
                // What is there already would only be found.
                clear(&store).await;
            }
            operate(&place, &store, *operation, &mut random).await;
        }
    }
    for _ in 0..job.parse().unwrap() {
        round(&place, &store, &mut random).await;
    }
}

fn await_ready(child: &mut Child) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"), "the process ended");
}

fn seed() -> u64 {
    if let Ok(seed) = std::env::var(SEED) {
        return seed.parse().unwrap();
    }
    getrandom::u64().unwrap() | 1
}

#[tokio::test]
async fn a_store_survives_kills_at_any_instant() {
    let seed = seed();
    let folder = image_support::scratch();
    let (place, _registry) = Place::fill(folder.path());
    let expected = expected_roots(&place).await;
    let (mut random, mut half_done) = (Random(seed), [0; OPERATIONS.len()]);
    for kill in 0..KILLS {
        for (number, operation) in OPERATIONS.into_iter().enumerate() {
            let mut child = start(&place, &format!("{operation:?}"), random.below(u64::MAX) + 1);
            await_ready(&mut child);
            let life = Duration::from_micros(random.below(LONGEST_LIFE.as_micros() as u64));
            // The one thing here that time decides is when the process ends, which may be at any moment.
            std::thread::sleep(life);
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            let context = format!("{SEED}={seed}, kill {kill} of {operation:?} after {life:?}");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), None, "{context}: ended by itself: {said}");
            let half = if matches!(operation, Operation::Build) { "derived" } else { "blobs" };
            let left = debris(&place.folder.join("images"));
            half_done[number] += usize::from(left.iter().any(|file| file.starts_with(half)));
            let check = tokio::spawn(check(place.clone(), kill as usize % IMAGES, expected.clone()));
            check.await.unwrap_or_else(|error| panic!("{context}: {error}"));
        }
    }
    // Pulls and imports in the middle of a blob, builds in the middle of a layer or of the image: else nothing was tried.
    let [writers @ .., _collect] = half_done;
    assert!(writers.iter().all(|count| *count > 0), "{SEED}={seed}: killed while they wrote: {half_done:?}");
    print_counts(half_done);
}

/// How many of [`KILLS`] met each operation while it wrote.
#[allow(clippy::print_stderr, reason = "a count that must be seen: the test proves as much as it says")]
fn print_counts(half_done: [usize; OPERATIONS.len()]) {
    eprintln!("killed while they wrote, of {KILLS} each: {OPERATIONS:?} {half_done:?}");
}

/// The digests of the root filesystems, made where nobody was killed.
async fn expected_roots(place: &Place) -> Vec<Digest> {
    let folder = image_support::scratch();
    let store = ImageStore::open(folder.path().join("images")).await.unwrap();
    let mut roots = Vec::new();
    for index in 0..IMAGES {
        let image = store.import_oci_layout(place.layout(index), None).await.unwrap();
        roots.push(root_of(&image).await);
    }
    roots
}

/// The digest of the image's root filesystem as one file.
async fn root_of(image: &Image) -> Digest {
    let root = flat(image).await.unwrap();
    Digest::of(&fs::read(&root.path).unwrap())
}

/// The store opens, holds nothing half-written, and does its work.
async fn check(place: Place, index: usize, expected: Vec<Digest>) {
    let store = place.store().await;
    check_clean(&store);
    assert_eq!(store.verify().await.unwrap().removed, []);
    for listed in store.images().await.unwrap() {
        for reference in &listed.references {
            let builder = Image::builder(reference.clone()).store(store.clone()).policy(PullPolicy::Never);
            match builder.pull().await {
                Ok(image) => assert_eq!(*image.digest(), listed.digest),
                Err(PullError::UnknownImage { .. }) => panic!("{reference} is there in part"),
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    // What is there is taken, or made again; either way it is what it would have been.
    for index in [index, (index + 1) % IMAGES] {
        let image = store.import_oci_layout(place.layout(index), None).await.unwrap();
        assert_eq!(root_of(&image).await, expected[index]);
    }
    store.gc().await.unwrap();
    assert_eq!(store.gc().await.unwrap(), Collected::default());
}

/// Opening has swept what the killed left.
fn check_clean(store: &ImageStore) {
    assert_eq!(debris(store.root()), [""; 0]);
}

/// What is in the store's folders under no final name.
fn debris(root: &Path) -> Vec<String> {
    let folders = ["blobs/sha256", "derived", "references", "leases", "claims"];
    let files = folders.into_iter().flat_map(|folder| {
        let files = fs::read_dir(root.join(folder)).unwrap();
        files.map(move |file| format!("{folder}/{}", file.unwrap().file_name().display()))
    });
    files.filter(|file| file.contains("/.tmp-")).collect()
}

const PROCESSES: u64 = 4;
const ROUNDS: u32 = 40;

/// One turn of a process among others: what it was given works, whatever they remove.
async fn round(place: &Place, store: &ImageStore, random: &mut Random) {
    let operation = OPERATIONS[random.below(OPERATIONS.len() as u64) as usize];
    let Some(image) = operate(place, store, operation, random).await else { return };
    // Some turns in which others remove and collect.
    for _ in 0..random.below(3) {
        operate(place, store, Operation::Collect, random).await;
    }
    for layer in image.layers() {
        let blob = fs::read(store.root().join("blobs/sha256").join(layer.digest().hex())).unwrap();
        assert_eq!(Digest::of(&blob), *layer.digest());
    }
    let root = kiln::rootfs::build(&image).await.unwrap();
    assert!(root.files().iter().all(|file| file.exists()));
}

#[tokio::test]
async fn processes_import_build_remove_and_collect_at_the_same_time() {
    let seed = seed();
    let folder = image_support::scratch();
    let (place, _registry) = Place::fill(folder.path());
    let start_one = |process| start(&place, &ROUNDS.to_string(), seed.wrapping_add(process) | 1);
    let children: Vec<_> = (0..PROCESSES).map(start_one).collect();
    let deadline = Instant::now() + Duration::from_secs(120);
    for (process, child) in children.into_iter().enumerate() {
        let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
        let output = tokio::time::timeout_at(deadline.into(), output).await.expect("in time").unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{SEED}={seed}, process {process}: {}\n{said}", output.status);
    }
    let store = place.store().await;
    check_clean(&store);
    assert_eq!(store.verify().await.unwrap().removed, []);
    for listed in store.images().await.unwrap() {
        store.remove_image(&listed.digest).await.unwrap();
    }
    store.gc().await.unwrap();
    assert_eq!(blobs(store.root()), 0);
}

fn blobs(root: &Path) -> usize {
    fs::read_dir(root.join("blobs/sha256")).unwrap().count()
}
