//! The limits of this process's control groups, of version 2 and version 1. See Linux, `Documentation/admin-guide/cgroup-v2.rst`
//! and `cgroup-v1/`, and cgroups(7).

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use serde::Serialize;

/// From here on version 1 says "no limit" for memory: the largest number that is whole pages, and some below.
const NO_LIMIT: u64 = 1 << 62;

/// What control groups allow this process, with all of its ancestors; `None` where there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CgroupLimits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Processors' time, in processors.
    pub cpus: Option<f64>,
}

impl CgroupLimits {
    /// Those that hold under `root`, as `/proc/self/cgroup` there says.
    pub(super) fn read(root: &Path) -> Self {
        let mut limits = Self::default();
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        for line in groups.lines() {
            // Number, controllers of version 1, path.
            let mut fields = line.splitn(3, ':').skip(1);
            if let (Some(controllers), Some(path)) = (fields.next(), fields.next()) {
                limits.tighten(&root.join("sys/fs/cgroup"), controllers, path);
            }
        }
        limits
    }

    fn tighten(&mut self, mounts: &Path, controllers: &str, path: &str) {
        if controllers.is_empty() {
            let group = Group::new(mounts.to_owned(), path);
            self.memory = least(self.memory, group.least(|dir| number(dir, "memory.max")));
            self.pids = least(self.pids, group.least(|dir| number(dir, "pids.max")));
            self.cpus = least(self.cpus, group.least(cpus_v2));
            return;
        }
        for controller in controllers.split(',') {
            // A hierarchy is mounted under the names of all its controllers, or has links of their names.
            let mount = [controllers, controller].map(|name| mounts.join(name)).into_iter().find(|dir| dir.is_dir());
            let Some(group) = mount.map(|mount| Group::new(mount, path)) else { continue };
            match controller {
                "memory" => self.memory = least(self.memory, group.least(|dir| number(dir, "memory.limit_in_bytes"))),
                "pids" => self.pids = least(self.pids, group.least(|dir| number(dir, "pids.max"))),
                "cpu" => self.cpus = least(self.cpus, group.least(cpus_v1)),
                _ => {}
            }
        }
    }
}

/// A group and its ancestors, up to the mount. In a container the path may name folders outside, which are not there.
struct Group {
    mount: PathBuf,
    dir: PathBuf,
}

impl Group {
    fn new(mount: PathBuf, path: &str) -> Self {
        // A path with `..` leads out of the container's view; of such a group nothing is known.
        let inside = path.trim_start_matches('/').split('/').take_while(|part| *part != "..");
        let dir = inside.fold(mount.clone(), |dir, part| dir.join(part));
        Self { mount, dir }
    }

    fn least<T: PartialOrd>(&self, limit: impl Fn(&Path) -> Option<T>) -> Option<T> {
        let dirs = self.dir.ancestors().take_while(|dir| dir.starts_with(&self.mount));
        dirs.fold(None, |so_far, dir| least(so_far, limit(dir)))
    }
}

fn least<T: PartialOrd>(one: Option<T>, other: Option<T>) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(if other < one { other } else { one }),
        (one, other) => one.or(other),
    }
}

/// `max` is no number, and so no limit.
fn number(dir: &Path, file: &str) -> Option<u64> {
    let number = fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()?;
    (number < NO_LIMIT).then_some(number)
}

/// `cpu.max`: time in a period, and the period.
fn cpus_v2(dir: &Path) -> Option<f64> {
    let text = fs::read_to_string(dir.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    share(quota.parse().ok()?, period.parse().ok()?)
}

/// A quota of -1 is no number here, and so no limit.
fn cpus_v1(dir: &Path) -> Option<f64> {
    share(number(dir, "cpu.cfs_quota_us")?, number(dir, "cpu.cfs_period_us")?)
}

fn share(quota: u64, period: u64) -> Option<f64> {
    (period > 0).then(|| quota as f64 / period as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(files: &[(&str, &str)]) -> CgroupLimits {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        CgroupLimits::read(root.path())
    }

    #[test]
    fn of_version_2_the_least_of_all_ancestors_counts() {
        let found = limits(&[
            ("proc/self/cgroup", "0::/user.slice/session\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/user.slice/session/memory.max", "max\n"),
            ("sys/fs/cgroup/user.slice/pids.max", "max\n"),
            ("sys/fs/cgroup/user.slice/session/pids.max", "64\n"),
            ("sys/fs/cgroup/user.slice/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/user.slice/session/cpu.max", "150000 100000\n"),
        ]);
        assert_eq!(found, CgroupLimits { memory: Some(1 << 30), pids: Some(64), cpus: Some(1.5) });
    }

    #[test]
    fn version_1_has_a_hierarchy_for_each_controller() {
        let found = limits(&[
            ("proc/self/cgroup", "9:name=systemd:/\n4:memory:/a/b\n3:cpu,cpuacct:/c\n2:pids:/\n0::/\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2097152\n"),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/pids/pids.max", "100\n"),
        ]);
        assert_eq!(found, CgroupLimits { memory: Some(2 << 20), pids: Some(100), cpus: Some(0.5) });
    }

    #[test]
    fn what_is_not_there_or_makes_no_sense_is_no_limit() {
        assert_eq!(limits(&[]), CgroupLimits::default());
        let found = limits(&[
            ("proc/self/cgroup", "0::/../../outside\nnonsense\n1:memory\n"),
            ("outside/memory.max", "1"),
            ("sys/fs/cgroup/memory.max", "many"),
            ("sys/fs/cgroup/cpu.max", "1 0"),
        ]);
        assert_eq!(found, CgroupLimits::default());
    }
}
