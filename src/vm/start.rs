//! From configuration to a guest whose agent answers.

use std::fs::File;
use std::io;
use std::io::Read;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_wire::AGENT_PORT;
use kiln_wire::boot::GuestConfig;

use super::CONSOLE_LINES;
use super::Vm;
use super::assets::Assets;
use super::config::Agent;
use super::config::GuestRoot;
use super::config::Kernel;
use super::config::VmConfig;
use super::error::StartError;
use super::restore::check_machine_id;
use super::template::Files;
use super::template::FromStart;
use super::template::Provenance;
use super::template::Template;
use super::template::digest_of;
use crate::block::BlockBackend;
use crate::block::ConcatBackend;
use crate::block::FileBackend;
use crate::exec;
use crate::exec::ExecError;
use crate::image::run_blocking;
use crate::vmm::Machine;
use crate::vmm::MachineConfig;
use crate::vmm::MachineEnd;
use crate::vmm::MachineError;
use crate::vmm::boot::BootError;
use crate::vmm::boot::ElfError;
use crate::vmm::boot::cpio;
use crate::vmm::boot::layout::MAX_VCPUS;

/// Largest agent taken into an initramfs; ours is a few MiB.
const AGENT_MAX: u64 = 64 << 20;

/// The files that a guest boots from, open: they stay the same ones whatever becomes of their names.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) kernel: (PathBuf, File),
    pub(super) agent: (PathBuf, File),
}

impl Sources {
    pub(super) fn open(config: &VmConfig) -> Result<Self, StartError> {
        Ok(Self { kernel: open_kernel(config)?, agent: open_agent(config)? })
    }

    /// The same files once more.
    pub(super) fn again(&self) -> Result<Self, StartError> {
        Ok(Self { kernel: again(&self.kernel)?, agent: again(&self.agent)? })
    }
}

/// Boots `guest` and waits until its agent answers.
///
/// # Cancel safety
/// Dropping the future stops what has been started.
pub(super) async fn boot(
    config: VmConfig,
    guest: GuestConfig,
    prepare: impl FnOnce(&VmConfig) -> Result<(Arc<Template>, Sources), StartError> + Send + 'static,
) -> Result<Vm, StartError> {
    let answer = config.boot_timeout;
    let (machine, template) = run_blocking(move || {
        let (template, sources) = prepare(&config)?;
        let machine = machine(&config, &guest, &template, sources)?;
        Ok::<_, StartError>((machine, template))
    })
    .await?;
    let ready = exec::wait_ready(machine.connector(), answer);
    let info = unless_ended(&machine, answer, ready).await?;
    tracing::debug!(?info, port = AGENT_PORT, "agent answers");
    Ok(Vm::over(machine, template, info))
}

/// Reads the files and starts the machine. Blocks for as long as reading a kernel takes.
fn machine(
    config: &VmConfig,
    guest: &GuestConfig,
    template: &Template,
    sources: Sources,
) -> Result<Machine, StartError> {
    guest.machine_id.as_deref().map_or(Ok(()), check_machine_id)?;
    let Sources { kernel: (kernel_path, kernel), agent: (agent_path, agent) } = sources;
    let agent = read_agent(&agent_path, &agent)?;
    let machine = MachineConfig {
        memory: config.memory,
        vcpus: vcpus(config)?,
        kernel,
        initramfs: cpio::initramfs(&agent, &guest.to_json()),
        disks: template.disks.clone(),
        verbose_boot: config.verbose_boot,
        extra_cmdline: config.extra_cmdline.clone(),
    };
    Machine::start(&*template.engine, machine).map_err(|error| match error {
        // A kernel that is one, but does not fit, is the memory's fault.
        MachineError::Boot(BootError::Kernel(ElfError::OutsideRam { .. })) => StartError::Machine(error),
        MachineError::Boot(BootError::Kernel(source)) => StartError::KernelNotElf { path: kernel_path, source },
        other => StartError::Machine(other),
    })
}

/// How many vCPUs the guest is to have.
pub(super) fn vcpus(config: &VmConfig) -> Result<NonZeroU8, StartError> {
    let vcpus = NonZeroU8::new(config.vcpus).filter(|vcpus| vcpus.get() <= MAX_VCPUS);
    vcpus.ok_or(StartError::Config("a guest has one to eight vCPUs"))
}

/// The files one after another; a single one may have any length.
pub(super) fn disk(paths: &[PathBuf]) -> Result<Arc<dyn BlockBackend>, StartError> {
    let mut files = open_all(paths)?;
    let path = paths.first().cloned().ok_or(StartError::Config("the root filesystem has no file"))?;
    let unreadable = |source| StartError::Unreadable { path, source };
    match files.pop() {
        Some(only) if files.is_empty() => Ok(Arc::new(FileBackend::new(only).map_err(unreadable)?)),
        last => Ok(Arc::new(ConcatBackend::new(files.into_iter().chain(last)).map_err(unreadable)?)),
    }
}

/// What the agent says in `answer`, unless the machine ends first or `timeout`, which is the answer's, has passed.
pub(super) async fn unless_ended<T>(
    machine: &Machine,
    timeout: Duration,
    answer: impl Future<Output = Result<T, ExecError>>,
) -> Result<T, StartError> {
    let console = || machine.console().last_lines(CONSOLE_LINES);
    tokio::select! {
        // The end first: a guest that is gone also refuses connections.
        biased;
        end = machine.ended() => Err(ended_early(end, console())),
        answer = answer => match answer {
            Ok(answer) => Ok(answer),
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

/// What the agent, as PID 1, makes of the guest.
pub(super) fn guest_config(root: &GuestRoot, config: &VmConfig) -> GuestConfig {
    let defaults = GuestConfig::default();
    GuestConfig {
        hostname: config.hostname.clone().or_else(|| root.hostname.clone()).unwrap_or(defaults.hostname),
        machine_id: config.machine_id.clone(),
        resolv_conf: config.resolv_conf.clone(),
        env: root.env.clone(),
        workdir: root.workdir.clone(),
        user: root.user.clone(),
        overlay_size_bytes: config.overlay_size.0,
        root_device: "/dev/vda".to_owned(),
        root_fs: root.fs.clone(),
    }
}

/// The guest kernel and where it is.
fn open_kernel(config: &VmConfig) -> Result<(PathBuf, File), StartError> {
    let path = match &config.kernel {
        Kernel::Path(path) => path.clone(),
        Kernel::Cached => assets(config)?.kernel(),
    };
    let file = open(&path, StartError::kernel_missing)?;
    Ok((path, file))
}

/// The agent and where it is.
fn open_agent(config: &VmConfig) -> Result<(PathBuf, File), StartError> {
    let path = match &config.agent {
        Agent::Path(path) => path.clone(),
        Agent::Cached => assets(config)?.agent(),
    };
    let file = open(&path, StartError::agent_missing)?;
    Ok((path, file))
}

fn again((path, file): &(PathBuf, File)) -> Result<(PathBuf, File), StartError> {
    let file = file.try_clone().map_err(|source| StartError::Unreadable { path: path.clone(), source })?;
    Ok((path.clone(), file))
}

/// What names the content of a root filesystem; reads it all if nobody has said.
pub(super) fn root_digest(root: &GuestRoot) -> Result<String, StartError> {
    if let Some(digest) = &root.digest {
        return Ok(digest.clone());
    }
    let files = open_all(&root.files)?;
    let unreadable = |source| StartError::Unreadable { path: root.files.first().cloned().unwrap_or_default(), source };
    digest_of(&files).map(|digest| digest.to_string()).map_err(unreadable)
}

/// The files of a guest's origin, open, to be digested when somebody asks.
pub(super) fn provenance(root: &GuestRoot, sources: &Sources) -> Result<Provenance, StartError> {
    let Sources { kernel, agent } = sources.again()?;
    let files = Files {
        root: open_all(&root.files)?,
        root_digest: root.digest.clone(),
        kernel: Some(kernel.1),
        agent: Some(agent.1),
    };
    Ok(Provenance::of(files))
}

fn open_all(paths: &[PathBuf]) -> Result<Vec<File>, StartError> {
    let open =
        |path: &PathBuf| File::open(path).map_err(|source| StartError::Unreadable { path: path.clone(), source });
    paths.iter().map(open).collect()
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

fn read_agent(path: &Path, file: &File) -> Result<Vec<u8>, StartError> {
    let mut agent = Vec::new();
    // A byte more than may be there tells one that is too large.
    let read = FromStart::of(file).take(AGENT_MAX + 1).read_to_end(&mut agent);
    read.map_err(|source| StartError::Unreadable { path: path.to_owned(), source })?;
    if agent.len() as u64 > AGENT_MAX {
        return Err(StartError::Config("the agent is too large for an initramfs"));
    }
    Ok(agent)
}
