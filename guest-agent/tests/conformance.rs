//! The agent keeps the protocol document: every numbered case holds, but for those that would set this machine's clock.
#![allow(clippy::print_stdout, reason = "the report is what this test is for")]

use kiln_conformance::CommandLine;
use kiln_conformance::Only;
use kiln_conformance::Verdict;
use kiln_conformance::agent;
use kiln_conformance::agent::Target;

#[test]
fn every_case_for_agents_holds() {
    let command = CommandLine::new([env!("CARGO_BIN_EXE_kiln-agent"), "--unix", "{socket}"]).expect("has a socket");
    let report = agent::run(&Target::Command(command), &Only::default(), |_| {}).expect("the agent answers");
    println!("{report}");
    assert_eq!(report.failed(), 0, "{report}");
    assert_eq!(report.lines.len(), agent::cases().count());
    // A suite that runs nothing must not pass.
    assert!(report.passed() >= 126, "{report}");
    for line in &report.lines {
        if let Verdict::NotApplicable(why) = &line.verdict {
            assert!(why.starts_with("agent shares this machine"), "{line}");
        }
    }
}
