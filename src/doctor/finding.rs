//! What is in the way of guests whatever their engine is, what costs time, and what sets limits.

use std::path::Path;
use std::path::PathBuf;

use serde::Serialize;

use super::Facts;
use crate::engine::Engine;
use crate::engine::Trial;
use crate::engine::obstacles;
use crate::vm::assets::{AGENT_COMMAND, KERNEL_COMMAND};

/// A VM has some ten threads and some twenty open files; fewer than these are soon used up by a pool.
const THREADS_FEW: u64 = 512;
const FILES_FEW: u64 = 1024;
/// Making a machine takes KVM some hundred microseconds; this much is felt by whoever restores guests.
const CREATE_SLOW_US: u64 = 2000;

/// Something about a host that whoever runs guests there wants to know.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "finding")]
#[non_exhaustive]
pub enum Finding {
    /// There is no guest kernel.
    #[error("there is no guest kernel{}", at(.searched.as_deref()))]
    NoKernel {
        /// Where it was looked for.
        searched: Option<PathBuf>,
    },
    /// There is no agent to put into guests.
    #[error("there is no guest agent{}", at(.searched.as_deref()))]
    NoAgent {
        /// Where it was looked for.
        searched: Option<PathBuf>,
    },
    /// Making a machine with KVM is slow.
    #[error("making a machine with KVM takes {micros} us{}", huge_pages(.nx_huge_pages.as_deref()))]
    SlowMachines {
        /// How long one took, in microseconds.
        micros: u64,
        /// KVM's `nx_huge_pages`: when it is on, a kernel thread is made for each machine.
        nx_huge_pages: Option<String>,
    },
    /// The host does not tell which pages a guest writes.
    #[error(
        "the host does not tell which pages a running guest writes ({error}): clones and snapshots of running guests pause them for longer"
    )]
    NoWriteWatch {
        /// Its error.
        error: String,
        /// Its kernel's release.
        release: Option<String>,
    },
    /// The host does not tell quickly which pages a guest has written.
    #[error(
        "the host does not tell which pages a guest has written ({error}): differences to a snapshot cannot be made without reading all memory"
    )]
    NoPageScan {
        /// Its error.
        error: String,
    },
    /// Guests' memory counts when it is mapped, not when it is used.
    #[error("the host counts all of a guest's memory from its start (vm.overcommit_memory = 2)")]
    StrictOvercommit,
    /// Control groups limit memory.
    #[error("memory is limited to {bytes} bytes by a control group")]
    MemoryLimit {
        /// To so many bytes.
        bytes: u64,
    },
    /// Control groups limit processes and threads.
    #[error("a control group allows {pids} threads, of which a guest takes some ten")]
    FewThreads {
        /// How many.
        pids: u64,
    },
    /// Control groups limit processors to less than one.
    #[error("a control group allows {cpus} of a processor")]
    PartOfAProcessor {
        /// How much.
        cpus: f64,
    },
    /// This process may open few files.
    #[error("this process may have {files} files open, of which a guest takes some twenty")]
    FewFiles {
        /// How many.
        files: u64,
    },
    /// This process may map a part of the address space only.
    #[error("this process may map {bytes} bytes, and each guest maps all of its memory")]
    AddressSpaceLimit {
        /// How many bytes.
        bytes: u64,
    },
}

fn at(path: Option<&Path>) -> String {
    match path {
        Some(path) => format!(" at {}", path.display()),
        None => ": this user has no home folder to look in".to_owned(),
    }
}

fn huge_pages(parameter: Option<&str>) -> &'static str {
    if parameter.is_some_and(is_on) { "; a kernel thread is made for each (nx_huge_pages)" } else { "" }
}

/// Of a boolean parameter of a kernel module, and of this one's own forms.
fn is_on(parameter: &str) -> bool {
    matches!(parameter, "Y" | "1" | "force" | "on")
}

impl Finding {
    /// Whether no guest can be started because of it.
    #[must_use]
    pub fn prevents_guests(&self) -> bool {
        matches!(self, Self::NoKernel { .. } | Self::NoAgent { .. })
    }

    /// What helps, for the user to do; `None` for what is only to be known.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        let text = match self {
            Self::NoKernel { .. } => format!("`{KERNEL_COMMAND}`"),
            Self::NoAgent { .. } => format!("`{AGENT_COMMAND}`"),
            Self::SlowMachines { nx_huge_pages: Some(parameter), .. } if is_on(parameter) => {
                "where no guest is hostile to the host's processor: `echo never | sudo tee /sys/module/kvm/parameters/nx_huge_pages`".to_owned()
            }
            Self::NoWriteWatch { .. } | Self::NoPageScan { .. } => {
                "run Linux 6.7 or newer, with userfaultfd; in a container, allow it in the seccomp profile".to_owned()
            }
            Self::StrictOvercommit => "`sudo sysctl vm.overcommit_memory=0`".to_owned(),
            Self::FewFiles { .. } => "`ulimit -n 20000`".to_owned(),
            Self::AddressSpaceLimit { .. } => "`ulimit -v unlimited`".to_owned(),
            Self::FewThreads { .. } => "raise the group's `pids.max`; of systemd, `TasksMax=`".to_owned(),
            Self::PartOfAProcessor { .. } => "raise the group's `cpu.max`; of systemd, `CPUQuota=`".to_owned(),
            Self::SlowMachines { .. } | Self::MemoryLimit { .. } => return None,
        };
        Some(text)
    }
}

/// What there is to say about a host with these facts.
pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let limits = &facts.cgroup;
    // It is of no interest how fast machines are made that no guest can run on.
    let kvm_usable = obstacles(Engine::Kvm, &facts.engines).is_empty();
    let machine = match &facts.engines.kvm.trial {
        Trial::Ran { create_us, .. } if *create_us >= CREATE_SLOW_US && kvm_usable => {
            Some(Finding::SlowMachines { micros: *create_us, nx_huge_pages: facts.engines.kvm.nx_huge_pages.clone() })
        }
        _ => None,
    };
    let all = [
        (!facts.kernel_found).then(|| Finding::NoKernel { searched: facts.kernel.clone() }),
        (!facts.agent_found).then(|| Finding::NoAgent { searched: facts.agent.clone() }),
        machine,
        facts.write_watch.clone().map(|error| Finding::NoWriteWatch { error, release: facts.release.clone() }),
        facts.page_scan.clone().map(|error| Finding::NoPageScan { error }),
        (facts.overcommit == Some(2)).then_some(Finding::StrictOvercommit),
        limits.memory.map(|bytes| Finding::MemoryLimit { bytes }),
        limits.pids.filter(|pids| *pids < THREADS_FEW).map(|pids| Finding::FewThreads { pids }),
        limits.cpus.filter(|cpus| *cpus < 1.0).map(|cpus| Finding::PartOfAProcessor { cpus }),
        facts.open_files.filter(|files| *files < FILES_FEW).map(|files| Finding::FewFiles { files }),
        facts.address_space.map(|bytes| Finding::AddressSpaceLimit { bytes }),
    ];
    all.into_iter().flatten().collect()
}
