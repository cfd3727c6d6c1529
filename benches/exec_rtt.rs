//! One command, without a guest and in one.
//!
//! `cargo bench --bench exec_rtt`. First the protocol alone: `output()` of `/bin/true` under an agent that is an ordinary
//! process on a Unix socket, against `tokio::process`. Then the whole way into a guest against a line typed into QEMU's
//! serial port; both run `/bin/true` of the same busybox. One at a time, in turns.

mod support;

use std::time::Duration;
use std::time::Instant;

use kiln::ExecBuilder;
use kiln::Image;
use kiln::VmConfig;
use kiln::units::Bytes;

use crate::support::Sample;
use crate::support::agent::Agent;
use crate::support::agent::host_true;
use crate::support::qemu;
use crate::support::qemu::Qemu;

const WARM_UP: usize = 20;
const ROUNDS: usize = 200;

#[tokio::main]
async fn main() {
    on_a_socket().await;
    in_a_guest().await;
}

async fn on_a_socket() {
    let agent = Agent::start().await;
    let mut subject = Sample::new("kiln, agent on a socket");
    let mut yardstick = Sample::new("tokio::process");
    for round in 0..WARM_UP + ROUNDS {
        let ours = exec(agent.exec()).await;
        let theirs = host_true().await;
        if round >= WARM_UP {
            subject.add(ours);
            yardstick.add(theirs);
        }
    }
    support::report("exec of /bin/true on the host", &subject, &[yardstick]);
}

async fn in_a_guest() {
    let kernel = support::kernel();
    let image = Image::from_oci_layout(support::busybox_layout()).await.expect("the layout is ours");
    let initramfs = qemu::Initramfs::build();
    let vm = image.start(VmConfig::new().memory(Bytes::mib(128))).await.expect("the guest boots");
    let mut guests = qemu::MACHINES.map(|machine| Qemu::boot(machine, &kernel, &initramfs).0);

    let mut subject = Sample::new("kiln, soft engine");
    let mut yardsticks = qemu::MACHINES.map(|machine| Sample::new(format!("qemu tcg, {machine}")));
    for round in 0..WARM_UP + ROUNDS {
        let time = exec(vm.exec_builder()).await;
        let times = guests.each_mut().map(|guest| guest.run("/bin/true"));
        if round >= WARM_UP {
            subject.add(time);
            yardsticks.iter_mut().zip(times).for_each(|(sample, time)| sample.add(time));
        }
    }
    support::report("exec of /bin/true in a guest", &subject, &yardsticks);
    vm.shutdown().await.expect("the guest stops");
}

async fn exec(exec: ExecBuilder) -> Duration {
    let started = Instant::now();
    let outcome = exec.argv(["/bin/true"]).output().await.expect("the agent answers");
    assert!(outcome.success());
    started.elapsed()
}
