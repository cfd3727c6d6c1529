//! From nothing to a guest that runs commands: kiln to its agent, QEMU to a shell on the serial port.
//!
//! `cargo bench --bench boot`. The image's filesystem is in the store already, as in every start but the first.

mod support;

use std::time::Duration;
use std::time::Instant;

use kiln::Image;
use kiln::VmConfig;
use kiln::units::Bytes;

use crate::support::Sample;
use crate::support::qemu;
use crate::support::qemu::Qemu;

const ROUNDS: usize = 10;

#[tokio::main]
async fn main() {
    let kernel = support::kernel();
    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    let initramfs = qemu::Initramfs::build();
    boot(&image).await;

    let mut subject = Sample::new("kiln, soft engine");
    let mut yardsticks = qemu::MACHINES.map(|machine| Sample::new(format!("qemu tcg, {machine}")));
    for _ in 0..ROUNDS {
        subject.add(boot(&image).await);
        for (machine, sample) in qemu::MACHINES.iter().zip(&mut yardsticks) {
            sample.add(Qemu::boot(machine, &kernel, &initramfs).1);
        }
    }
    support::report("boot", &subject, &yardsticks);
}

async fn boot(image: &Image) -> Duration {
    let started = Instant::now();
    let vm = image.boot(VmConfig::new().memory(Bytes::mib(128))).await.expect("the guest boots");
    let time = started.elapsed();
    vm.shutdown().await.expect("the guest stops");
    time
}
