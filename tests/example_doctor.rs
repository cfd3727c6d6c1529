//! `examples/kiln-doctor.rs` on this host, and on one that is made up.

#[path = "../examples/kiln-doctor.rs"]
#[allow(dead_code, reason = "its `main` is not run here")]
mod example;

use std::fs;
use std::path::Path;

use example::Form;
use kiln::doctor::{Facts, Report};
use kiln::engine::EngineFacts;
use kiln::vm::StartError;
use kiln::vm::assets::Assets;
use kiln::{Engine, Vm, VmConfig};

fn parse(line: &str) -> Option<Form> {
    example::parse(line.split_whitespace().map(str::to_owned))
}

/// A host of which only files under `root` are known.
fn host(root: &Path) -> Report {
    Report::of(Facts::read(root, EngineFacts::read(root), Some(&Assets::at(root.join("cache")))))
}

#[test]
fn a_host_without_a_kernel_is_not_ready_and_one_with_all_is() {
    assert_eq!((parse(""), parse("--json")), (Some(Form::Text), Some(Form::Json)));
    assert!(["--jason", "--json x", "x"].iter().all(|wrong| parse(wrong).is_none()));
    let root = tempfile::tempdir().unwrap();
    let text = example::print(&host(root.path()), Form::Text);
    assert!(text.contains("kvm: not usable\n    - there is no /dev/kvm") && text.contains("soft: usable"), "{text}");
    assert!(
        text.contains("\nproblems\n  - there is no guest kernel at ") && text.contains("`cargo xtask agent`"),
        "{text}"
    );
    assert!(!host(root.path()).is_ready());
    for file in ["cache/kernel/current/vmlinux", "cache/agent/current/kiln-agent"] {
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let report = host(root.path());
    assert!(report.is_ready(), "{report}");
    let value: serde_json::Value = serde_json::from_str(&example::print(&report, Form::Json)).unwrap();
    assert_eq!(value["auto"], "soft");
    assert_eq!(value["engines"][0]["obstacles"][0]["obstacle"], "no_device");
    assert_eq!(value["facts"]["kernel_found"], true);
}

#[tokio::test]
async fn this_host_is_told_and_what_it_says_is_what_a_vm_gets() {
    let report = kiln::doctor().await;
    let text = example::print(&report, Form::Text);
    assert!(text.starts_with("engines\n  kvm: ") && text.contains("soft: usable"), "{text}");
    // Again: the facts of this process, found out once.
    assert_eq!(kiln::doctor().await.engines, report.engines);
    let usable = |engine| report.engines.iter().any(|found| found.engine == engine && found.is_usable());
    assert_eq!(report.auto, Some(if usable(Engine::Kvm) { Engine::Kvm } else { Engine::Soft }));
    // A root that is not there is found after the engine, or before it; the engine's error says what the report does.
    let root = tempfile::NamedTempFile::new().unwrap();
    let (kernel, agent) = (root.path().to_owned(), root.path().to_owned());
    let config =
        VmConfig::new().engine(Engine::Kvm).kernel(kiln::vm::Kernel::Path(kernel)).agent(kiln::vm::Agent::Path(agent));
    let error = Vm::start(kiln::vm::GuestRoot::erofs(root.path()), config).await.expect_err("no kernel is empty");
    match error {
        StartError::NoEngine(error) => {
            let told = report.engines.iter().find(|found| found.engine == Engine::Kvm).unwrap();
            assert_eq!((error.engine, error.obstacles), (Engine::Kvm, told.obstacles.clone()));
        }
        other => assert!(usable(Engine::Kvm), "{other:?}"),
    }
}
