//! kiln's in-guest agent.
fn main() {}
