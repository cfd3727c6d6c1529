//! A Linux guest gives back what it has used and freed, so that its snapshot holds what is used.

#[path = "support/guest.rs"]
mod guest;
mod image_support;
#[path = "support/linux.rs"]
mod linux;

use std::sync::Arc;
use std::time::Duration;

use guest::DEADLINE;
use kiln::exec;
use kiln::snapshot::{Contents, Origin, Snapshot};
use kiln::units::Bytes;
use kiln::vmm::Machine;
use kiln_wire::control::Control;
use linux::Root;
use linux::boot;
use linux::sh;
use tempfile::TempDir;

const MEMORY: Bytes = Bytes::mib(128);
/// Has the guest use 60 MB of its memory, with something that is not zeros, and free them.
const USE_AND_FREE: &str = "head -c 1000000 /dev/zero | tr '\\0' x > /tmp/x; \
    for n in $(seq 60); do cat /tmp/x || exit; done > /tmp/f; rm /tmp/f /tmp/x";

/// What the guest has free, from its agent.
async fn free(machine: &Machine) -> Bytes {
    let read = Control::ReadFile { path: "/proc/meminfo".to_owned(), max_bytes: None };
    let ack = exec::control(machine.connector(), &read, DEADLINE).await.expect("reads");
    let text = ack.data_b64.expect("the file");
    let text = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text).expect("base64");
    let text = String::from_utf8(text).expect("text");
    let line = text.lines().find_map(|line| line.strip_prefix("MemFree:")).expect("the line");
    Bytes::kib(line.trim().trim_end_matches(" kB").parse().expect("a number"))
}

/// Has the guest give back all that it has free. Dropping its caches, it also counts what its processors keep.
async fn give_back(machine: &mut Machine) -> Bytes {
    exec::control(machine.connector(), &Control::DropVfsCaches, DEADLINE).await.expect("drops");
    let free = free(machine).await;
    machine.give_memory_back(free, DEADLINE).await.expect("gives back")
}

async fn use_and_free(machine: &Machine) {
    sh(machine, USE_AND_FREE).await;
}

async fn save(machine: &mut Machine, folder: &TempDir, name: &str, since: Option<&Snapshot>) -> Snapshot {
    machine.pause().await.expect("pauses");
    let (state, memory) = (machine.save().await.expect("saves"), Arc::clone(machine.memory()));
    let (target, since) = (folder.path().join(name), since.cloned());
    let write = move || {
        let contents = Contents { state: &state, memory: &memory, origin: &Origin::default(), since: since.as_ref() };
        Snapshot::write(&target, &contents)
    };
    let snapshot = tokio::task::spawn_blocking(write).await.expect("no panic").expect("writes");
    machine.resume();
    snapshot
}

async fn restore(snapshot: &Snapshot, root: &Root) -> Machine {
    let mut machine = snapshot.restore(guest::engine().as_ref(), &root.disks()).await.expect("restores");
    machine.resume();
    machine
}

fn on_disk(snapshot: &Snapshot) -> u64 {
    snapshot.memory_on_disk().expect("its size").0
}

#[tokio::test]
async fn a_snapshot_holds_what_is_used_once_memory_was_given_back() {
    let (root, folder) = (Root::new().await, tempfile::tempdir().expect("a folder"));
    let mut machine = boot(&root, MEMORY).await;
    use_and_free(&machine).await;
    let without = on_disk(&save(&mut machine, &folder, "without", None).await);
    let before = free(&machine).await;
    let given = give_back(&mut machine).await;
    assert!(given.0 > 60_000_000 && given < MEMORY, "{given:?}");
    let base = save(&mut machine, &folder, "base", None).await;
    let with = on_disk(&base);
    assert!(with < without / 2, "{with} after {without}");
    // It has all of its memory, as before.
    let after = free(&machine).await;
    assert!(after.0 > before.0 - before.0 / 16, "{after:?} after {before:?}");
    use_and_free(&machine).await;
    drop(machine);

    // So has one that goes on from the snapshot, and gives back too: what is the snapshot's then.
    let mut restored = restore(&base, &root).await;
    use_and_free(&restored).await;
    let without = on_disk(&save(&mut restored, &folder, "without", Some(&base)).await);
    assert!(give_back(&mut restored).await.0 > 60_000_000);
    let diff = save(&mut restored, &folder, "diff", Some(&base)).await;
    let with = on_disk(&diff);
    assert!(with < without / 2, "{with} after {without}");
    use_and_free(&restored).await;
    drop(restored);
    let again = restore(&diff, &root).await;
    use_and_free(&again).await;
    base.verify().expect("no guest has written to the file");
}

#[tokio::test]
async fn given_up_at_any_point_the_guest_gets_its_memory_back() {
    let (root, folder) = (Root::new().await, tempfile::tempdir().expect("a folder"));
    let mut machine = boot(&root, MEMORY).await;
    let before = free(&machine).await;
    for after in [0, 3, 10, 30, 60].map(Duration::from_millis) {
        let given = tokio::time::timeout(after, machine.give_memory_back(before, DEADLINE)).await;
        // Saved wherever the guest is with it, and so is one that goes on from there.
        let snapshot = save(&mut machine, &folder, "one", None).await;
        let mut restored = restore(&snapshot, &root).await;
        for machine in [&mut machine, &mut restored] {
            // Nothing more is asked for; it returns when nothing is in the balloon.
            machine.give_memory_back(Bytes(0), DEADLINE).await.expect("it takes its memory back");
            let now = free(machine).await;
            assert!(now.0 > before.0 / 2, "{now:?} after {before:?}; {after:?} {given:?}");
        }
        use_and_free(&restored).await;
    }
    use_and_free(&machine).await;
}
