//! A machine with a real kernel, the agent and busybox, without a `Vm` around it: for tests of what a `Vm` does not
//! show. Kernel and agent are the cached ones that `cargo xtask` builds.
#![allow(dead_code, unreachable_pub, reason = "each test binary includes this file and uses its part")]

use std::fs;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use kiln::ExecBuilder;
use kiln::block::BlockBackend;
use kiln::block::ConcatBackend;
use kiln::exec;
use kiln::rootfs;
use kiln::units::Bytes;
use kiln::vm::Assets;
use kiln::vmm::Machine;
use kiln::vmm::MachineConfig;
use kiln::vmm::boot::cpio;
use kiln_wire::boot::GuestConfig;
use serde_json::json;

use crate::guest::DEADLINE;
use crate::guest::busybox_image;
use crate::guest::engine;
use crate::image_support::Place;

/// A busybox root filesystem.
pub struct Root {
    _place: Place,
    files: Vec<PathBuf>,
}

impl Root {
    pub async fn new() -> Self {
        let (place, image) = busybox_image(json!({})).await;
        let files = rootfs::build(&image).await.expect("builds").files().to_vec();
        Self { _place: place, files }
    }

    pub fn disks(&self) -> Vec<Arc<dyn BlockBackend>> {
        vec![Arc::new(ConcatBackend::open(&self.files).expect("the root image"))]
    }
}

/// Boots from `root` and waits until the agent answers.
pub async fn boot(root: &Root, memory: Bytes) -> Machine {
    let assets = Assets::user().expect("a home folder");
    let agent = fs::read(assets.agent()).expect("run `cargo xtask agent`");
    let guest = GuestConfig {
        overlay_size_bytes: Bytes::mib(64).0,
        root_device: "/dev/vda".to_owned(),
        root_fs: "erofs".to_owned(),
        ..GuestConfig::default()
    };
    let config = MachineConfig {
        memory,
        vcpus: std::num::NonZeroU8::MIN,
        kernel: File::open(assets.kernel()).expect("run `cargo xtask kernel`"),
        initramfs: cpio::initramfs(&agent, &guest.to_json()),
        disks: root.disks(),
        verbose_boot: false,
        extra_cmdline: String::new(),
    };
    let start = move || Machine::start(engine().as_ref(), config).expect("starts");
    let machine = tokio::task::spawn_blocking(start).await.expect("no panic");
    exec::wait_ready(machine.connector(), DEADLINE).await.expect("boots");
    machine
}

/// What a shell line prints in `machine`; it must succeed.
pub async fn sh(machine: &Machine, line: &str) -> String {
    let exec = ExecBuilder::over(Arc::new(machine.connector().clone()));
    let outcome = exec.argv(["sh", "-c", line]).timeout(DEADLINE).output().await;
    let outcome = outcome.unwrap_or_else(|error| panic!("{line}: {error:?}\n{}", machine.console().text()));
    assert!(outcome.success(), "{line}: {outcome:?}");
    String::from_utf8(outcome.stdout).expect("these tests print text")
}
