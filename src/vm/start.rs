//! From configuration to a guest whose agent answers.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_wire::AGENT_PORT;
use kiln_wire::boot::GuestConfig;

use super::CONSOLE_LINES;
use super::assets::Assets;
use super::config::Agent;
use super::config::GuestRoot;
use super::config::Kernel;
use super::config::VmConfig;
use super::error::StartError;
use crate::block::BlockBackend;
use crate::block::ConcatBackend;
use crate::block::FileBackend;
use crate::exec;
use crate::exec::AgentInfo;
use crate::exec::ExecError;
use crate::hv::soft::Soft;
use crate::vmm::Machine;
use crate::vmm::MachineConfig;
use crate::vmm::MachineEnd;
use crate::vmm::MachineError;
use crate::vmm::boot::BootError;
use crate::vmm::boot::ElfError;
use crate::vmm::boot::cpio;

/// Largest agent taken into an initramfs; ours is a few MiB.
const AGENT_MAX: u64 = 64 << 20;

/// Reads the files and starts the machine. Blocks for as long as reading a kernel takes.
pub(super) fn machine(root: &GuestRoot, config: VmConfig) -> Result<Machine, StartError> {
    if config.vcpus != 1 {
        return Err(StartError::Config("only one vCPU is supported so far"));
    }
    let kernel_path = kernel_path(&config)?;
    let kernel = open(&kernel_path, StartError::kernel_missing)?;
    let agent = read_agent(&agent_path(&config)?)?;
    let disk = disk(&root.files)?;
    let guest = guest_config(root, &config);
    // The one engine that every host has; a better one is chosen here once there is another.
    let engine = config.engine.unwrap_or_else(|| Arc::new(Soft::new()));
    let machine = MachineConfig {
        memory: config.memory,
        kernel,
        initramfs: cpio::initramfs(&agent, &guest.to_json()),
        disks: vec![disk],
        verbose_boot: config.verbose_boot,
        extra_cmdline: config.extra_cmdline,
    };
    Machine::start(&*engine, machine).map_err(|error| match error {
        // A kernel that is one, but does not fit, is the memory's fault.
        MachineError::Boot(BootError::Kernel(ElfError::OutsideRam { .. })) => StartError::Machine(error),
        MachineError::Boot(BootError::Kernel(source)) => StartError::KernelNotElf { path: kernel_path, source },
        other => StartError::Machine(other),
    })
}

/// The files one after another; a single one may have any length.
fn disk(paths: &[PathBuf]) -> Result<Arc<dyn BlockBackend>, StartError> {
    let open =
        |path: &PathBuf| File::open(path).map_err(|source| StartError::Unreadable { path: path.clone(), source });
    let mut files = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let path = paths.first().cloned().ok_or(StartError::Config("the root filesystem has no file"))?;
    let unreadable = |source| StartError::Unreadable { path, source };
    match files.pop() {
        Some(only) if files.is_empty() => Ok(Arc::new(FileBackend::new(only).map_err(unreadable)?)),
        last => Ok(Arc::new(ConcatBackend::new(files.into_iter().chain(last)).map_err(unreadable)?)),
    }
}

/// Waits until the agent answers, or the machine ends, or time is up.
pub(super) async fn agent_ready(machine: &Machine, timeout: std::time::Duration) -> Result<AgentInfo, StartError> {
    let console = || machine.console().last_lines(CONSOLE_LINES);
    tokio::select! {
        // The end first: a guest that is gone also refuses connections.
        biased;
        end = machine.ended() => Err(ended_early(end, console())),
        ready = exec::wait_ready(machine.connector(), timeout) => match ready {
            Ok(agent) => {
                tracing::debug!(?agent, port = AGENT_PORT, "agent answers");
                Ok(agent)
            }
            Err(ExecError::Timeout { .. }) => Err(StartError::AgentTimeout { after: timeout, console: console() }),
            Err(source) => Err(StartError::Agent { source, console: console() }),
        },
    }
}

fn ended_early(end: MachineEnd, console: Vec<String>) -> StartError {
    match end {
        MachineEnd::KernelPanic(message) => StartError::KernelPanic { message, console },
        MachineEnd::Failed(source) => StartError::Engine { source, console },
        MachineEnd::EnginePanicked => StartError::EnginePanicked { console },
        // Nobody else has the machine yet, so it was not stopped from here.
        MachineEnd::Shutdown | MachineEnd::Stopped => StartError::TripleFault { console },
    }
}

fn guest_config(root: &GuestRoot, config: &VmConfig) -> GuestConfig {
    let defaults = GuestConfig::default();
    GuestConfig {
        hostname: config.hostname.clone().or_else(|| root.hostname.clone()).unwrap_or(defaults.hostname),
        resolv_conf: config.resolv_conf.clone(),
        env: root.env.clone(),
        workdir: root.workdir.clone(),
        user: root.user.clone(),
        overlay_size_bytes: config.overlay_size.0,
        root_device: "/dev/vda".to_owned(),
        root_fs: root.fs.clone(),
    }
}

fn kernel_path(config: &VmConfig) -> Result<PathBuf, StartError> {
    match &config.kernel {
        Kernel::Path(path) => Ok(path.clone()),
        Kernel::Cached => Ok(assets(config)?.kernel()),
    }
}

fn agent_path(config: &VmConfig) -> Result<PathBuf, StartError> {
    match &config.agent {
        Agent::Path(path) => Ok(path.clone()),
        Agent::Cached => Ok(assets(config)?.agent()),
    }
}

fn assets(config: &VmConfig) -> Result<Assets, StartError> {
    let user = || Assets::user().ok_or(StartError::Config("the user has no home folder, so name an asset cache"));
    config.assets.clone().map_or_else(user, Ok)
}

fn open(path: &Path, missing: fn(PathBuf) -> StartError) -> Result<File, StartError> {
    File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => missing(path.to_owned()),
        _ => StartError::Unreadable { path: path.to_owned(), source },
    })
}

fn read_agent(path: &Path) -> Result<Vec<u8>, StartError> {
    let unreadable = |source| StartError::Unreadable { path: path.to_owned(), source };
    let size = open(path, StartError::agent_missing)?.metadata().map_err(unreadable)?.len();
    if size > AGENT_MAX {
        return Err(StartError::Config("the agent is too large for an initramfs"));
    }
    fs::read(path).map_err(unreadable)
}
