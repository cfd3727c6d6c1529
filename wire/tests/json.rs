//! REQUEST, CONTROL, ERROR and the boot configuration as other implementations write them.

use kiln_wire::boot::GuestConfig;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::failure::Failure;
use kiln_wire::failure::error_kind;
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
    ] {
        assert!(parse(json).opens_stream(), "{json}");
    }
    for json in [r#"{"action":"probe"}"#, r#"{"action":"read_file","path":"/a"}"#, r#"{"action":"from_the_future"}"#] {
        assert!(!parse(json).opens_stream(), "{json}");
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
