//! Build and development tasks.
fn main() {}
