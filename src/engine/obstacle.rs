//! Why an engine cannot run guests: judged from facts alone.

use serde::Serialize;

use super::Engine;
use super::EngineFacts;
use super::KvmDevice;
use super::KvmFacts;
use super::Trial;
use crate::hv::HvError;

/// The interface's version, the only one since 2007.
const API_VERSION: i32 = 12;
/// Slowest kernel mode with which an engine is of use, in million instructions a second. Hardware does the loop that is
/// timed at more than 500; hosts whose kernel emulates the guest's kernel mode were seen to do 2, and a Linux guest takes
/// minutes to boot there. Between the two the software engine, at some 100, is the better choice below its own speed.
pub const KERNEL_MIPS_LEAST: f64 = 100.0;

/// What keeps an engine from running guests.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "obstacle")]
#[non_exhaustive]
pub enum Obstacle {
    /// The engine is part of another operating system.
    #[error("it is part of {wanted}, and this is {found}")]
    OtherSystem {
        /// The system that has it.
        wanted: &'static str,
        /// This one.
        found: String,
    },
    /// Guests are for another processor than this host's.
    #[error("guests are for {wanted}, and this processor is {found}")]
    OtherArchitecture {
        /// The guests' architecture.
        wanted: &'static str,
        /// The host's.
        found: String,
    },
    /// There is no `/dev/kvm`.
    #[error("there is no /dev/kvm")]
    NoDevice {
        /// Whether the processor says that it has virtualization.
        virtualization: Option<bool>,
    },
    /// This user may not open `/dev/kvm`.
    #[error("this user may not open /dev/kvm")]
    NoPermission {
        /// The group whose members may.
        group: Option<String>,
    },
    /// `/dev/kvm` is something else, or of a version that is not known.
    #[error("/dev/kvm speaks version {found} of its interface, where {API_VERSION} is known")]
    WrongApi {
        /// The version.
        found: i32,
    },
    /// KVM lacks something that guests need.
    #[error("KVM lacks {name}")]
    MissingCapability {
        /// What it is called.
        name: String,
    },
    /// The host refused something.
    #[error("the host refuses: {error}")]
    Refused {
        /// Its error.
        error: String,
    },
    /// The guest's kernel mode is emulated, an instruction at a time.
    #[error(
        "its kernel mode does {mips:.1} million instructions a second, where {KERNEL_MIPS_LEAST} are the least: it is emulated"
    )]
    KernelModeEmulated {
        /// How many million instructions a second.
        mips: f64,
    },
}

impl Obstacle {
    /// What helps, for the user to do; `None` when nothing on this host does.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        let text = match self {
            Self::OtherSystem { .. } | Self::OtherArchitecture { .. } => return None,
            Self::NoDevice { virtualization: Some(false) } => {
                "enable virtualization in the firmware; in a virtual machine, nested virtualization in its hypervisor".to_owned()
            }
            Self::NoDevice { .. } => "load the module: `sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`; in a container, pass the device in".to_owned(),
            Self::NoPermission { group: Some(group) } => format!("`sudo usermod -aG {group} $USER`, then log in again"),
            Self::NoPermission { group: None } => "`sudo setfacl -m u:$USER:rw /dev/kvm`".to_owned(),
            Self::WrongApi { .. } | Self::MissingCapability { .. } => "run a newer kernel".to_owned(),
            Self::Refused { .. } => "see the kernel's log: `sudo dmesg | grep -i kvm`".to_owned(),
            Self::KernelModeEmulated { .. } => {
                "use a host with hardware virtualization, or nested virtualization in its hypervisor; the soft engine is faster here".to_owned()
            }
        };
        Some(text)
    }

    /// What an engine's error means.
    pub(super) fn of_error(error: &HvError) -> Vec<Self> {
        match error {
            HvError::Missing { what } => Self::missing(what),
            other => vec![Self::Refused { error: chain(other) }],
        }
    }

    fn missing<S: AsRef<str>>(what: &[S]) -> Vec<Self> {
        what.iter().map(|name| Self::MissingCapability { name: name.as_ref().to_owned() }).collect()
    }
}

/// An error with its sources, as one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// What keeps `engine` from running Linux guests on a host with these facts; nothing when it is usable.
#[must_use]
pub fn obstacles(engine: Engine, facts: &EngineFacts) -> Vec<Obstacle> {
    match engine {
        // At least the soft engine is there.
        Engine::Auto | Engine::Soft => Vec::new(),
        Engine::Kvm => kvm(facts),
    }
}

fn kvm(facts: &EngineFacts) -> Vec<Obstacle> {
    let mut found = Vec::new();
    if facts.os != "linux" {
        found.push(Obstacle::OtherSystem { wanted: "Linux", found: facts.os.clone() });
    }
    if facts.arch != "x86_64" {
        found.push(Obstacle::OtherArchitecture { wanted: "x86_64", found: facts.arch.clone() });
    }
    // What is about the device says nothing where it cannot be.
    if found.is_empty() {
        device(&facts.kvm, &mut found);
    }
    // And a machine that was tried fails for what is known already.
    if found.is_empty() {
        trial(&facts.kvm.trial, &mut found);
    }
    found
}

fn device(facts: &KvmFacts, found: &mut Vec<Obstacle>) {
    match &facts.device {
        KvmDevice::Absent => found.push(Obstacle::NoDevice { virtualization: facts.virtualization }),
        KvmDevice::Denied { group } => found.push(Obstacle::NoPermission { group: group.clone() }),
        KvmDevice::Failed { error } => found.push(Obstacle::Refused { error: error.clone() }),
        KvmDevice::Open { api_version } if *api_version != API_VERSION => {
            found.push(Obstacle::WrongApi { found: *api_version });
        }
        KvmDevice::Open { .. } => {}
    }
}

fn trial(trial: &Trial, found: &mut Vec<Obstacle>) {
    match trial {
        Trial::NotTried => {}
        Trial::Lacking { what } => found.extend(Obstacle::missing(what)),
        Trial::Failed { error } => found.push(Obstacle::Refused { error: error.clone() }),
        Trial::Ran { kernel_mips, .. } => {
            if *kernel_mips < KERNEL_MIPS_LEAST {
                found.push(Obstacle::KernelModeEmulated { mips: *kernel_mips });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_device(device: KvmDevice) -> Vec<Obstacle> {
        kvm(&EngineFacts::made_up(KvmFacts { device, virtualization: Some(true), ..KvmFacts::default() }))
    }

    fn of_trial(trial: Trial) -> Vec<Obstacle> {
        let device = KvmDevice::Open { api_version: 12 };
        kvm(&EngineFacts::made_up(KvmFacts { device, trial, ..KvmFacts::default() }))
    }

    #[test]
    fn the_software_engine_needs_nothing() {
        let facts = EngineFacts { os: "plan9".to_owned(), arch: "sparc".to_owned(), kvm: KvmFacts::default() };
        assert_eq!(obstacles(Engine::Soft, &facts), []);
        assert_eq!(obstacles(Engine::Auto, &facts), []);
    }

    #[test]
    fn another_system_or_processor_is_all_that_is_said() {
        let facts = EngineFacts { os: "macos".to_owned(), arch: "aarch64".to_owned(), kvm: KvmFacts::default() };
        let said: Vec<_> = kvm(&facts).iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            ["it is part of Linux, and this is macos", "guests are for x86_64, and this processor is aarch64"]
        );
        assert!(kvm(&facts).iter().all(|obstacle| obstacle.remedy().is_none()));
    }

    #[test]
    fn each_state_of_the_device_has_its_obstacle_and_remedy() {
        let denied = |group: Option<&str>| KvmDevice::Denied { group: group.map(str::to_owned) };
        let remedy = |device| of_device(device)[0].remedy().unwrap();
        assert!(remedy(KvmDevice::Absent).contains("modprobe kvm_intel"));
        assert_eq!(remedy(denied(Some("kvm"))), "`sudo usermod -aG kvm $USER`, then log in again");
        assert!(remedy(denied(None)).contains("setfacl -m u:$USER:rw /dev/kvm"));
        assert_eq!(of_device(KvmDevice::Open { api_version: 11 }), [Obstacle::WrongApi { found: 11 }]);
        assert!(remedy(KvmDevice::Open { api_version: 11 }).contains("newer kernel"));
        let failed = of_device(KvmDevice::Failed { error: "no such device or address".to_owned() });
        assert_eq!(failed[0].to_string(), "the host refuses: no such device or address");
        assert!(failed[0].remedy().unwrap().contains("dmesg"));
        assert_eq!(of_device(KvmDevice::Open { api_version: 12 }), []);
    }

    #[test]
    fn without_a_device_the_remedy_depends_on_the_processor() {
        let remedy = |virtualization| Obstacle::NoDevice { virtualization }.remedy().unwrap();
        assert!(remedy(Some(false)).contains("firmware"));
        assert!(remedy(Some(true)).contains("modprobe") && remedy(None).contains("modprobe"));
    }

    #[test]
    fn a_trial_tells_emulated_from_native_kernel_mode() {
        let ran = |kernel_mips| of_trial(Trial::Ran { create_us: 300, kernel_mips });
        assert_eq!(ran(1.8), [Obstacle::KernelModeEmulated { mips: 1.8 }]);
        assert!(ran(1.8)[0].to_string().contains("1.8 million instructions a second"));
        assert!(ran(1.8)[0].remedy().is_some());
        assert_eq!(ran(KERNEL_MIPS_LEAST), []);
        assert_eq!(ran(2400.0), []);
        let lacking = of_trial(Trial::Lacking { what: vec!["KVM_CAP_XSAVE".to_owned(), "SSE2".to_owned()] });
        assert_eq!(lacking.len(), 2);
        assert_eq!(lacking[0].to_string(), "KVM lacks KVM_CAP_XSAVE");
        assert!(lacking[0].remedy().unwrap().contains("newer kernel"));
        assert_eq!(of_trial(Trial::Failed { error: "no".to_owned() }), [Obstacle::Refused { error: "no".to_owned() }]);
    }

    #[test]
    fn an_engines_errors_are_told_with_their_causes() {
        let call = HvError::Call { call: "KVM_CREATE_VM", source: std::io::ErrorKind::OutOfMemory.into() };
        let [refused] = &Obstacle::of_error(&call)[..] else { panic!("one obstacle") };
        assert_eq!(refused.to_string(), "the host refuses: KVM_CREATE_VM failed: out of memory");
        let missing = Obstacle::of_error(&HvError::Missing { what: vec!["SSE2", "FXSR"] });
        assert_eq!(missing.iter().map(ToString::to_string).collect::<Vec<_>>(), ["KVM lacks SSE2", "KVM lacks FXSR"]);
    }
}
