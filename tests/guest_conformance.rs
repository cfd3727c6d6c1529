//! The protocol's conformance cases against the agent of a real guest, through the VM's exec socket.
#![allow(clippy::print_stdout, reason = "the report is what this test is for")]

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use kiln_conformance::Only;
use kiln_conformance::Verdict;
use kiln_conformance::agent;
use kiln_conformance::agent::Target;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_for_agents_holds_in_a_guest() {
    let vm = guest::boot().await;
    let folder = tempfile::tempdir().expect("a folder");
    let socket = vm.exec_socket(folder.path().join("exec.sock")).await.expect("bound");
    let target = Target::Socket(socket.path().to_owned());
    // The suite blocks: its sessions must not wait for the runtime that serves them.
    let running = tokio::task::spawn_blocking(move || agent::run(&target, &Only::default(), |_| {}));
    let report = running.await.expect("no panic").expect("the agent answers");
    println!("{report}");
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(report.lines.len(), agent::cases().count());
    for line in &report.lines {
        if let Verdict::NotApplicable(why) = &line.verdict {
            // The suite cannot listen on the guest's ports; `guest_tcp` connects to servers in the guest.
            assert_eq!(why, "agent has a machine of its own", "{line}");
        }
    }
    assert!(report.passed() >= 121, "{report}");
}
