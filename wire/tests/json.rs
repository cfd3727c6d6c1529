//! REQUEST, CONTROL, ERROR and the boot configuration as other implementations write them.

use kiln_wire::boot::GuestConfig;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::failure::Failure;
use kiln_wire::request::Request;

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
fn failures_survive_the_wire_and_strangers_stay_text() {
    for failure in [
        Failure::NotFound("nope".to_owned()),
        Failure::NotExecutable("/etc/passwd: permission denied".to_owned()),
        Failure::BadCwd("/x: y".to_owned()),
        Failure::UnknownUser("bob".to_owned()),
        Failure::BadRequest("argv is empty".to_owned()),
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
