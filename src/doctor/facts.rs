//! What a report is made from, as plain data.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use serde::Serialize;

use super::CgroupLimits;
use crate::engine::EngineFacts;
use crate::mem;
use crate::vm::assets::Assets;

/// What there is to know about a host.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Facts {
    /// What engines depend on.
    pub engines: EngineFacts,
    /// Where the guest kernel is looked for; `None` when this user has no home.
    pub kernel: Option<PathBuf>,
    /// Whether it is there.
    pub kernel_found: bool,
    /// Where the agent is looked for; `None` when this user has no home.
    pub agent: Option<PathBuf>,
    /// Whether it is there.
    pub agent_found: bool,
    /// The host kernel's release.
    pub release: Option<String>,
    /// Why the host does not tell which pages are written (`userfaultfd`, `PAGEMAP_SCAN`); `None` when it does.
    pub write_watch: Option<String>,
    /// Why the host does not tell which pages belong to no file (`PAGEMAP_SCAN`, `/proc/self/pagemap`); `None` when it does.
    pub page_scan: Option<String>,
    /// `vm.unprivileged_userfaultfd`; `None` when the host has no `userfaultfd`, or none that can be told of.
    pub unprivileged_userfaultfd: Option<bool>,
    /// `vm.overcommit_memory`.
    pub overcommit: Option<u8>,
    /// The control groups' limits.
    pub cgroup: CgroupLimits,
    /// How many files this process may have open; `None` for any number.
    pub open_files: Option<u64>,
    /// How much memory this process may lock, in bytes; `None` for any amount.
    pub locked_memory: Option<u64>,
    /// How much memory this process may map, in bytes; `None` for any amount.
    pub address_space: Option<u64>,
}

impl Facts {
    /// Those that files under `root` and `assets` tell, with what is known of engines. What no file tells is asked of the
    /// running kernel. Blocking, for a millisecond or so.
    #[must_use]
    pub fn read(root: &Path, engines: EngineFacts, assets: Option<&Assets>) -> Self {
        let (kernel, agent) = (assets.map(Assets::kernel), assets.map(Assets::agent));
        let found = |path: &Option<PathBuf>| path.as_ref().is_some_and(|path| path.is_file());
        let limits = fs::read_to_string(root.join("proc/self/limits")).unwrap_or_default();
        Self {
            engines,
            kernel_found: found(&kernel),
            kernel,
            agent_found: found(&agent),
            agent,
            release: trimmed(root, "proc/sys/kernel/osrelease"),
            write_watch: mem::can_watch_writes().err().map(|error| error.to_string()),
            page_scan: mem::can_scan_pages().err().map(|error| error.to_string()),
            unprivileged_userfaultfd: trimmed(root, "proc/sys/vm/unprivileged_userfaultfd").map(|value| value == "1"),
            overcommit: trimmed(root, "proc/sys/vm/overcommit_memory").and_then(|value| value.parse().ok()),
            cgroup: CgroupLimits::read(root),
            open_files: soft_limit(&limits, "Max open files"),
            locked_memory: soft_limit(&limits, "Max locked memory"),
            address_space: soft_limit(&limits, "Max address space"),
        }
    }
}

fn trimmed(root: &Path, path: &str) -> Option<String> {
    fs::read_to_string(root.join(path)).ok().map(|text| text.trim().to_owned())
}

/// Of `/proc/<pid>/limits` (proc_pid_limits(5)): the name, the soft limit, the hard one, the unit.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max open files            1024                 524288               files     
Max locked memory         8388608              8388608              bytes     
Max address space         unlimited            unlimited            bytes     
";

    #[test]
    fn a_tree_is_read_where_it_is() {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in [
            ("proc/sys/kernel/osrelease", "6.1.0-40-amd64\n"),
            ("proc/sys/vm/unprivileged_userfaultfd", "0\n"),
            ("proc/sys/vm/overcommit_memory", "2\n"),
            ("proc/self/limits", LIMITS),
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/pids.max", "9\n"),
            ("cache/kernel/current/vmlinux", "a kernel"),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let assets = Assets::at(root.path().join("cache"));
        let facts = Facts::read(root.path(), EngineFacts::read(root.path()), Some(&assets));
        assert_eq!(facts.release.as_deref(), Some("6.1.0-40-amd64"));
        assert_eq!((facts.unprivileged_userfaultfd, facts.overcommit), (Some(false), Some(2)));
        assert_eq!((facts.open_files, facts.locked_memory, facts.address_space), (Some(1024), Some(8 << 20), None));
        assert_eq!(facts.cgroup.pids, Some(9));
        assert_eq!((facts.kernel_found, facts.agent_found), (true, false));
        assert_eq!(facts.kernel, Some(assets.kernel()));
    }

    #[test]
    fn an_empty_tree_tells_nothing() {
        let root = tempfile::tempdir().unwrap();
        let facts = Facts::read(root.path(), EngineFacts::read(root.path()), None);
        assert_eq!((facts.kernel, facts.kernel_found, facts.release, facts.overcommit), (None, false, None, None));
        assert_eq!((facts.open_files, facts.cgroup), (None, CgroupLimits::default()));
    }
}
