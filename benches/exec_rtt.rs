//! One command in a running guest: kiln's exec against a line typed into QEMU's serial port.
//!
//! `cargo bench --bench exec_rtt`. Both run `/bin/true` of the same busybox, one at a time.

mod support;

use std::time::Duration;
use std::time::Instant;

use kiln::Image;
use kiln::Vm;
use kiln::VmConfig;
use kiln::units::Bytes;

use crate::support::Sample;
use crate::support::qemu;
use crate::support::qemu::Qemu;

const WARM_UP: usize = 20;
const ROUNDS: usize = 200;

#[tokio::main]
async fn main() {
    let kernel = support::kernel();
    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    let initramfs = qemu::Initramfs::build();
    let vm = image.start(VmConfig::new().memory(Bytes::mib(128))).await.expect("the guest boots");
    let mut guests = qemu::MACHINES.map(|machine| Qemu::boot(machine, &kernel, &initramfs).0);

    let mut subject = Sample::new("kiln, soft engine");
    let mut yardsticks = qemu::MACHINES.map(|machine| Sample::new(format!("qemu tcg, {machine}")));
    for round in 0..WARM_UP + ROUNDS {
        let time = exec(&vm).await;
        let times = guests.each_mut().map(|guest| guest.run("/bin/true"));
        if round >= WARM_UP {
            subject.add(time);
            yardsticks.iter_mut().zip(times).for_each(|(sample, time)| sample.add(time));
        }
    }
    support::report("exec of /bin/true", &subject, &yardsticks);
    vm.shutdown().await.expect("the guest stops");
}

async fn exec(vm: &Vm) -> Duration {
    let started = Instant::now();
    let outcome = vm.exec_builder().argv(["/bin/true"]).output().await.expect("the agent answers");
    assert!(outcome.success());
    started.elapsed()
}
