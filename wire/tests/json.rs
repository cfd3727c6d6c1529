//! REQUEST, CONTROL, ERROR and the boot configuration as other implementations write them.

use std::collections::BTreeMap;

use kiln_wire::boot::GuestConfig;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::failure::Failure;
use kiln_wire::failure::error_kind;
use kiln_wire::lost::Lost;
use kiln_wire::request::Request;
use kiln_wire::started::Started;

#[test]
fn a_request_needs_only_argv() {
    let request: Request = serde_json::from_str(r#"{"argv":["true"],"from_the_future":1}"#).expect("valid");
    assert_eq!(request, Request { argv: vec!["true".to_owned()], ..Request::default() });
}

#[test]
fn a_request_without_argv_is_refused() {
    serde_json::from_str::<Request>(r#"{"env":{}}"#).expect_err("argv is required");
}

#[test]
fn an_unknown_action_is_told_apart_from_a_malformed_one() {
    assert_eq!(serde_json::from_str::<Control>(r#"{"action":"dance","tempo":3}"#).expect("valid"), Control::Unknown);
    assert_eq!(serde_json::from_str::<Control>(r#"{"action":"probe"}"#).expect("valid"), Control::Probe);
    serde_json::from_str::<Control>(r#"{"action":"signal"}"#).expect_err("signum is required");
}

#[test]
fn an_acknowledgement_carries_only_what_it_has() {
    assert_eq!(serde_json::to_string(&ControlAck::done()).expect("serialises"), r#"{"ok":true}"#);
    assert_eq!(serde_json::to_string(&ControlAck::refused("no")).expect("serialises"), r#"{"ok":false,"error":"no"}"#);
}

#[test]
fn actions_that_open_a_stream_are_told_apart() {
    let parse = |json| serde_json::from_str::<Control>(json).expect("valid");
    for json in [
        r#"{"action":"open_read","path":"/a"}"#,
        r#"{"action":"open_write","path":"/a","mode":420}"#,
        r#"{"action":"connect","port":80}"#,
        r#"{"action":"pack","path":"/a"}"#,
        r#"{"action":"unpack","path":"/a"}"#,
        r#"{"action":"workload_logs"}"#,
        r#"{"action":"workload_logs","run":1,"from":18446744073709551615}"#,
        r#"{"action":"workload_wait"}"#,
    ] {
        assert!(parse(json).opens_stream(), "{json}");
    }
    for json in [r#"{"action":"probe"}"#, r#"{"action":"read_file","path":"/a"}"#, r#"{"action":"from_the_future"}"#] {
        assert!(!parse(json).opens_stream(), "{json}");
    }
}

#[test]
fn the_workloads_actions_need_little_and_refuse_nonsense() {
    let parse = |json| serde_json::from_str::<Control>(json);
    let start = parse(r#"{"action":"workload_start","argv":["a"]}"#).expect("valid");
    let expected =
        Control::WorkloadStart { argv: vec!["a".to_owned()], env: BTreeMap::default(), cwd: None, user: None };
    assert_eq!(start, expected);
    assert_eq!(serde_json::to_string(&start).expect("serialises"), r#"{"action":"workload_start","argv":["a"]}"#);
    assert_eq!(
        parse(r#"{"action":"signal","signum":15}"#).expect("valid"),
        Control::Signal { signum: 15, run: None },
        "as hosts of the first edition say it"
    );
    for json in [
        r#"{"action":"workload_start"}"#,
        r#"{"action":"workload_logs","from":-1}"#,
        r#"{"action":"workload_wait","run":"1"}"#,
    ] {
        parse(json).expect_err(json);
    }
}

#[test]
fn lost_is_eight_bytes() {
    let lost = Lost { bytes: 0x0102_0304_0506_0708 };
    assert_eq!(&lost.encode()[..], [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(Lost::decode(&lost.encode()), Ok(lost));
    for len in [0, 7, 9] {
        assert_eq!(Lost::decode(&vec![0; len]).expect_err("another length").len, len);
    }
}

#[test]
fn linux_numbers_mean_the_kinds_that_they_mean_on_linux() {
    for errno in [1, 2, 11, 12, 13, 17, 20, 21, 22, 28, 32, 39, 104, 110, 111] {
        assert_eq!(error_kind(errno), std::io::Error::from_raw_os_error(errno).kind(), "{errno}");
    }
    assert_eq!(error_kind(-1), std::io::ErrorKind::Other);
}

#[test]
fn a_start_carries_a_pid_and_nothing_else() {
    assert_eq!(Started::decode(&Started { pid: 4711 }.encode()), Ok(Started { pid: 4711 }));
    assert_eq!(Started::decode(&[0; 5]).expect_err("too long").len, 5);
}

#[test]
fn failures_survive_the_wire_and_strangers_stay_text() {
    for failure in [
        Failure::NotFound("nope".to_owned()),
        Failure::NotExecutable("/etc/passwd: permission denied".to_owned()),
        Failure::BadCwd("/x: y".to_owned()),
        Failure::UnknownUser("bob".to_owned()),
        Failure::BadRequest("argv is empty".to_owned()),
        Failure::System { errno: 28, detail: "/x: No space left on device".to_owned() },
        Failure::Other("errno x: y".to_owned()),
        Failure::Other("out of memory".to_owned()),
        Failure::Other("strange: text".to_owned()),
    ] {
        assert_eq!(Failure::decode(failure.to_string().as_bytes()), failure);
    }
}

#[test]
fn the_boot_configuration_survives_a_round_trip_and_has_defaults() {
    let config = GuestConfig {
        env: vec![("B".to_owned(), "2".to_owned()), ("A".to_owned(), "1".to_owned())],
        ..GuestConfig::default()
    };
    assert_eq!(serde_json::from_slice::<GuestConfig>(&config.to_json()).expect("its own JSON"), config);
    assert_eq!(serde_json::from_str::<GuestConfig>("{}").expect("all defaults"), GuestConfig::default());
}
