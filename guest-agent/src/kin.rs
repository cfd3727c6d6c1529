//! The processes that go with a command: its group, or, on a terminal, every group of its session.
//!
//! A shell with job control gives each job a group of its own. The kernel hangs up only the one in the foreground when the terminal goes; without
//! the others a host that disconnects would leave its background jobs behind.

use std::collections::BTreeSet;
use std::fs;

use crate::sys::signal;

/// Whom a hang-up concerns. The number is that of the command, which leads both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kin {
    Group(i32),
    Session(i32),
}

impl Kin {
    /// The command's number.
    pub(crate) const fn leader(self) -> i32 {
        match self {
            Self::Group(leader) | Self::Session(leader) => leader,
        }
    }

    /// Sends `number` to all of them; that there are none is no error.
    pub(crate) fn signal(self, number: u8) {
        match self {
            Self::Group(group) => signal::kill_group(group, number),
            Self::Session(session) => {
                // The leader's own group also where `/proc` cannot be read.
                signal::kill_group(session, number);
                for group in groups_of(session).into_iter().filter(|group| *group != session) {
                    signal::kill_group(group, number);
                }
            }
        }
    }

    /// Whether there is one left, a zombie included.
    pub(crate) fn exists(self) -> bool {
        match self {
            Self::Group(group) => signal::group_exists(group),
            Self::Session(session) => signal::group_exists(session) || !groups_of(session).is_empty(),
        }
    }
}

/// The process groups of a session.
fn groups_of(session: i32) -> BTreeSet<i32> {
    let Ok(processes) = fs::read_dir("/proc") else { return BTreeSet::new() };
    let stats = processes.flatten().filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit());
    let stats = stats.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    stats.filter_map(|stat| group_and_session(&stat)).filter(|ids| ids.1 == session).map(|ids| ids.0).collect()
}

/// Group and session from `/proc/PID/stat`: `pid (name) state ppid pgrp session ...`, where the name may have anything in it.
fn group_and_session(stat: &str) -> Option<(i32, i32)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_confuse() {
        assert_eq!(group_and_session("12 (a) R 1 (b) S 7 34 56 0 -1"), Some((34, 56)));
        assert_eq!(group_and_session("12 (cat) S 1 12 9 34816 12"), Some((12, 9)));
        assert_eq!(group_and_session("12 (cat"), None);
        assert_eq!(group_and_session(""), None);
    }

    #[test]
    fn our_own_session_has_our_group() {
        let stat = fs::read_to_string("/proc/self/stat").expect("Linux");
        let (group, session) = group_and_session(&stat).expect("well-formed");
        assert!(groups_of(session).contains(&group));
    }
}
