//! A file's metadata in types that do not depend on the system.
#![allow(
    clippy::unnecessary_cast,
    clippy::cast_lossless,
    clippy::useless_conversion,
    reason = "the fields of `Stat` have other types on other systems"
)]

use rustix::fs::Dev;
use rustix::fs::FileType;
use rustix::fs::Timespec;
use rustix::fs::Timestamps;
use rustix::fs::UTIME_OMIT;

use crate::pax::Time;

/// What an archive records of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) kind: FileType,
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) mtime: Time,
    /// Major and minor number of a device node.
    pub(crate) device: (u32, u32),
    /// Where the file is, for one that has several names.
    pub(crate) shared: Option<(u64, u64)>,
}

impl From<rustix::fs::Stat> for Stat {
    fn from(stat: rustix::fs::Stat) -> Self {
        let device = stat.st_rdev as Dev;
        Self {
            kind: FileType::from_raw_mode(stat.st_mode as _),
            mode: stat.st_mode as u32 & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: Time { seconds: stat.st_mtime as i64, nanoseconds: stat.st_mtime_nsec as u32 },
            device: (rustix::fs::major(device) as u32, rustix::fs::minor(device) as u32),
            shared: (stat.st_nlink > 1).then_some((stat.st_dev as u64, stat.st_ino as u64)),
        }
    }
}

/// A time of modification as the system takes it, leaving the time of access alone.
pub(crate) fn timestamps(mtime: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT as _ },
        last_modification: Timespec { tv_sec: mtime.seconds as _, tv_nsec: mtime.nanoseconds as _ },
    }
}
