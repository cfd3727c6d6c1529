//! A machine under observation while its guest's drivers misbehave: what must hold whatever they do.
#![allow(dead_code, reason = "each test binary includes this file and uses its part")]

use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use kiln::vmm::MachineEnd;

use crate::puppet::PATIENCE;
use crate::puppet::Puppet;
use crate::virtio_driver::MemoryDisk;
use crate::virtio_driver::start;

/// What a test may add to this process's memory: the devices' own bounds are some megabytes.
const MEMORY_MAX_KB: u64 = 256 << 10;

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A machine under observation: panics of its threads are seen, and how much memory this process takes.
pub(crate) struct Observed {
    pub(crate) puppet: Puppet,
    memory: u64,
}

impl Observed {
    pub(crate) async fn start() -> Self {
        Self::with(start(MemoryDisk::new(64 << 10)).await)
    }

    pub(crate) fn with(puppet: Puppet) -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                let name = std::thread::current().name().unwrap_or("unnamed").to_owned();
                // A test's own thread is called as the test is, and fails by itself.
                if ["blk-", "vsock", "rng", "balloon", "vcpu-"].iter().any(|prefix| name.starts_with(prefix)) {
                    PANICS.lock().expect("not poisoned").push(format!("{name}: {panic}"));
                }
                usual(panic);
            }));
        });
        Self { puppet, memory: resident_kb() }
    }

    /// Fails if a thread of a machine has panicked.
    pub(crate) fn check_panics() {
        assert_eq!(*PANICS.lock().expect("not poisoned"), [""; 0], "threads of a machine panicked");
    }

    /// What must hold whatever a driver has done. `intact`: nothing was offered but what drivers have.
    pub(crate) async fn check(&mut self, intact: bool) {
        Self::check_panics();
        if intact {
            self.puppet.check_canaries();
        }
        let began = Instant::now();
        self.puppet.machine.pause().await.expect("it pauses");
        self.puppet.machine.resume();
        assert!(began.elapsed() < Duration::from_secs(8), "pausing took {:?}", began.elapsed());
        let grown = resident_kb().saturating_sub(self.memory);
        assert!(grown < MEMORY_MAX_KB, "{grown} KiB more than in the beginning");
    }

    /// The last check: the machine comes to its end.
    pub(crate) async fn end(self) {
        self.puppet.machine.stop();
        let end = tokio::time::timeout(PATIENCE, self.puppet.machine.ended()).await.expect("it stops");
        assert!(matches!(end, MachineEnd::Stopped), "{end:?}");
    }
}

/// Resident memory of this process, at its highest so far.
fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a high-water mark");
    line.trim().trim_end_matches("kB").trim().parse().expect("a number")
}
