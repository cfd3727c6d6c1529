//! What the choice of an engine depends on, as plain data.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use serde::Serialize;

use super::kvm;
use super::trial::Trial;

/// What there is to know about a host's engines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineFacts {
    /// The operating system, as Rust names it.
    pub os: String,
    /// The processor's architecture, as Rust names it.
    pub arch: String,
    /// What belongs to KVM.
    pub kvm: KvmFacts,
}

/// What there is to know about a host's KVM. By default: nothing was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct KvmFacts {
    /// What opening `/dev/kvm` gave.
    pub device: KvmDevice,
    /// Whether the processor says that it has virtualization (`vmx` or `svm`); `None` when it is not known.
    pub virtualization: Option<bool>,
    /// `nx_huge_pages` of KVM's module: with it, each VM has a kernel thread of its own.
    pub nx_huge_pages: Option<String>,
    /// What became of a small machine.
    pub trial: Trial,
}

/// What opening `/dev/kvm` gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "opened")]
#[non_exhaustive]
pub enum KvmDevice {
    /// It does not exist.
    #[default]
    Absent,
    /// This user may not open it.
    Denied {
        /// The name of the group that owns it, if it has one and its members may open it.
        group: Option<String>,
    },
    /// Opening it failed otherwise, or it is not KVM.
    Failed {
        /// The host's error.
        error: String,
    },
    /// It answers.
    Open {
        /// Its version of the interface.
        api_version: i32,
    },
}

impl EngineFacts {
    /// Those of this host, found out once in a process: they are the host's and do not change with what VMs do. Blocks for
    /// some milliseconds the first time.
    pub fn of_this_process() -> &'static Self {
        static FACTS: OnceLock<EngineFacts> = OnceLock::new();
        FACTS.get_or_init(|| {
            let mut facts = Self::read(Path::new("/"));
            if matches!(facts.kvm.device, KvmDevice::Open { .. }) {
                facts.kvm.trial = Trial::of(&kvm::open);
            }
            facts
        })
    }

    /// Those that are read from files and devices under `root`; no machine is tried.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let kvm = KvmFacts {
            device: device(root),
            virtualization: fs::read_to_string(root.join("proc/cpuinfo")).ok().and_then(|text| virtualization(&text)),
            nx_huge_pages: trimmed(&root.join("sys/module/kvm/parameters/nx_huge_pages")),
            trial: Trial::NotTried,
        };
        Self { os: std::env::consts::OS.to_owned(), arch: std::env::consts::ARCH.to_owned(), kvm }
    }
}

#[cfg(test)]
impl EngineFacts {
    /// A host on which KVM could be.
    pub(super) fn made_up(kvm: KvmFacts) -> Self {
        Self { os: "linux".to_owned(), arch: "x86_64".to_owned(), kvm }
    }
}

/// A file's text without the white space around it.
fn trimmed(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Of `/proc/cpuinfo` (proc_cpuinfo(5)): the first processor's flags, which are all processors'.
fn virtualization(cpuinfo: &str) -> Option<bool> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'))?;
    Some(flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

fn device(root: &Path) -> KvmDevice {
    let path = root.join("dev/kvm");
    match kvm::examine(&path) {
        Ok(device) => device,
        Err(error) => match error.kind() {
            std::io::ErrorKind::NotFound => KvmDevice::Absent,
            std::io::ErrorKind::PermissionDenied => KvmDevice::Denied { group: group_of(root, &path) },
            _ => KvmDevice::Failed { error: error.to_string() },
        },
    }
}

/// The group whose members may read and write the file.
fn group_of(root: &Path, path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok().filter(|metadata| metadata.mode() & 0o060 == 0o060)?;
    let groups = fs::read_to_string(root.join("etc/group")).ok()?;
    group_named(&groups, metadata.gid())
}

/// Of `/etc/group` (group(5)): name, password, number, members.
fn group_named(groups: &str, gid: u32) -> Option<String> {
    let mut fields = groups.lines().map(|line| line.split(':'));
    fields.find_map(|mut group| {
        let name = group.next()?;
        (group.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_found_as_whole_words() {
        assert_eq!(virtualization("model name\t: X\nflags\t\t: fpu vmx sse\nflags\t\t: fpu\n"), Some(true));
        assert_eq!(virtualization("flags : fpu svm"), Some(true));
        assert_eq!(virtualization("flags\t: fpu svm_lock nosvm\n"), Some(false));
        assert_eq!(virtualization("Features\t: fp asimd\n"), None);
    }

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nkvm:x:104:alice,bob\nbroken\nother:x:10:\n";
        assert_eq!(group_named(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_named(groups, 1), None);
        assert_eq!(group_named(groups, 10).as_deref(), Some("other"));
    }

    #[test]
    fn an_empty_tree_has_no_engine_but_ours() {
        let root = tempfile::tempdir().unwrap();
        let facts = EngineFacts::read(root.path());
        assert_eq!(facts.kvm, KvmFacts::default());
    }

    #[test]
    fn a_tree_is_read_where_it_is() {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in [
            ("proc/cpuinfo", "flags\t: svm\n"),
            ("sys/module/kvm/parameters/nx_huge_pages", "Y\n"),
            ("dev/kvm", "a file"),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let kvm = EngineFacts::read(root.path()).kvm;
        assert_eq!((kvm.virtualization, kvm.nx_huge_pages.as_deref()), (Some(true), Some("Y")));
        // There is something, and it does not speak KVM's language.
        assert!(matches!(kvm.device, KvmDevice::Failed { .. }), "{:?}", kvm.device);
    }

    #[test]
    fn the_probe_is_made_once() {
        let first: *const _ = EngineFacts::of_this_process();
        assert!(std::ptr::eq(first, EngineFacts::of_this_process()));
    }
}
