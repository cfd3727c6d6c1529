//! The suite against agents that are broken on purpose, one fault each: the case that looks for it must fail.

#[path = "broken_agents/fake.rs"]
mod fake;

use fake::Fake;
use fake::Fault;
use kiln_conformance::Only;
use kiln_conformance::Report;
use kiln_conformance::Verdict;
use kiln_conformance::agent;

fn report(fault: Fault, only: &[&str]) -> Report {
    let fake = Fake::start(fault);
    agent::run(&fake.target(), &Only::new(only.iter().copied()), |_| {}).expect("the fake is good enough to begin")
}

/// What was seen where the case `id` fails because of `fault`; it holds for the same agent without the fault.
fn seen(fault: Fault, id: &str) -> String {
    seen_beside(Fault::None, fault, id)
}

/// As [`seen`], beside an agent that is as sound as `sound` says.
fn seen_beside(sound: Fault, fault: Fault, id: &str) -> String {
    let sound = report(sound, &[id]);
    assert_eq!(sound.verdict(id), Some(&Verdict::Holds), "without a fault\n{sound}");
    let broken = report(fault, &[id]);
    match broken.verdict(id) {
        Some(Verdict::Fails(seen)) => seen.clone(),
        other => panic!("{id} does not notice {fault:?}: {other:?}"),
    }
}

#[test]
fn output_after_exit_is_noticed() {
    let seen = seen(Fault::ExitBeforeOutput, "A51");
    assert!(seen.contains("of 1048576 bytes before EXIT"), "{seen}");
}

#[test]
fn standard_error_that_is_forgotten_is_noticed() {
    let seen = seen(Fault::ForgetsStderr, "A43");
    assert!(seen.contains("stderr is \"\""), "{seen}");
}

#[test]
fn standard_error_among_the_output_is_noticed() {
    seen(Fault::MergesStderr, "A43");
}

#[test]
fn an_oversize_header_that_is_ignored_is_noticed() {
    let seen = seen(Fault::IgnoresOversize, "A07");
    assert!(seen.contains("neither a frame nor an end"), "{seen}");
}

#[test]
fn a_process_that_outlives_its_host_is_noticed() {
    let seen = seen(Fault::NeverKills, "A56");
    assert!(seen.contains("still running"), "{seen}");
}

#[test]
fn a_signal_for_the_leader_only_is_noticed() {
    seen(Fault::SignalsLeaderOnly, "A53");
}

#[test]
fn an_unknown_frame_that_ends_the_session_is_noticed() {
    seen(Fault::EndsAtUnknown, "A03");
}

#[test]
fn an_end_of_file_that_is_ignored_is_noticed() {
    seen(Fault::IgnoresEndOfFile, "A41");
}

#[test]
fn a_wrong_code_for_a_signal_is_noticed() {
    seen(Fault::BareSignal, "A50");
}

#[test]
fn a_strange_length_of_exit_is_noticed() {
    seen(Fault::LongExit, "A49");
}

#[test]
fn an_agent_that_does_not_close_is_noticed() {
    seen(Fault::NeverCloses, "A48");
}

#[test]
fn a_wrong_protocol_number_is_noticed() {
    seen(Fault::OtherProtocol, "A74");
}

#[test]
fn a_case_whose_feature_is_not_announced_is_skipped_and_said_to_be() {
    let report = report(Fault::None, &["A102", "A74"]);
    assert_eq!(report.summary(), "1 passed, 0 failed, 1 skipped");
    let Some(Verdict::NotApplicable(why)) = report.verdict("A102") else { panic!("{report}") };
    assert_eq!(why, "agent does not announce feature streams");
}

#[test]
fn a_feature_that_is_announced_and_not_served_is_noticed() {
    let report = report(Fault::PromisesStreams, &["A102", "A105", "A111"]);
    assert_eq!(report.summary(), "0 passed, 3 failed, 0 skipped", "{report}");
}

#[test]
fn a_workload_that_is_announced_and_not_served_is_noticed() {
    let only: Vec<_> = (117..=132).filter(|number| *number != 118).map(|number| format!("A{number}")).collect();
    let report = report(Fault::PromisesWorkload, &only.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(report.summary(), "0 passed, 15 failed, 0 skipped", "{report}");
}

#[test]
fn a_sound_workload_keeps_every_case() {
    let only: Vec<_> = (117..=132).filter(|number| *number != 118).map(|number| format!("A{number}")).collect();
    let report = report(Fault::Workload, &only.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(report.summary(), "15 passed, 0 failed, 0 skipped", "{report}");
}

#[test]
fn a_renewal_that_is_not_checked_is_noticed() {
    seen_beside(Fault::RefusesRenewal, Fault::RenewsAnything, "A133");
}

#[test]
fn a_second_workload_beside_the_first_is_noticed() {
    seen_beside(Fault::Workload, Fault::StartsTwice, "A119");
}

#[test]
fn one_run_taken_for_another_is_noticed() {
    seen_beside(Fault::Workload, Fault::MixesRunsUp, "A132");
}

#[test]
fn lost_bytes_that_nobody_tells_of_are_noticed() {
    let seen = seen_beside(Fault::Workload, Fault::ForgetsLost, "A127");
    assert!(seen.contains("0 lost of 4000007"), "{seen}");
}

#[test]
fn a_workload_that_waits_for_its_readers_is_noticed() {
    seen_beside(Fault::Workload, Fault::HoldsWorkloadUp, "A126");
}

#[test]
fn a_workload_that_goes_with_its_host_is_noticed() {
    seen_beside(Fault::Workload, Fault::WorkloadDiesWithHost, "A129");
}

#[test]
fn a_signal_for_the_workloads_leader_only_is_noticed() {
    let seen = seen_beside(Fault::Workload, Fault::WorkloadSignalsLeaderOnly, "A131");
    assert!(seen.contains("still running"), "{seen}");
}
