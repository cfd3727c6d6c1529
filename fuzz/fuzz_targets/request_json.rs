//! The REQUEST's JSON: no bytes panic, and what was parsed survives being written and read again.
#![no_main]

use kiln_wire::request::Request;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<Request>(input) {
        let written = serde_json::to_vec(&request).expect("strings and numbers have a JSON form");
        assert_eq!(serde_json::from_slice::<Request>(&written).expect("it was just written"), request);
    }
});
