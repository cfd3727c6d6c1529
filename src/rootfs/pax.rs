//! pax extended headers (POSIX `pax`, "pax Extended Header"): `<length> <key>=<value>\n`, repeated.
//!
//! The length counts the whole record, so values may hold any byte. Keys that matter to an image
//! are kept, all others ignored as the standard demands.

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::MAX_XATTR_BYTES;
use crate::rootfs::limits::MAX_XATTR_VALUE;
use crate::rootfs::tree::Time;
use crate::rootfs::tree::Xattr;

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
const SPARSE_PREFIX: &[u8] = b"GNU.sparse.";

/// What the records before one entry override.
#[derive(Debug, Default)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    /// Sorted by name, each name once.
    pub(super) xattrs: Vec<Xattr>,
    pub(super) is_sparse: bool,
}

impl PaxRecords {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, LayerErrorKind> {
        let mut records = Self::default();
        while !bytes.is_empty() {
            let (record, rest) = split_record(bytes).ok_or(LayerErrorKind::Malformed("pax record"))?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(LayerErrorKind::Malformed("pax record"))?;
            records.apply(&record[..equals], &record[equals + 1..])?;
            bytes = rest;
        }
        // Of several records for one name the last counts; the sort is stable.
        records.xattrs.reverse();
        records.xattrs.sort_by(Xattr::cmp_name);
        records.xattrs.dedup_by(|later, earlier| later.cmp_name(earlier).is_eq());
        let total: usize = records.xattrs.iter().map(Xattr::stored_size).sum();
        if total > MAX_XATTR_BYTES {
            return Err(LayerErrorKind::TooLong { what: "all attributes together", limit: MAX_XATTR_BYTES });
        }
        Ok(records)
    }

    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), LayerErrorKind> {
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link_path = text(value)?,
            b"size" => self.size = number(value)?,
            b"uid" => self.uid = number(value)?,
            b"gid" => self.gid = number(value)?,
            b"mtime" => self.mtime = (!value.is_empty()).then(|| time(value)).transpose()?,
            _ if key.starts_with(SPARSE_PREFIX) => self.is_sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.set_xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    /// Attributes of namespaces that Linux has not (macOS's, for one) are dropped, as every tool
    /// that unpacks to a Linux file system has to.
    fn set_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), LayerErrorKind> {
        if value.len() > MAX_XATTR_VALUE {
            return Err(LayerErrorKind::TooLong { what: "attribute value", limit: MAX_XATTR_VALUE });
        }
        let Some(xattr) = Xattr::new(name, value) else {
            tracing::debug!(name = %String::from_utf8_lossy(name), "attribute of an unknown namespace dropped");
            return Ok(());
        };
        self.xattrs.push(xattr);
        Ok(())
    }
}

/// Splits `<length> <record>\n` off the front.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?;
    Some((record.strip_suffix(b"\n")?, &bytes[length..]))
}

/// An empty value takes the override back.
fn text(value: &[u8]) -> Result<Option<Vec<u8>>, LayerErrorKind> {
    if value.contains(&0) {
        return Err(LayerErrorKind::Malformed("nul byte in a pax record"));
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn number(value: &[u8]) -> Result<Option<u64>, LayerErrorKind> {
    if value.is_empty() {
        return Ok(None);
    }
    let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    number.map(Some).ok_or(LayerErrorKind::Malformed("number in a pax record"))
}

/// Seconds since 1970 as a decimal number, possibly negative, with any number of fraction digits.
fn time(value: &[u8]) -> Result<Time, LayerErrorKind> {
    parse_time(value).ok_or(LayerErrorKind::Malformed("time in a pax record"))
}

fn parse_time(value: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0_u32, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    // "-1.25" is 0.75 s after second -2.
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some(Time { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds });
    }
    Some(Time { seconds, nanoseconds })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
    }

    #[test]
    fn a_value_may_hold_newlines_and_equals_signs() {
        let records = PaxRecords::parse(&record(b"SCHILY.xattr.security.capability", b"\n=\n\0")).unwrap();
        assert_eq!(records.xattrs, [Xattr::new(b"security.capability", b"\n=\n\0").unwrap()]);
    }

    #[test]
    fn a_time_before_1970_has_its_fraction_counted_forwards() {
        assert_eq!(parse_time(b"-1.25"), Some(Time { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(parse_time(b"-0.5"), Some(Time { seconds: -1, nanoseconds: 500_000_000 }));
        assert_eq!(parse_time(b"7.1234567899"), Some(Time { seconds: 7, nanoseconds: 123_456_789 }));
    }

    #[test]
    fn of_several_records_for_one_attribute_the_last_counts() {
        let first = record(b"SCHILY.xattr.user.b", b"1");
        let other = record(b"SCHILY.xattr.user.a", b"2");
        let last = record(b"SCHILY.xattr.user.b", b"3");
        let records = PaxRecords::parse(&[first, other, last].concat()).unwrap();
        assert_eq!(records.xattrs, [Xattr::new(b"user.a", b"2").unwrap(), Xattr::new(b"user.b", b"3").unwrap()]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PaxRecords::parse(&bytes);
        }

        #[test]
        fn damaged_records_are_parsed_or_refused(
            value in proptest::collection::vec(any::<u8>(), 0..40), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let mut bytes = [record(b"mtime", &value), record(b"path", b"x"), record(b"size", b"12")].concat();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = PaxRecords::parse(&bytes);
        }

        #[test]
        fn a_path_survives(path in proptest::collection::vec(1..=255_u8, 1..300)) {
            prop_assert_eq!(PaxRecords::parse(&record(b"path", &path)).unwrap().path, Some(path));
        }
    }
}
