//! Assembles a machine and runs it to its end.
//!
//! [`Machine::start`] reads the kernel and so blocks for some milliseconds: call it where that is
//! allowed. Everything after is free of waiting: stopping is asking, and the end arrives as a future.

use std::fs::File;
use std::io;
use std::num::NonZeroU8;
use std::sync::Arc;

use tokio::sync::watch;

use super::board::Board;
use super::board::VirtioSlot;
use super::board::announce;
use super::boot::BASE_CMDLINE;
use super::boot::BootError;
use super::boot::BootSpec;
use super::boot::RNG_SEED_LEN;
use super::bus::Overlap;
use super::console::Console;
use super::crew::Crew;
use super::devices::virtio::balloon::Balloon;
use super::devices::virtio::balloon::BalloonControl;
use super::devices::virtio::blk::Blk;
use super::devices::virtio::rng::Rng;
use super::devices::virtio::vsock::Vsock;
use super::devices::virtio::vsock::VsockConnector;
use super::vcpu_thread::VcpuEnd;
use crate::block::BlockBackend;
use crate::hv::HvError;
use crate::hv::HvVm;
use crate::hv::Hypervisor;
use crate::hv::VmSpec;
use crate::hv::state::VcpuState;
use crate::mem::GuestRam;
use crate::mem::RamError;
use crate::units::Bytes;

/// What to build.
#[derive(Debug)]
pub struct MachineConfig {
    /// Size of RAM.
    pub memory: Bytes,
    /// How many vCPUs, up to [`MAX_VCPUS`](super::boot::layout::MAX_VCPUS). The first boots; the guest starts the others.
    pub vcpus: NonZeroU8,
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: Vec<u8>,
    /// Read-only disks: `/dev/vda`, `/dev/vdb`, ...
    pub disks: Vec<Arc<dyn BlockBackend>>,
    /// Let the kernel say what it does, on the console; costs boot time.
    pub verbose_boot: bool,
    /// Added to the command line.
    pub extra_cmdline: String,
}

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// Guest RAM could not be made.
    #[error("guest memory")]
    Ram(#[from] RamError),
    /// The guest could not be made ready to boot.
    #[error("preparing the boot")]
    Boot(#[from] BootError),
    /// The engine refused.
    #[error("the engine cannot run the machine")]
    Hv(#[from] HvError),
    /// The host refused a thread or entropy.
    #[error("the host has no {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The machine's devices collide.
    #[error("laying out devices")]
    Layout(#[from] Overlap),
    /// More disks than the machine has slots.
    #[error("more devices than the machine has slots")]
    TooManyDevices,
}

/// How a machine ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MachineEnd {
    /// The guest rebooted or crashed beyond recovery; both are a triple fault.
    Shutdown,
    /// The guest kernel panicked, with this message.
    KernelPanic(String),
    /// [`Machine::stop`], or its drop.
    Stopped,
    /// The engine met what it cannot do.
    Failed(Arc<HvError>),
    /// The engine panicked: a defect in it.
    EnginePanicked,
}

/// A running machine. Dropping it asks it to stop and does not wait.
#[derive(Debug)]
pub struct Machine {
    pub(super) crew: Crew,
    console: Console,
    connector: VsockConnector,
    pub(super) balloon: BalloonControl,
    pub(super) board: Board,
    pub(super) ram: Arc<GuestRam>,
    end: watch::Receiver<Option<MachineEnd>>,
    /// Wholly: its time stands still too.
    pub(super) paused: bool,
    pub(super) cpu_profile: String,
    // The engine's side must outlive its vCPUs' threads only as far as they hold it themselves.
    pub(super) vm: Box<dyn HvVm>,
}

/// A machine whose vCPUs have not met their threads.
pub(super) struct Parts {
    pub(super) vm: Box<dyn HvVm>,
    pub(super) board: Board,
    cpu_profile: String,
    ram: Arc<GuestRam>,
    console: Console,
    host: HostEnds,
}

/// What this side of the devices is reached by.
pub(super) struct HostEnds {
    connector: VsockConnector,
    balloon: BalloonControl,
}

impl Parts {
    /// Builds everything around `ram`. Devices that are `held` do nothing until they are released.
    pub(super) fn build(
        engine: &dyn Hypervisor,
        vcpus: NonZeroU8,
        ram: Arc<GuestRam>,
        devices: Vec<VirtioSlot>,
        host: HostEnds,
        held: bool,
    ) -> Result<Self, MachineError> {
        let vm = engine.create_vm(&VmSpec { vcpus }, Arc::clone(&ram))?;
        let console = Console::new();
        let board = Board::build(&*vm, &ram, &console, devices, held)?;
        Ok(Self { vm, board, cpu_profile: engine.cpu_profile().to_owned(), ram, console, host })
    }

    /// Gives the vCPUs their threads, on which they begin in `states`, at once or paused.
    pub(super) fn run(self, states: Vec<VcpuState>, paused: bool) -> Result<Machine, MachineError> {
        let Self { vm, board, cpu_profile, ram, console, host: HostEnds { connector, balloon } } = self;
        let (ended, end) = watch::channel(None);
        let (seen, guest) = (console.clone(), connector.clone());
        let crew = Crew::spawn(&*vm, &board.buses, states, paused, move |end| {
            guest.guest_gone();
            ended.send_replace(Some(machine_end(end, &seen)));
        })?;
        Ok(Machine { crew, console, connector, balloon, board, ram, end, paused, cpu_profile, vm })
    }
}

impl Machine {
    /// Builds the machine on `engine` and starts its first processor; the others wait to be called by the guest.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left running then.
    pub fn start(engine: &dyn Hypervisor, mut config: MachineConfig) -> Result<Self, MachineError> {
        let vcpus = config.vcpus;
        let ram = Arc::new(GuestRam::new(config.memory)?);
        let mut rng_seed = [0; RNG_SEED_LEN];
        getrandom::fill(&mut rng_seed).map_err(|e| MachineError::Host { what: "entropy", source: e.into() })?;
        let (devices, host) = virtio_devices(&config.disks, &ram);
        let cmdline = command_line(&config, devices.len());
        let spec = BootSpec { cmdline: &cmdline, initramfs: &config.initramfs, vcpus, rng_seed };
        let states = super::boot::load(&ram, &mut config.kernel, &spec)?;
        Parts::build(engine, vcpus, ram, devices, host, false)?.run(states, false)
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What the guest writes to its serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Opens streams to the guest's vsock ports.
    #[must_use]
    pub fn connector(&self) -> &VsockConnector {
        &self.connector
    }

    /// Asks the machine to stop; [`Machine::ended`] tells when it has.
    pub fn stop(&self) {
        self.crew.stop();
    }

    /// Waits for the machine's end. The same answer each time.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub fn ended(&self) -> impl Future<Output = MachineEnd> + Send + 'static {
        let mut end = self.end.clone();
        async move {
            match end.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(end)) => end.clone(),
                // The sender is gone without a word only when the thread itself was killed.
                _ => MachineEnd::EnginePanicked,
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.crew.stop();
    }
}

fn machine_end(end: VcpuEnd, console: &Console) -> MachineEnd {
    match (end, console.kernel_panic()) {
        (VcpuEnd::Shutdown, Some(message)) => MachineEnd::KernelPanic(message),
        (VcpuEnd::Shutdown, None) => MachineEnd::Shutdown,
        (VcpuEnd::Stopped, _) => MachineEnd::Stopped,
        (VcpuEnd::Failed(error), _) => MachineEnd::Failed(Arc::new(error)),
        (VcpuEnd::Panicked, _) => MachineEnd::EnginePanicked,
    }
}

/// The virtio slots in order: disks, then sockets, entropy and the balloon.
pub(super) fn virtio_devices(disks: &[Arc<dyn BlockBackend>], ram: &Arc<GuestRam>) -> (Vec<VirtioSlot>, HostEnds) {
    let mut slots: Vec<VirtioSlot> = disks
        .iter()
        .enumerate()
        .map(|(n, disk)| VirtioSlot {
            name: format!("blk-{n}"),
            device: Box::new(Blk::new(Arc::clone(disk), &format!("kiln-{n}"))),
            doorbell: Arc::default(),
        })
        .collect();
    let (vsock, connector, doorbell) = Vsock::new();
    slots.push(VirtioSlot { name: "vsock".to_owned(), device: Box::new(vsock), doorbell });
    slots.push(VirtioSlot { name: "rng".to_owned(), device: Box::new(Rng), doorbell: Arc::default() });
    let (device, balloon, doorbell) = Balloon::new(Arc::clone(ram));
    slots.push(VirtioSlot { name: "balloon".to_owned(), device: Box::new(device), doorbell });
    (slots, HostEnds { connector, balloon })
}

fn command_line(config: &MachineConfig, slots: usize) -> String {
    let mut line = BASE_CMDLINE.to_owned();
    if !config.verbose_boot {
        line.push_str(" quiet");
    }
    announce(u32::try_from(slots).unwrap_or(u32::MAX), &mut line);
    if !config.extra_cmdline.is_empty() {
        line.push(' ');
        line.push_str(&config.extra_cmdline);
    }
    line
}
