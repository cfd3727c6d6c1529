//! pax extended headers (POSIX `pax`, "pax Extended Header"): `<length> <key>=<value>\n`, repeated.
//!
//! The length counts the whole record, so values may hold any byte: a newline does not end one. Unknown keys are ignored, as
//! the standard demands.

use std::fmt;

use crate::error::ArchiveError;
use crate::sparse;

/// Seconds and nanoseconds since 1970; the nanoseconds always count forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Whole seconds, negative before 1970.
    pub seconds: i64,
    /// Below a thousand million.
    pub nanoseconds: u32,
}

const GIGA: u32 = 1_000_000_000;

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seconds, nanoseconds } = *self;
        match (seconds < 0, nanoseconds) {
            (_, 0) => write!(f, "{seconds}"),
            (false, _) => write!(f, "{seconds}.{nanoseconds:09}"),
            // 0.75 s after second -2 is "-1.25".
            (true, _) => write!(f, "-{}.{:09}", (seconds + 1).unsigned_abs(), GIGA - nanoseconds),
        }
    }
}

impl Time {
    fn parse(value: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?;
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let seconds: i64 = whole.parse().ok()?;
        let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
        let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
        if whole.starts_with('-') && nanoseconds > 0 {
            return Some(Self { seconds: seconds.checked_sub(1)?, nanoseconds: GIGA - nanoseconds });
        }
        Some(Self { seconds, nanoseconds })
    }
}

/// The records of one header as pairs of key and value, in the order of the archive.
///
/// After an error there is nothing more to come.
#[derive(Clone, Debug)]
pub struct Pairs<'a> {
    rest: &'a [u8],
}

/// Takes the content of a pax header apart.
#[must_use]
pub const fn pairs(header: &[u8]) -> Pairs<'_> {
    Pairs { rest: header }
}

impl<'a> Iterator for Pairs<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), ArchiveError>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = std::mem::take(&mut self.rest);
        if bytes.is_empty() {
            return None;
        }
        let Some((pair, rest)) = split_pair(bytes) else { return Some(Err(ArchiveError::Malformed("pax record"))) };
        self.rest = rest;
        Some(Ok(pair))
    }
}

type Pair<'a> = (&'a [u8], &'a [u8]);

fn split_pair(bytes: &[u8]) -> Option<(Pair<'_>, &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some(((&record[..equals], &record[equals + 1..]), &bytes[length..]))
}

/// A value that is a number; `None` if it is empty, which takes an earlier record back.
///
/// # Errors
/// [`ArchiveError::Malformed`].
pub fn number(value: &[u8]) -> Result<Option<u64>, ArchiveError> {
    if value.is_empty() {
        return Ok(None);
    }
    let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    number.map(Some).ok_or(ArchiveError::Malformed("number in a pax record"))
}

/// What the records before one entry override.
#[derive(Debug, Default)]
pub(crate) struct Records {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link_path: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) mtime: Option<Time>,
    /// Present if the entry is a sparse file.
    pub(crate) sparse: Option<sparse::Records>,
}

impl Records {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ArchiveError> {
        let mut records = Self::default();
        for pair in pairs(bytes) {
            let (key, value) = pair?;
            records.apply(key, value)?;
        }
        Ok(records)
    }

    /// An empty value takes the override back.
    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveError> {
        let text = || (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link_path = text(),
            b"size" => self.size = number(value)?,
            b"mtime" => {
                let time = || Time::parse(value).ok_or(ArchiveError::Malformed("time in a pax record"));
                self.mtime = (!value.is_empty()).then(time).transpose()?;
            }
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.get_or_insert_default().apply(key, value)?;
                }
            }
        }
        Ok(())
    }
}

/// Appends one record.
pub(crate) fn push_record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = " =\n".len() + key.len() + value.len();
    // The length counts its own digits, and one digit more may make it longer still.
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_time_survives(seconds in -10_000_000_000..10_000_000_000_i64, nanoseconds in 0..GIGA) {
            let time = Time { seconds, nanoseconds };
            prop_assert_eq!(Time::parse(time.to_string().as_bytes()), Some(time));
        }

        #[test]
        fn a_path_survives(path in proptest::collection::vec(any::<u8>(), 1..1200)) {
            let mut bytes = Vec::new();
            push_record(&mut bytes, "path", &path);
            push_record(&mut bytes, "comment", b"ignored");
            prop_assert_eq!(Records::parse(&bytes).expect("well-formed").path, Some(path));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Records::parse(&bytes);
        }
    }

    #[test]
    fn a_value_may_hold_newlines_and_equals_signs() {
        let mut bytes = Vec::new();
        push_record(&mut bytes, "key", b"\n=\n\0");
        let pairs: Vec<_> = pairs(&bytes).collect::<Result<_, _>>().expect("well-formed");
        assert_eq!(pairs, [(&b"key"[..], &b"\n=\n\0"[..])]);
    }

    #[test]
    fn a_time_before_1970_has_its_fraction_counted_forwards() {
        assert_eq!(Time::parse(b"-1.25"), Some(Time { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(Time { seconds: -1, nanoseconds: 500_000_000 }.to_string(), "-0.500000000");
        assert_eq!(Time::parse(b"7.1234567899"), Some(Time { seconds: 7, nanoseconds: 123_456_789 }));
        assert_eq!(Time::parse(b"1.x"), None);
        assert_eq!(Time::parse(b"-9223372036854775808.1"), None);
    }
}
