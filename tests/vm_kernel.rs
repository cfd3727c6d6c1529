//! The machine with a real kernel. Needs the kernel that `cargo xtask kernel` builds.

#[path = "support/engine.rs"]
mod engine;

use std::fs::File;
use std::time::Duration;

use engine::engine;
use kiln::units::Bytes;
use kiln::vm::Assets;
use kiln::vmm::boot::cpio::Archive;
use kiln::vmm::{Machine, MachineConfig, MachineEnd};

/// Boots the cached kernel with `initramfs` and waits for the end.
async fn boot(initramfs: Vec<u8>) -> (Machine, MachineEnd) {
    let kernel = Assets::user().expect("a home folder").kernel();
    let kernel = File::open(&kernel).unwrap_or_else(|e| panic!("{}: {e}; run `cargo xtask kernel`", kernel.display()));
    let config = MachineConfig {
        memory: Bytes::mib(128),
        vcpus: std::num::NonZeroU8::MIN,
        kernel,
        initramfs,
        disks: Vec::new(),
        verbose_boot: true,
        extra_cmdline: String::new(),
    };
    let machine =
        tokio::task::spawn_blocking(move || Machine::start(engine().as_ref(), config)).await.unwrap().unwrap();
    let end = tokio::time::timeout(Duration::from_secs(60), machine.ended()).await.expect("the boot ends");
    (machine, end)
}

#[tokio::test]
async fn a_kernel_without_a_root_panics_and_says_why() {
    let (_machine, end) = boot(Vec::new()).await;
    assert!(matches!(&end, MachineEnd::KernelPanic(why) if why.contains("Unable to mount root fs")), "{end:?}");
}

#[tokio::test]
async fn an_init_that_cannot_run_is_a_panic_after_the_devices_were_found() {
    let initramfs = Archive::new().file("init", 0o755, b"not a program").finish();
    let (machine, end) = boot(initramfs).await;
    let console = machine.console().text();
    assert!(matches!(&end, MachineEnd::KernelPanic(why) if why.contains("init")), "{end:?}\n{console}");
    // Found by the MP table, seeded by setup_data, announced on the command line.
    for line in ["MPTABLE: Product ID: MICROVM", "random: crng init done", "virtio-mmio.1 at 0xd0001000"] {
        assert!(console.contains(line), "no {line:?} on the console:\n{console}");
    }
}
