//! A snapshot's folder: what is damaged, of another version or for something else is refused by name, and nothing in
//! it makes opening or restoring panic.

#[path = "support/bare.rs"]
mod bare;
#[path = "support/bare_machine.rs"]
mod bare_machine;

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

use bare_machine::MEMORY;
use bare_machine::await_flag;
use bare_machine::fresh;
use bare_machine::heard;
use bare_machine::program;
use bare_machine::say;
use bare_machine::set_flag;
use kiln::hv::soft::Soft;
use kiln::hv::state::x86_64::{Activity, Delivery, DeliverySource};
use kiln::hv::{HvError, HvVm, Hypervisor, VmSpec};
use kiln::mem::GuestRam;
use kiln::snapshot::{Contents, FORMAT, Kind, Origin, Snapshot, SnapshotError};
use kiln::units::Bytes;
use kiln::vmm::devices::virtio::{DeviceState, TransportState};
use kiln::vmm::{MACHINE_STATE_VERSION, MachineState, RestoreError};
use proptest::prelude::*;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::sync::Arc;

// What is on disk. Whoever changes one of these changes the format: then old snapshots must be refused by their
// version, or still be read, and the golden folder stays as the proof.
const _: () = {
    assert!(FORMAT == 1);
    assert!(MACHINE_STATE_VERSION == 3);
};
/// Of the machine states that are read, by version.
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/snapshot-3");
/// Of versions that are not read any more.
const OLD: [(u32, &str); 2] = [
    (1, concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/snapshot-1")),
    (2, concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/snapshot-2")),
];

fn origin() -> Origin {
    Origin { root: "sha256:root".to_owned(), kernel: "sha256:kernel".to_owned(), agent: "sha256:agent".to_owned() }
}

/// Says `a`, waits for the flag, says `b`.
fn code() -> Vec<u8> {
    program(|a| {
        say(a, b'a')?;
        await_flag(a)?;
        say(a, b'b')
    })
}

/// A folder with the snapshot `one` of a guest that has not begun.
fn written() -> (tempfile::TempDir, Snapshot) {
    let folder = tempfile::tempdir().expect("a folder");
    let (state, ram) = fresh(&code());
    let snapshot = write(&folder.path().join("one"), &state, &ram, None).expect("writes");
    (folder, snapshot)
}

fn write(
    target: &Path,
    state: &MachineState,
    memory: &GuestRam,
    since: Option<&Snapshot>,
) -> Result<Snapshot, SnapshotError> {
    Snapshot::write(target, &Contents { state, memory, origin: &origin(), since })
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name()).collect();
    names.sort();
    names.into_iter().map(|name| name.into_string().expect("text")).collect()
}

/// Changes the manifest, which is given without white space, and makes its digest fit again, as a forger would.
fn forge(folder: &Path, change: impl FnOnce(String) -> String) {
    let path = folder.join("snapshot.json");
    let manifest = fs::read_to_string(&path).expect("a manifest");
    // No string in it has white space.
    let changed = change(manifest.split_whitespace().collect());
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(replace_integrity(&changed, ""))));
    fs::write(&path, replace_integrity(&changed, &digest)).expect("writes");
}

fn replace_integrity(manifest: &str, digest: &str) -> String {
    let key = "\"integrity\":\"";
    let start = manifest.find(key).expect("the field") + key.len();
    let end = start + manifest[start..].find('"').expect("its end");
    format!("{}{digest}{}", &manifest[..start], &manifest[end..])
}

/// Replaces a piece of the manifest.
fn text(from: &'static str, to: &'static str) -> Forgery {
    Box::new(move |manifest| {
        assert!(manifest.contains(from), "{from} is not in {manifest}");
        manifest.replacen(from, to, 1)
    })
}

/// Changes the machine's state, which is the last field.
fn state(change: impl Fn(&mut MachineState) + 'static) -> Forgery {
    Box::new(move |manifest| {
        let (before, machine) = manifest.split_once("\"machine\":").expect("the field");
        let mut state: MachineState = serde_json::from_str(&machine[..machine.len() - 1]).expect("a state");
        change(&mut state);
        format!("{before}\"machine\":{}}}", serde_json::to_string(&state).expect("JSON"))
    })
}

/// Changes the state of the socket device.
fn device(change: impl Fn(&mut TransportState) + 'static) -> Forgery {
    state(move |state| change(&mut state.virtio[0]))
}

type Forgery = Box<dyn Fn(String) -> String>;

async fn runs_on(snapshot: &Snapshot) {
    let mut machine = snapshot.restore(bare_machine::engine().as_ref(), &[]).await.expect("restores");
    machine.resume();
    set_flag(&machine);
    heard(&machine, "b").await;
}

#[tokio::test]
async fn a_snapshot_is_written_whole_and_opens_as_what_it_was() {
    let (folder, written) = written();
    assert_eq!(names(folder.path()), ["one"]);
    assert_eq!(names(&folder.path().join("one")), ["memory", "memory.sha256", "snapshot.json"]);
    let opened = Snapshot::open(&folder.path().join("one")).expect("opens");
    opened.verify().expect("undamaged");
    opened.expect_origin(&origin()).expect("the same");
    assert_eq!((opened.digest(), opened.state(), opened.kind()), (written.digest(), written.state(), Kind::Full));
    assert_eq!(opened.memory_size(), MEMORY);
    // Page tables, GDT and code: six pages; the rest are holes.
    assert_eq!(opened.memory_on_disk().expect("its size"), Bytes::kib(4 * 6));
    runs_on(&opened).await;
    // The same again gives the same bytes.
    let (state, ram) = fresh(&code());
    let again = write(&folder.path().join("two"), &state, &ram, None).expect("writes");
    assert_eq!(again.digest(), written.digest());
    for file in ["memory", "memory.sha256", "snapshot.json"] {
        let [one, two] = ["one", "two"].map(|name| fs::read(folder.path().join(name).join(file)).expect("reads"));
        assert!(one == two, "{file} differs");
    }
}

#[tokio::test]
async fn a_new_snapshot_takes_the_place_of_the_old_one_in_one_step() {
    let (folder, old) = written();
    let target = folder.path().join("one");
    let (state, ram) = fresh(&code());
    ram.store(0x20_0000, 1u8).expect("in memory");
    // What killed writers have left goes; what is not theirs stays.
    fs::create_dir(folder.path().join(".tmp-snapshot-0123")).expect("made");
    fs::write(folder.path().join(".tmp-snapshot-0123/memory"), "half").expect("written");
    fs::create_dir(folder.path().join("other")).expect("made");
    let new = write(&target, &state, &ram, None).expect("writes");
    assert_ne!(new.digest(), old.digest());
    assert_eq!(names(folder.path()), ["one", "other"]);
    assert_eq!(Snapshot::open(&target).expect("opens").digest(), new.digest());
    // Whoever has the old one open still has it whole.
    runs_on(&old).await;
    // A write that fails leaves what was there.
    let mut wrong = state.clone();
    wrong.memory = Bytes::mib(8);
    assert!(matches!(write(&target, &wrong, &ram, None), Err(SnapshotError::MachineMemory { .. })));
    let long = Origin { root: "x".repeat(10_000), ..origin() };
    let contents = Contents { state: &state, memory: &ram, origin: &long, since: None };
    Snapshot::write(&target, &contents).expect_err("the name of the root is too long");
    assert_eq!(names(folder.path()), ["one", "other"]);
    assert_eq!(Snapshot::open(&target).expect("opens").digest(), new.digest());
    fs::write(folder.path().join("file"), "").expect("written");
    write(&folder.path().join("file"), &state, &ram, None).expect_err("a file is in the way");
    assert_eq!(names(folder.path()), ["file", "one", "other"]);
}

#[tokio::test]
async fn a_diff_opens_on_its_parent_only() {
    let (folder, base) = written();
    let (state, ram) = fresh(&code());
    ram.store(0x10_0000 + 0x10_0000, 7u8).expect("in memory");
    // A page that was data becomes zero.
    ram.fill(0xa000, 0, 4096).expect("in memory");
    let diff = write(&folder.path().join("diff"), &state, &ram, Some(&base)).expect("writes");
    assert_eq!((diff.kind(), diff.memory_on_disk().expect("its size")), (Kind::Diff, Bytes::kib(4)));
    let path = folder.path().join("diff");
    assert!(matches!(Snapshot::open(&path), Err(SnapshotError::NeedsParent { parent }) if parent == base.digest()));
    assert!(matches!(Snapshot::open_on(&path, &diff), Err(SnapshotError::WrongParent { .. })));
    let full = folder.path().join("one");
    assert!(matches!(Snapshot::open_on(&full, &base), Err(SnapshotError::WrongParent { wanted: None, .. })));
    let opened = Snapshot::open_on(&path, &base).expect("opens");
    opened.verify().expect("undamaged");
    let memory = opened.map_memory().expect("maps");
    assert_eq!(
        (memory.load(0x20_0000), memory.load(0xa010), memory.load(0x1000)),
        (Some(7u8), Some(0u64), Some(0x2003u64))
    );
    // Nothing changed: nothing written, and it restores all the same.
    let same = write(&folder.path().join("same"), &state, &memory, Some(&opened)).expect("writes");
    assert_eq!(same.memory_on_disk().expect("its size"), Bytes(0));
    let mut small = state.clone();
    small.memory = Bytes::mib(2);
    let ram = GuestRam::new(Bytes::mib(2)).expect("memory");
    assert!(matches!(write(&path, &small, &ram, Some(&base)), Err(SnapshotError::MachineMemory { .. })));
}

/// The soft engine under another name.
#[derive(Debug)]
struct Other(Soft);

impl Hypervisor for Other {
    fn create_vm(&self, spec: &VmSpec, ram: Arc<GuestRam>) -> Result<Box<dyn HvVm>, HvError> {
        self.0.create_vm(spec, ram)
    }
    fn cpu_profile(&self) -> &str {
        "other"
    }
}

#[tokio::test]
async fn what_does_not_belong_together_is_refused_by_name() {
    let (_folder, snapshot) = written();
    let wrong = Origin { root: "sha256:other".to_owned(), ..origin() };
    let error = snapshot.expect_origin(&wrong).expect_err("another root");
    assert!(matches!(&error, SnapshotError::Origin { what: "root image", .. }), "{error}");
    let error = snapshot.restore(&Other(Soft::new()), &[]).await.expect_err("another processor");
    assert!(matches!(&error, SnapshotError::Restore(RestoreError::CpuProfile { .. })), "{error}");
    let disk = Arc::new(kiln::block::FileBackend::new(tempfile::tempfile().expect("a file")).expect("a disk"));
    let error = snapshot.restore(bare_machine::engine().as_ref(), &[disk]).await.expect_err("a disk too many");
    assert!(matches!(&error, SnapshotError::Restore(RestoreError::Devices { wanted: 3, given: 4 })), "{error}");
}

#[test]
fn files_that_are_missing_cut_or_of_another_kind_are_refused() {
    let (folder, _) = written();
    let one = folder.path().join("one");
    let open = || Snapshot::open(&one).expect_err("it is damaged");
    let set_len = |name: &str, len| OpenOptions::new().write(true).open(one.join(name)).unwrap().set_len(len).unwrap();
    assert!(matches!(Snapshot::open(&folder.path().join("none")), Err(SnapshotError::Missing(_))));
    for len in [MEMORY.0 - 1, MEMORY.0 + 4096, 0] {
        set_len("memory", len);
        assert!(matches!(open(), SnapshotError::FileSize { name: "memory", found, .. } if found.0 == len));
    }
    set_len("memory", MEMORY.0);
    Snapshot::open(&one).expect("whole again");
    set_len("memory.sha256", 31);
    assert!(matches!(open(), SnapshotError::FileSize { name: "memory.sha256", .. }));
    fs::remove_file(one.join("memory.sha256")).unwrap();
    assert!(matches!(open(), SnapshotError::Io { .. }));
    fs::create_dir(one.join("memory.sha256")).unwrap();
    assert!(matches!(open(), SnapshotError::Damaged(_)));
    set_len("snapshot.json", 2 << 20);
    assert!(matches!(open(), SnapshotError::Damaged(_)));
    set_len("snapshot.json", 100);
    assert!(matches!(open(), SnapshotError::Manifest(_)));
    fs::remove_file(one.join("memory")).unwrap();
    // A pipe that nobody opens does not make anybody wait.
    let pipe = std::process::Command::new("mkfifo").arg(one.join("memory")).status().unwrap();
    assert!(pipe.success());
    let (folder, _) = written();
    fs::remove_file(folder.path().join("one/memory")).unwrap();
    fs::rename(one.join("memory"), folder.path().join("one/memory")).unwrap();
    assert!(matches!(Snapshot::open(&folder.path().join("one")), Err(SnapshotError::Damaged(_))));
}

#[test]
fn every_flipped_bit_of_the_manifest_is_noticed_or_means_nothing() {
    let (folder, snapshot) = written();
    let (one, path) = (folder.path().join("one"), folder.path().join("one/snapshot.json"));
    let good = fs::read(&path).unwrap();
    // Every bit of some bytes, spread over the whole file.
    for at in (0..good.len()).step_by(61) {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            fs::write(&path, &bad).unwrap();
            if let Ok(opened) = Snapshot::open(&one) {
                let kept = (opened.digest(), opened.state()) == (snapshot.digest(), snapshot.state());
                assert!(kept && opened.origin() == &origin(), "bit {bit} of byte {at}");
            }
        }
    }
}

#[test]
fn flipped_bits_of_the_memory_are_found_when_it_is_verified() {
    let (folder, snapshot) = written();
    let flip = |name: &str, at| {
        let file = OpenOptions::new().read(true).write(true).open(folder.path().join("one").join(name)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    for at in [0, 0x10_0000, 0x12_3456, MEMORY.0 - 1] {
        flip("memory", at);
        assert!(matches!(snapshot.verify(), Err(SnapshotError::Memory { offset: 0 })), "{at:#x}");
        flip("memory", at);
        snapshot.verify().expect("whole again");
    }
    flip("memory.sha256", 3);
    assert!(matches!(snapshot.verify(), Err(SnapshotError::Damaged(_))));
}

#[test]
fn other_versions_are_named() {
    let (folder, _) = written();
    let one = folder.path().join("one");
    forge(&one, |manifest| manifest);
    Snapshot::open(&one).expect("a forger that changes nothing is not noticed");
    forge(&one, state(|state| state.version = 4));
    assert!(matches!(Snapshot::open(&one), Err(SnapshotError::Restore(RestoreError::Version { found: 4 }))));
    // A format of which nothing else is known.
    fs::write(one.join("snapshot.json"), r#"{"format": 7, "what": ["ever"]}"#).unwrap();
    let error = Snapshot::open(&one).expect_err("another format");
    assert_eq!(error.to_string(), "a snapshot of format 7, where 1 is supported");
}

#[tokio::test]
async fn forged_states_are_errors_that_say_what_is_wrong() {
    let size = r#""size":4194304"#;
    let forgeries: Vec<(&str, Forgery)> = vec![
        ("processor", state(|s| s.vcpus[0].cr0 = 0)),
        ("processor", state(|s| s.vcpus[0].rip = 1 << 63)),
        (
            "nobody has started",
            state(|s| {
                s.vcpus[0].activity = Activity::WaitsForInit;
                s.vcpus[0].events.delivering =
                    Some(Delivery { vector: 6, error: None, source: DeliverySource::Exception });
            }),
        ),
        (
            "under way",
            state(|s| {
                s.vcpus[0].events.delivering =
                    Some(Delivery { vector: 77, error: None, source: DeliverySource::Exception });
            }),
        ),
        ("processors", state(|s| s.vcpus.clear())),
        ("sizes", state(|s| s.memory = Bytes(4096))),
        ("size", text(size, r#""size":18446744073709551615"#)),
        ("size", text(size, r#""size":0"#)),
        ("virtio devices", state(|s| s.virtio.clear())),
        ("another device", device(|d| d.device_type = 2)),
        ("configuration", device(|d| d.config[0] = 4)),
        ("features", device(|d| d.accepted = u64::MAX)),
        ("number of queues", device(|d| d.queues.clear())),
        (
            "queue",
            // What a driver may write, but not start with.
            device(|d| {
                (d.active, d.status, d.accepted) = (true, 15, 1 << 32);
                (d.queues[0].ready, d.queues[0].size) = (true, 257);
            }),
        ),
        (
            "queue",
            device(|d| {
                (d.active, d.status, d.accepted) = (true, 15, 1 << 32);
                (d.queues[0].ready, d.queues[0].descriptors) = (true, 1);
            }),
        ),
        ("driver is not", device(|d| d.active = true)),
        (
            "in this memory",
            device(|d| {
                (d.active, d.status, d.accepted) = (true, 15, 1 << 32);
                (d.queues[0].ready, d.queues[0].descriptors) = (true, MEMORY.0 - 16);
            }),
        ),
        ("another kind", device(|d| d.device = DeviceState::Stateless)),
        ("serial", state(|s| s.serial.received = vec![0; 65])),
        ("extents", text(r#""extents":[]"#, r#""extents":[{"offset":0,"len":4096}]"#)),
        ("parent", text(r#""kind":"full""#, r#""kind":"diff""#)),
        ("cannot be read", text(r#""kind":"full""#, r#""kind":"full","more":1"#)),
    ];
    for (wanted, change) in forgeries {
        let (folder, _) = written();
        forge(&folder.path().join("one"), change);
        let error = match Snapshot::open(&folder.path().join("one")) {
            Err(error) => error,
            Ok(snapshot) => snapshot.restore(bare_machine::engine().as_ref(), &[]).await.expect_err(wanted),
        };
        let chain = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        let text = chain.map(ToString::to_string).collect::<Vec<_>>().join(": ");
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_number_in_a_state_makes_a_machine_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0u32..64), 1..4)) {
        let (state, _) = fresh(&code());
        let mut json = serde_json::to_value(&state).expect("a state is JSON");
        for (place, value, shift) in changes {
            let count = numbers(&mut json, &mut |_| {});
            let mut left = place.index(count);
            numbers(&mut json, &mut |number| {
                if left == 0 {
                    *number = (value >> shift).into();
                }
                left = left.wrapping_sub(1);
            });
        }
        let Ok(state) = serde_json::from_value::<MachineState>(json) else { return Ok(()) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (_, ram) = fresh(&code());
            if let Ok(mut machine) = kiln::vmm::Machine::restore(bare_machine::engine().as_ref(), &state, ram, &[]).await {
                machine.resume();
                tokio::task::yield_now().await;
                let _ = machine.pause().await;
                let _ = machine.save().await;
                machine.stop();
                let end = machine.ended().await;
                assert!(!matches!(end, kiln::vmm::MachineEnd::EnginePanicked), "{state:?}");
            }
        });
    }
}

/// Calls `each` with every number in `value`; returns how many there are.
fn numbers(value: &mut Value, each: &mut dyn FnMut(&mut Value)) -> usize {
    match value {
        Value::Number(_) => {
            each(value);
            1
        }
        Value::Array(items) => items.iter_mut().map(|item| numbers(item, each)).sum(),
        Value::Object(fields) => fields.values_mut().map(|field| numbers(field, each)).sum(),
        _ => 0,
    }
}

/// A golden snapshot's place for a test: its memory is kept as its pages, since a repository keeps no holes.
fn golden(kept: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("snapshot");
    fs::create_dir(&place).expect("made");
    for name in ["snapshot.json", "memory.sha256"] {
        fs::copy(Path::new(kept).join(name), place.join(name)).expect("the golden snapshot is there");
    }
    let memory = OpenOptions::new().create_new(true).write(true).open(place.join("memory")).expect("made");
    memory.set_len(MEMORY.0).expect("sized");
    for name in names(Path::new(kept)) {
        if let Some(offset) = name.strip_prefix("page-") {
            let offset = u64::from_str_radix(offset, 16).expect("an offset");
            memory.write_all_at(&fs::read(Path::new(kept).join(&name)).expect("a page"), offset).expect("writes");
        }
    }
    (folder, place)
}

#[tokio::test]
async fn a_snapshot_of_format_1_and_a_state_of_version_3_still_opens_and_runs() {
    let (_folder, place) = golden(GOLDEN);
    let snapshot = Snapshot::open(&place).expect("opens");
    snapshot.verify().expect("undamaged");
    snapshot.expect_origin(&origin()).expect("the same");
    assert_eq!(snapshot.digest(), "sha256:108b1d9192456e3561c60f85ed82dd53d3756e6d4a6c5096d87b00c94f9352e5");
    runs_on(&snapshot).await;
}

#[test]
fn states_of_old_versions_are_refused_by_their_version() {
    for (version, folder) in OLD {
        let (_folder, place) = golden(folder);
        let error = Snapshot::open(&place).expect_err("an old version");
        assert!(
            matches!(&error, SnapshotError::Restore(RestoreError::Version { found }) if *found == version),
            "{error}"
        );
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        assert_eq!(cause, Some(format!("a machine state of version {version}, where 3 is supported")));
    }
}

/// Makes the golden folder; run by hand when the format's version changes, never to make the test above pass.
#[tokio::test]
#[ignore = "writes into the source tree"]
async fn write_the_golden_snapshot() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut machine = bare_machine::start(&code()).await;
    heard(&machine, "a").await;
    machine.pause().await.expect("pauses");
    let state = machine.save().await.expect("saves");
    let place = folder.path().join("snapshot");
    write(&place, &state, machine.memory(), None).expect("writes");
    fs::create_dir_all(GOLDEN).expect("made");
    for name in ["snapshot.json", "memory.sha256"] {
        fs::copy(place.join(name), Path::new(GOLDEN).join(name)).expect("copied");
    }
    let memory = fs::read(place.join("memory")).expect("reads");
    for (n, page) in memory.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0)) {
        fs::write(Path::new(GOLDEN).join(format!("page-{:x}", n * 4096)), page).expect("written");
    }
}

#[test]
fn a_snapshot_that_is_open_is_whole_when_another_takes_its_place() {
    let (folder, old) = written();
    let (state, ram) = fresh(&[code(), b"other".to_vec()].concat());
    let new = write(&folder.path().join("one"), &state, &ram, None).expect("writes");
    assert_ne!(old.digest(), new.digest());
    old.verify().expect("the old one is whole");
    new.verify().expect("the new one is whole");
}

#[test]
fn what_is_opened_while_others_take_its_place_is_of_one_piece() {
    let (folder, _) = written();
    let place = folder.path().join("one");
    let writing = std::thread::spawn({
        let place = place.clone();
        move || {
            for n in 0..150_u32 {
                let (state, ram) = fresh(&[code(), n.to_le_bytes().to_vec()].concat());
                write(&place, &state, &ram, None).expect("writes");
            }
        }
    });
    let mut seen = std::collections::HashSet::new();
    while !writing.is_finished() {
        let snapshot = Snapshot::open(&place).expect("there is always one");
        snapshot.verify().unwrap_or_else(|error| panic!("{error:?}"));
        seen.insert(snapshot.digest().to_owned());
    }
    writing.join().expect("no panic");
    assert!(seen.len() > 10, "{} were seen", seen.len());
}
