//! A case: one sentence of the document, and how to see whether it holds.

use std::fmt;

/// One numbered case against a subject of type `S`.
#[derive(Debug)]
pub struct Case<S> {
    /// Its number, for ever: `A01` and up for agents, `H01` and up for hosts.
    pub id: &'static str,
    /// What holds, in a few words.
    pub title: &'static str,
    /// What the subject must offer for the case to mean anything.
    pub requires: &'static [&'static str],
    /// Finds out.
    pub run: fn(&S) -> Result<(), Finding>,
}

impl<S> Case<S> {
    pub(crate) const fn new(id: &'static str, title: &'static str, run: fn(&S) -> Result<(), Finding>) -> Self {
        Self { id, title, requires: &[], run }
    }

    pub(crate) const fn requires(mut self, what: &'static [&'static str]) -> Self {
        self.requires = what;
        self
    }
}

/// What a subject offers beyond the protocol's first edition.
pub(crate) trait Offers {
    /// Why cases that require `what` say nothing about this subject; `None` when they do.
    fn lacks(&self, what: &str) -> Option<String>;
}

/// What was seen in place of what the document promises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding(String);

impl Finding {
    pub(crate) fn new(seen: impl Into<String>) -> Self {
        Self(seen.into())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// Not an `Error` itself, so that every error can become one with `?`.
impl<E: std::error::Error> From<E> for Finding {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// A finding of `seen` unless it `holds`.
pub(crate) fn ensure(holds: bool, seen: impl FnOnce() -> String) -> Result<(), Finding> {
    if holds { Ok(()) } else { Err(Finding::new(seen())) }
}

/// A finding unless the bytes of `what` are the expected ones.
pub(crate) fn same(what: &str, seen: &[u8], expected: impl AsRef<[u8]>) -> Result<(), Finding> {
    let expected = expected.as_ref();
    ensure(seen == expected, || format!("{what} is {}, expected {}", quoted(seen), quoted(expected)))
}

/// Bytes for a person: short, on one line.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    const SHOWN: usize = 100;
    match bytes.get(..SHOWN) {
        Some(head) => format!("{:?}… of {} bytes", String::from_utf8_lossy(head), bytes.len()),
        None => format!("{:?}", String::from_utf8_lossy(bytes)),
    }
}
