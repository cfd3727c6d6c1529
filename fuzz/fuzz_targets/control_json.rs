//! The JSON of CONTROL and its answer, and the payloads of ERROR, EXIT, LOST and STARTED: no bytes panic, and what was parsed survives
//! being written and read again.
#![no_main]

use std::fmt::Debug;

use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::lost::Lost;
use kiln_wire::started::Started;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|input: &[u8]| {
    json::<Control>(input);
    json::<ControlAck>(input);
    let failure = Failure::decode(input);
    assert_eq!(Failure::decode(failure.to_string().as_bytes()), failure);
    if let Ok(exit) = Exit::decode(input) {
        assert_eq!(exit.encode(), input);
    }
    if let Ok(lost) = Lost::decode(input) {
        assert_eq!(lost.encode(), input);
    }
    if let Ok(started) = Started::decode(input) {
        assert_eq!(started.encode(), input);
    }
});

fn json<T: Serialize + DeserializeOwned + PartialEq + Debug>(input: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(input) {
        let written = serde_json::to_vec(&value).expect("strings and numbers have a JSON form");
        assert_eq!(serde_json::from_slice::<T>(&written).expect("it was just written"), value);
    }
}
