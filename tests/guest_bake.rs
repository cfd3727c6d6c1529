//! Baking an image: once for everything that shapes a guest, anew when some of it changes, and never half.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::Weak;
use std::time::Duration;
use std::time::Instant;

use futures::StreamExt;
use futures::future::join_all;
use guest::DEADLINE;
use guest::busybox_image;
use guest::busybox_layer;
use guest::sh;
use image_support::LayerBlob;
use image_support::Layout;
use image_support::Tar;
use kiln::Image;
use kiln::PullPolicy;
use kiln::StartError;
use kiln::Vm;
use kiln::VmConfig;
use kiln::image::Digest;
use kiln::image::ImageStore;
use kiln::image::ImportOptions;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::image::StoreError;
use kiln::units::Bytes;
use kiln::vm::Agent;
use kiln::vm::Assets;
use kiln::vm::Baked;
use serde_json::json;

fn config() -> VmConfig {
    guest::config().memory(Bytes::mib(64))
}

/// Bakes, and counts the guests that were booted for it.
async fn bake(image: &Image, config: VmConfig) -> (Result<Baked, StartError>, usize) {
    let (progress, events) = Progress::channel();
    let baked = image.bake(config.progress(progress)).await;
    (baked, booted(events).await)
}

/// As [`bake`], of a start.
async fn start(image: &Image, config: VmConfig) -> (Result<Vm, StartError>, usize) {
    let (progress, events) = Progress::channel();
    let vm = image.start(config.progress(progress)).await;
    (vm, booted(events).await)
}

/// How often a guest was booted up to now: what comes later belongs to others.
async fn booted(mut events: kiln::image::ProgressEvents) -> usize {
    let mut count = 0;
    while let Some(Some(event)) = futures::FutureExt::now_or_never(events.next()) {
        count += usize::from(matches!(event, ProgressEvent::Booting { .. }));
    }
    count
}

/// Starts a guest, which must work, and counts the boots that it took.
async fn boots(image: &Image, config: VmConfig) -> usize {
    let (vm, count) = start(image, config).await;
    works(&vm.unwrap_or_else(|error| panic!("{error:?}"))).await;
    count
}

async fn works(vm: &Vm) {
    assert_eq!(sh(vm, "echo works").await, "works\n");
}

/// What lies where the baked snapshots are.
fn baked(image: &Image) -> Vec<PathBuf> {
    entries(&image.store().root().join("baked"))
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect()
}

/// An agent of the test's own, to be changed.
fn agent_in(folder: &Path) -> PathBuf {
    let path = folder.join("agent");
    fs::copy(Assets::user().expect("a home folder").agent(), &path).expect("the agent is built");
    append(&path);
    path
}

/// Content after the end of an executable is nothing to it.
fn append(path: &Path) {
    let mut bytes = fs::read(path).expect("reads");
    bytes.push(0);
    fs::write(path, bytes).expect("writes");
}

/// A warm-up that succeeds.
fn warm(config: VmConfig, tag: &str) -> VmConfig {
    config.warmup(tag, |_| async { Ok(()) })
}

#[tokio::test]
async fn the_first_start_bakes_and_the_next_restores() {
    let (_place, image) = busybox_image(json!({})).await;
    let (progress, events) = Progress::channel();
    let first = image.start(warm(config(), "none").progress(progress)).await.expect("starts");
    let events: Vec<_> = events.collect().await;
    let id = *image.digest();
    let expected = [
        ProgressEvent::Booting { image: id },
        ProgressEvent::WarmingUp { image: id },
        ProgressEvent::Saving { image: id },
        ProgressEvent::Baked { image: id },
    ];
    assert!(events.ends_with(&expected), "{events:?}");
    let (progress, events) = Progress::channel();
    let second = image.start(warm(config(), "none").progress(progress)).await.expect("starts");
    let events: Vec<_> = events.collect().await;
    assert!(events.ends_with(&expected[3..]) && !events.contains(&expected[0]), "{events:?}");
    for vm in [&first, &second] {
        works(vm).await;
    }
    let ids = join_all([&first, &second].map(|vm| sh(vm, "cat /etc/machine-id"))).await;
    assert_ne!(ids[0], ids[1]);
    assert_eq!(baked(&image).len(), 1);
}

#[tokio::test]
async fn starts_at_the_same_time_bake_once() {
    let (_place, image) = busybox_image(json!({})).await;
    for policy in [PullPolicy::Missing, PullPolicy::Always] {
        let counts = join_all((0..6).map(|_| boots(&image, config().bake(policy)))).await;
        assert_eq!(counts.iter().sum::<usize>(), 1, "{policy:?}: {counts:?}");
    }
}

#[tokio::test]
async fn whatever_shapes_a_guest_bakes_anew_and_the_rest_does_not() {
    let (place, image) = busybox_image(json!({})).await;
    let agent = agent_in(place.folder.path());
    let with_agent = || config().agent(Agent::Path(agent.clone()));
    let id = "00112233445566778899aabbccddeeff";
    for (what, config, expected) in [
        ("the first", config(), 1),
        ("the same", config(), 0),
        ("name and id", config().hostname("other").machine_id(id), 0),
        ("timeouts", config().boot_timeout(DEADLINE).warmup_timeout(DEADLINE), 0),
        ("memory", config().memory(Bytes::mib(68)), 1),
        ("a warm-up", warm(config(), "one"), 1),
        ("the same warm-up", warm(config(), "one"), 0),
        ("another warm-up", warm(config(), "two"), 1),
        ("what name resolution is told", config().resolv_conf("nameserver 192.0.2.1\n"), 1),
        ("an agent", with_agent(), 1),
        ("the same agent", with_agent(), 0),
        ("the first again", config(), 0),
    ] {
        assert_eq!(boots(&image, config).await, expected, "{what}");
    }
    append(&agent);
    let (none, _) = start(&image, with_agent().bake(PullPolicy::Never)).await;
    assert!(matches!(none, Err(StartError::NotBaked { .. })), "the old agent is served: {none:?}");
    assert_eq!(boots(&image, with_agent()).await, 1);
}

#[tokio::test]
async fn the_policy_says_when_to_bake() {
    let (_place, image) = busybox_image(json!({})).await;
    let (never, booted) = start(&image, config().bake(PullPolicy::Never)).await;
    assert!(matches!(&never, Err(StartError::NotBaked { image: of }) if of == image.digest()), "{never:?}");
    assert_eq!((booted, baked(&image).len()), (0, 0));
    let digest = |baked: Result<Baked, StartError>| baked.expect("bakes").snapshot().digest().to_owned();
    let (first, booted) = bake(&image, config()).await;
    assert_eq!(booted, 1);
    let old = first.expect("bakes");
    let (second, booted) = bake(&image, config().bake(PullPolicy::Always)).await;
    assert_eq!(booted, 1);
    let second = digest(second);
    assert_ne!(second, old.snapshot().digest());
    let (third, booted) = bake(&image, config().bake(PullPolicy::Never)).await;
    assert_eq!((digest(third), booted), (second, 0));
    // Who has the old one goes on with it.
    works(&old.start().await.expect("starts")).await;
    old.snapshot().verify().expect("undamaged");
    assert_eq!(baked(&image).len(), 1);
}

#[tokio::test]
async fn a_damaged_snapshot_is_baked_anew() {
    let (_place, image) = busybox_image(json!({})).await;
    assert_eq!(boots(&image, config()).await, 1);
    let place = baked(&image).remove(0);
    let open = |name: &str| OpenOptions::new().read(true).write(true).open(place.join(name)).expect("opens");
    // Another file, because cutting one short ends whoever has it mapped, as a guest that is on its way out has.
    let cut = || {
        fs::remove_file(place.join("memory")).expect("removes");
        fs::write(place.join("memory"), [0; 4096]).expect("writes");
    };
    let flip = || {
        let (file, mut byte) = (open("snapshot.json"), [0]);
        let middle = file.metadata().expect("its size").len() / 2;
        file.read_exact_at(&mut byte, middle).expect("reads");
        file.write_all_at(&[byte[0] ^ 1], middle).expect("writes");
    };
    let empty = || open("snapshot.json").set_len(0).expect("cuts");
    let lose = |name: &'static str| {
        let path = place.join(name);
        move || fs::remove_file(&path).expect("removes")
    };
    let hollow = || {
        fs::remove_dir_all(&place).expect("removes");
        fs::create_dir(&place).expect("creates");
    };
    let damages: [(&str, &dyn Fn()); 7] = [
        ("cut memory", &cut),
        ("a flipped bit", &flip),
        ("an empty manifest", &empty),
        ("no memory", &lose("memory")),
        ("no digests", &lose("memory.sha256")),
        ("no manifest", &lose("snapshot.json")),
        ("nothing", &hollow),
    ];
    for (what, damage) in damages {
        damage();
        let (never, _) = start(&image, config().bake(PullPolicy::Never)).await;
        assert!(matches!(never, Err(StartError::NotBaked { .. })), "{what}: {never:?}");
        assert_eq!(boots(&image, config()).await, 1, "{what}");
        assert_eq!(boots(&image, config()).await, 0, "{what}");
        assert_eq!(baked(&image), std::slice::from_ref(&place), "{what}");
    }
}

/// A configuration whose warm-up leaves its guest's address, so that a test can tell whether the guest is gone.
fn watched<R>(tag: &str, end: impl Fn(Arc<Vm>) -> R + Send + Sync + 'static) -> (VmConfig, Arc<Mutex<Weak<Vm>>>)
where
    R: Future<Output = kiln::vm::WarmupResult> + Send + 'static,
{
    let seen = Arc::new(Mutex::new(Weak::new()));
    let there = Arc::clone(&seen);
    let config = config().warmup(tag, move |vm| {
        *there.lock().expect("not poisoned") = Arc::downgrade(&vm);
        end(vm)
    });
    (config, seen)
}

fn is_gone(seen: &Mutex<Weak<Vm>>) -> bool {
    let seen = seen.lock().expect("not poisoned");
    !seen.ptr_eq(&Weak::new()) && seen.strong_count() == 0
}

#[tokio::test]
async fn a_warm_up_that_fails_is_an_error_and_leaves_nothing() {
    let (_place, image) = busybox_image(json!({})).await;
    let (failing, seen) = watched("bad", |vm| async move {
        works(&vm).await;
        Err("no luck".into())
    });
    let error = image.start(failing).await.expect_err("it fails");
    let StartError::Warmup { tag, source } = &error else { panic!("{error:?}") };
    assert_eq!((tag.as_str(), source.to_string().as_str()), ("bad", "no luck"));
    assert!(is_gone(&seen));
    assert_eq!(baked(&image), [""; 0].map(PathBuf::from));
    // Nor is anybody kept from doing better.
    assert_eq!(boots(&image, warm(config(), "bad")).await, 1);
}

#[tokio::test]
async fn a_warm_up_without_an_end_is_cut_off() {
    let (_place, image) = busybox_image(json!({})).await;
    let (endless, seen) = watched("endless", |vm| async move {
        vm.exec_builder().argv(["sleep", "100000"]).output().await?;
        Ok(())
    });
    let began = Instant::now();
    let error = image.start(endless.warmup_timeout(Duration::from_millis(300))).await.expect_err("it has no end");
    assert!(matches!(&error, StartError::Warmup { tag, .. } if tag == "endless"), "{error:?}");
    assert!(began.elapsed() < DEADLINE);
    assert!(is_gone(&seen));
    assert_eq!(baked(&image), [""; 0].map(PathBuf::from));
}

#[tokio::test]
async fn a_bake_that_is_dropped_leaves_nothing_and_gives_up_its_claim() {
    let (_place, image) = busybox_image(json!({})).await;
    let (sender, mut warming) = tokio::sync::mpsc::unbounded_channel();
    let (endless, seen) = watched("one", move |_| {
        sender.send(()).expect("somebody waits");
        std::future::pending()
    });
    tokio::select! {
        never = image.bake(endless) => panic!("{never:?}"),
        began = warming.recv() => began.expect("begins"),
    }
    assert!(is_gone(&seen));
    assert_eq!(baked(&image), [""; 0].map(PathBuf::from));
    assert_eq!(boots(&image, warm(config(), "one")).await, 1);
}

#[tokio::test]
async fn what_a_warm_up_did_is_there_in_each_guest_and_goes_on() {
    let (_place, image) = busybox_image(json!({})).await;
    let config = config().warmup("counter", |vm| async move {
        let counter = "(i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; done) \
            </dev/null >/dev/null 2>&1 & echo $! > /tmp/pid; until [ -s /tmp/count ]; do :; done; echo made > /tmp/made";
        let out = vm.exec_builder().argv(["sh", "-c", counter]).output().await?;
        if out.success() { Ok(()) } else { Err(format!("{out:?}").into()) }
    });
    let (one, other) = (image.start(config.clone()).await.expect("starts"), image.start(config).await.expect("starts"));
    for vm in [&one, &other] {
        assert_eq!(sh(vm, "cat /tmp/made; kill -0 $(cat /tmp/pid)").await, "made\n");
        let on = "from=$(cat /tmp/count); until [ $(cat /tmp/count) -gt $from ]; do :; done; echo on";
        assert_eq!(sh(vm, on).await, "on\n");
        // Of one guest this is nothing to the other.
        sh(vm, "rm /tmp/made; kill $(cat /tmp/pid)").await;
    }
}

#[tokio::test]
async fn a_collection_removes_the_snapshots_that_nobody_needs() {
    let folder = image_support::scratch();
    let store = ImageStore::open(folder.path().join("images")).await.expect("opens");
    let import = async |layers: &[LayerBlob], options: ImportOptions| {
        let layout = Layout::of(layers);
        store.import_path(layout.folder.path(), &options).await.expect("imports")
    };
    let more = LayerBlob::plain(Tar::new().file("more", b"more").finish());
    let named = import(&[busybox_layer()], ImportOptions::new().name("image:1")).await;
    let other = import(&[busybox_layer(), more], ImportOptions::new()).await;
    for image in [&named, &other] {
        assert_eq!(boots(image, config()).await, 1);
    }
    let held = other.bake(config()).await.expect("is baked");
    let id = *other.digest();
    drop(other);
    // One has a name, of the other something is in use.
    assert_eq!(store.gc().await.expect("collects").baked, 0);
    let running = held.start().await.expect("starts");
    drop(held);
    let collected = store.gc().await.expect("collects");
    assert_eq!(collected.baked, 1);
    assert!(collected.bytes > 1 << 20, "{collected:?}");
    let left = baked(&named);
    assert!(left.len() == 1 && !left[0].display().to_string().contains(&id.hex()), "{left:?}");
    // It has the files open.
    assert_eq!(sh(&running, "cat /more").await, "more");
    assert_eq!(boots(&named, config()).await, 0);
    // With the name goes the snapshot, but not before the image.
    store.remove_image(named.digest()).await.expect("removes");
    assert_eq!(store.gc().await.expect("collects").baked, 0);
    drop(named);
    assert_eq!(store.gc().await.expect("collects").baked, 1);
    assert_eq!(entries(&store.root().join("baked")), [""; 0].map(PathBuf::from));
}

#[tokio::test]
async fn a_collection_keeps_the_newest_of_each_variant() {
    let (place, image) = busybox_image(json!({})).await;
    let agent = agent_in(place.folder.path());
    let with_agent = || config().agent(Agent::Path(agent.clone()));
    let old = image.bake(with_agent()).await.expect("bakes");
    assert_eq!(boots(&image, warm(config(), "another variant")).await, 1);
    append(&agent);
    assert_eq!(boots(&image, with_agent()).await, 1);
    assert_eq!(baked(&image).len(), 3);
    let collected = image.store().gc().await.expect("collects");
    assert_eq!((collected.baked, baked(&image).len()), (1, 2));
    assert_eq!(boots(&image, with_agent()).await, 0);
    assert_eq!(boots(&image, warm(config(), "another variant")).await, 0);
    // Who holds the old one goes on with it.
    works(&old.start().await.expect("starts")).await;
    assert_eq!(image.store().gc().await.expect("collects").baked, 0);
}

#[tokio::test]
async fn what_a_killed_collector_has_half_removed_is_not_the_newest() {
    let (_place, image) = busybox_image(json!({})).await;
    assert_eq!(boots(&image, config()).await, 1);
    let good = baked(&image).remove(0);
    // The manifest goes first. A later name and an earlier one: the order in which they are found is the host's.
    let name = good.file_name().expect("a name").to_str().expect("text");
    let (variant, _key) = name.rsplit_once('-').expect("a key");
    for digit in ["0", "f"] {
        let hollow = good.with_file_name(format!("{variant}-{}", digit.repeat(64)));
        fs::create_dir(&hollow).expect("creates");
        fs::write(hollow.join("memory"), "left").expect("writes");
    }
    assert_eq!(image.store().gc().await.expect("collects").baked, 2);
    assert_eq!(baked(&image), [good]);
    assert_eq!(boots(&image, config()).await, 0);
}

/// What a folder takes on disk.
fn occupied(folder: &Path) -> u64 {
    let of = |path: PathBuf| {
        if path.is_dir() { occupied(&path) } else { fs::metadata(&path).expect("a file").blocks() * 512 }
    };
    entries(folder).into_iter().map(of).sum()
}

#[tokio::test]
async fn a_quota_counts_snapshots() {
    let folder = image_support::scratch();
    let (root, layout) = (folder.path().join("images"), Layout::of(&[busybox_layer()]));
    let open = async |quota: u64| {
        let store = ImageStore::options().quota(Bytes(quota)).open(&root).await.expect("opens");
        store.import_oci_layout(layout.folder.path(), None).await.expect("imports")
    };
    let agent = agent_in(folder.path());
    let with_agent = || config().agent(Agent::Path(agent.clone()));
    let image = open(u64::MAX).await;
    kiln::rootfs::build(&image).await.expect("builds");
    let others: u64 = ["blobs", "derived"].map(|name| occupied(&root.join(name))).iter().sum();
    image.bake(with_agent()).await.expect("bakes");
    let snapshot = occupied(&root.join("baked"));
    // Enough for this one, but not for another beside it.
    let image = open(others + snapshot * 3 / 2).await;
    assert_eq!(boots(&image, with_agent()).await, 0);
    let error = image.start(warm(with_agent(), "other")).await.expect_err("it is too much");
    assert!(matches!(&error, StartError::Store(StoreError::Quota { .. })), "{error:?}");
    assert_eq!(baked(&image).len(), 1);
    assert_eq!(boots(&image, with_agent()).await, 0);
    // For one that takes its place there is room, because that is garbage then.
    append(&agent);
    assert_eq!(boots(&image, with_agent()).await, 1);
    assert_eq!(baked(&image).len(), 1);
    // Not even for one.
    fs::remove_dir_all(baked(&image).remove(0)).expect("removes");
    let image = open(others + snapshot / 2).await;
    let error = image.bake(with_agent()).await.expect_err("it is too much");
    assert!(matches!(&error, StartError::Store(StoreError::Quota { .. })), "{error:?}");
    assert_eq!(baked(&image), [""; 0].map(PathBuf::from));
}

#[tokio::test]
async fn digests_of_files_are_remembered_until_these_change() {
    let (place, image) = busybox_image(json!({})).await;
    let agent = agent_in(place.folder.path());
    let with_agent = || config().agent(Agent::Path(agent.clone()));
    assert_eq!(boots(&image, with_agent()).await, 1);
    let remembered = || entries(&image.store().root().join("digests"));
    let kernel = remembered();
    // The agent is too new for that: it might change once more within the same tick of the clock for files.
    let began = Instant::now();
    while remembered().len() == kernel.len() {
        assert!(began.elapsed() < DEADLINE, "the agent's digest is not remembered");
        tokio::time::sleep(Duration::from_millis(50)).await;
        image.bake(with_agent()).await.expect("is baked");
    }
    let own: Vec<_> = remembered().into_iter().filter(|path| !kernel.contains(path)).collect();
    assert_eq!(own.len(), 1);
    let digest = format!("{}\n", Digest::of(&fs::read(&agent).expect("reads")));
    assert_eq!(fs::read_to_string(&own[0]).expect("text"), digest);
    // It is that which counts.
    fs::write(&own[0], format!("{}\n", Digest::of(b"another"))).expect("writes");
    let (none, _) = start(&image, with_agent().bake(PullPolicy::Never)).await;
    assert!(matches!(none, Err(StartError::NotBaked { .. })), "the agent was read: {none:?}");
    // What is no digest counts for nothing.
    fs::write(&own[0], "junk").expect("writes");
    assert_eq!(boots(&image, with_agent()).await, 0);
    assert_eq!(fs::read_to_string(&own[0]).expect("text"), digest);
    // A change in place, of which the size tells nothing.
    let file = OpenOptions::new().write(true).open(&agent).expect("opens");
    file.write_all_at(&[1], file.metadata().expect("its size").len() - 1).expect("writes");
    let (none, _) = start(&image, with_agent().bake(PullPolicy::Never)).await;
    assert!(matches!(none, Err(StartError::NotBaked { .. })), "the old agent is served: {none:?}");
    assert_eq!(boots(&image, with_agent()).await, 1);
}
