//! The report: plain data, and text for people.

use std::fmt;

use serde::Serialize;

use super::Facts;
use super::Finding;
use super::finding::findings;
use crate::engine::Engine;
use crate::engine::Obstacle;
use crate::engine::obstacles;

/// What [`doctor`](crate::doctor()) found. Prints as text for people.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The engines, best first.
    pub engines: Vec<EngineReport>,
    /// What [`Engine::Auto`] stands for on this host.
    pub auto: Option<Engine>,
    /// What else there is to know; first what prevents guests.
    pub findings: Vec<Finding>,
    /// What all of it follows from.
    pub facts: Facts,
}

/// An engine on this host.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EngineReport {
    /// Which one.
    pub engine: Engine,
    /// What keeps it from running Linux guests; nothing when it is usable.
    pub obstacles: Vec<Obstacle>,
}

impl EngineReport {
    /// Whether it can run Linux guests.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.obstacles.is_empty()
    }
}

impl Report {
    /// What follows from `facts`.
    #[must_use]
    pub fn of(facts: Facts) -> Self {
        let engines: Vec<_> = Engine::ALL
            .into_iter()
            .map(|engine| EngineReport { engine, obstacles: obstacles(engine, &facts.engines) })
            .collect();
        let auto = engines.iter().find(|report| report.is_usable()).map(|report| report.engine);
        Self { engines, auto, findings: findings(&facts), facts }
    }

    /// Whether guests can be started: some engine is usable, and kernel and agent are there.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.auto.is_some() && !self.findings.iter().any(Finding::prevents_guests)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "engines")?;
        for report in &self.engines {
            writeln!(f, "  {}: {}", report.engine, if report.is_usable() { "usable" } else { "not usable" })?;
            for obstacle in &report.obstacles {
                item(f, "    ", obstacle, obstacle.remedy())?;
            }
        }
        if let Some(engine) = self.auto {
            writeln!(f, "  guests run on {engine} unless another is named")?;
        }
        let (problems, notes): (Vec<_>, Vec<_>) = self.findings.iter().partition(|finding| finding.prevents_guests());
        for (title, findings) in [("problems", problems), ("notes", notes)] {
            if !findings.is_empty() {
                writeln!(f, "{title}")?;
            }
            for finding in findings {
                item(f, "  ", finding, finding.remedy())?;
            }
        }
        write!(
            f,
            "{}",
            if self.is_ready() { "ready: guests can be started" } else { "not ready: no guest can be started" }
        )
    }
}

fn item(f: &mut fmt::Formatter<'_>, indent: &str, what: &dyn fmt::Display, remedy: Option<String>) -> fmt::Result {
    writeln!(f, "{indent}- {what}")?;
    match remedy {
        Some(remedy) => writeln!(f, "{indent}  {remedy}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::CgroupLimits;
    use super::*;
    use crate::engine::{EngineFacts, KvmDevice, KvmFacts, Trial};

    /// A host on which nothing is amiss, with kernel mode as fast as hardware's.
    fn good() -> Facts {
        let kvm = KvmFacts {
            device: KvmDevice::Open { api_version: 12 },
            virtualization: Some(true),
            nx_huge_pages: Some("N".to_owned()),
            trial: Trial::Ran { create_us: 300, kernel_mips: 3000.0 },
        };
        Facts {
            engines: EngineFacts { os: "linux".to_owned(), arch: "x86_64".to_owned(), kvm },
            kernel: Some("/cache/vmlinux".into()),
            kernel_found: true,
            agent: Some("/cache/kiln-agent".into()),
            agent_found: true,
            release: Some("6.12.1".to_owned()),
            write_watch: None,
            page_scan: None,
            unprivileged_userfaultfd: Some(true),
            overcommit: Some(0),
            cgroup: CgroupLimits::default(),
            open_files: Some(20_000),
            locked_memory: Some(8 << 20),
            address_space: None,
        }
    }

    /// What is found when `change` is made to a good host.
    fn found(change: impl FnOnce(&mut Facts)) -> Vec<Finding> {
        let mut facts = good();
        change(&mut facts);
        Report::of(facts).findings
    }

    #[test]
    fn of_a_good_host_there_is_nothing_to_say() {
        let report = Report::of(good());
        assert!(report.is_ready() && report.findings.is_empty());
        assert_eq!(report.auto, Some(Engine::Kvm));
        assert_eq!(
            report.to_string(),
            "engines\n  kvm: usable\n  soft: usable\n  guests run on kvm unless another is named\n\
             ready: guests can be started"
        );
    }

    #[test]
    fn an_emulated_kernel_mode_leaves_the_software_engine() {
        let mut facts = good();
        facts.engines.kvm.trial = Trial::Ran { create_us: 300, kernel_mips: 1.8 };
        let report = Report::of(facts);
        assert!(report.is_ready());
        assert_eq!(report.auto, Some(Engine::Soft));
        let text = report.to_string();
        assert!(text.contains("kvm: not usable\n    - its kernel mode does 1.8 million"), "{text}");
        assert!(text.contains("\n      use a host with hardware virtualization"), "{text}");
    }

    #[test]
    fn without_kernel_or_agent_no_guest_is_started() {
        let mut facts = good();
        (facts.kernel_found, facts.agent_found, facts.agent) = (false, false, None);
        let report = Report::of(facts);
        assert!(!report.is_ready());
        let text = report.to_string();
        assert!(text.contains("- there is no guest kernel at /cache/vmlinux\n    `cargo xtask kernel`"), "{text}");
        assert!(
            text.contains("guest agent: this user has no home folder to look in\n    `cargo xtask agent`"),
            "{text}"
        );
        assert!(text.ends_with("not ready: no guest can be started"), "{text}");
    }

    #[test]
    fn each_condition_has_its_note() {
        let text = || "not here".to_owned();
        let release = Some("6.12.1".to_owned());
        let cases = [
            (found(|f| f.write_watch = Some(text())), Finding::NoWriteWatch { error: text(), release }),
            (found(|f| f.page_scan = Some(text())), Finding::NoPageScan { error: text() }),
            (found(|f| f.overcommit = Some(2)), Finding::StrictOvercommit),
            (found(|f| f.cgroup.memory = Some(1 << 30)), Finding::MemoryLimit { bytes: 1 << 30 }),
            (found(|f| f.cgroup.pids = Some(511)), Finding::FewThreads { pids: 511 }),
            (found(|f| f.cgroup.cpus = Some(0.5)), Finding::PartOfAProcessor { cpus: 0.5 }),
            (found(|f| f.open_files = Some(256)), Finding::FewFiles { files: 256 }),
            (found(|f| f.address_space = Some(1 << 32)), Finding::AddressSpaceLimit { bytes: 1 << 32 }),
        ];
        for (found, expected) in cases {
            assert!(!expected.prevents_guests());
            assert_eq!(expected.remedy().is_none(), matches!(expected, Finding::MemoryLimit { .. }));
            assert_eq!(found, [expected]);
        }
        assert!(found(|f| f.cgroup.cpus = Some(1.0)).is_empty() && found(|f| f.cgroup.pids = Some(512)).is_empty());
        assert!(found(|f| f.overcommit = Some(1)).is_empty() && found(|f| f.open_files = None).is_empty());
    }

    #[test]
    fn slow_machines_are_told_with_the_reason_that_is_known() {
        let slow = |nx_huge_pages: &str| {
            found(|f| {
                f.engines.kvm.nx_huge_pages = Some(nx_huge_pages.to_owned());
                f.engines.kvm.trial = Trial::Ran { create_us: 45_000, kernel_mips: 3000.0 };
            })
        };
        let [on] = &slow("Y")[..] else { panic!("one finding") };
        assert_eq!(
            on.to_string(),
            "making a machine with KVM takes 45000 us; a kernel thread is made for each (nx_huge_pages)"
        );
        assert!(on.remedy().unwrap().contains("nx_huge_pages"));
        let [off] = &slow("N")[..] else { panic!("one finding") };
        assert_eq!((off.to_string().as_str(), off.remedy()), ("making a machine with KVM takes 45000 us", None));
    }

    #[test]
    fn a_report_is_plain_data() {
        let value = serde_json::to_value(Report::of(good())).unwrap();
        assert_eq!((&value["auto"], &value["engines"][0]["engine"]), (&"kvm".into(), &"kvm".into()));
        assert_eq!(value["facts"]["engines"]["kvm"]["trial"]["kernel_mips"], 3000.0);
    }
}
