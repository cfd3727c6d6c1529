//! The exec layer keeps the protocol document, seen through the example `exec_socket`: every numbered case for hosts holds.
#![allow(clippy::print_stdout, reason = "the report is what this test is for")]

use std::path::PathBuf;

use kiln_conformance::CommandLine;
use kiln_conformance::Only;
use kiln_conformance::host;

/// The example, which cargo builds with the tests: `target/PROFILE/examples` beside this test's `target/PROFILE/deps`.
fn example() -> PathBuf {
    let this = std::env::current_exe().expect("this test has a path");
    let profile = this.ancestors().nth(2).expect("cargo puts tests two levels below the profile's folder");
    let example = profile.join("examples/exec_socket");
    let built = "`cargo test` builds it, and so does `cargo build --example exec_socket`";
    assert!(example.is_file(), "{} is missing: {built}", example.display());
    example
}

#[test]
fn every_case_for_hosts_holds() {
    let command = CommandLine::new([&*example().to_string_lossy(), "{socket}"]).expect("has a socket");
    let report = host::run(&command, &Only::default(), |_| {}).expect("there is a place for sockets");
    println!("{report}");
    assert_eq!((report.passed(), report.failed(), report.skipped()), (host::cases().count(), 0, 0), "{report}");
}
