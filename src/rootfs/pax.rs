//! The pax records that matter to an image beside those that [`kiln_tree::reader`] applies itself: owners and attributes.

use kiln_tree::pax;

use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::limits::MAX_XATTR_BYTES;
use crate::rootfs::limits::MAX_XATTR_VALUE;
use crate::rootfs::tree::Xattr;

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What the records before one entry override.
#[derive(Debug, Default)]
pub(super) struct PaxRecords {
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    /// Sorted by name, each name once.
    pub(super) xattrs: Vec<Xattr>,
}

impl PaxRecords {
    pub(super) fn parse(header: &[u8]) -> Result<Self, LayerErrorKind> {
        let mut records = Self::default();
        for pair in pax::pairs(header) {
            let (key, value) = pair.map_err(LayerErrorKind::of_archive)?;
            records.apply(key, value)?;
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
            // The reader would take it; no name on Linux has one.
            b"path" | b"linkpath" => refuse_nul(value)?,
            b"uid" => self.uid = id(value)?,
            b"gid" => self.gid = id(value)?,
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

fn id(value: &[u8]) -> Result<Option<u64>, LayerErrorKind> {
    pax::number(value).map_err(LayerErrorKind::of_archive)
}

fn refuse_nul(value: &[u8]) -> Result<(), LayerErrorKind> {
    if value.contains(&0) { Err(LayerErrorKind::Malformed("nul byte in a pax record")) } else { Ok(()) }
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
        fn a_path_is_refused_for_a_nul_alone(path in proptest::collection::vec(any::<u8>(), 1..300)) {
            prop_assert_eq!(PaxRecords::parse(&record(b"path", &path)).is_err(), path.contains(&0));
        }
    }
}
