//! Who a process runs as: `name`, `uid`, `name:group` or `uid:gid`, looked up in the image's own files.
//!
//! The C library's lookup is not used: it loads plug-ins at run time, which a static program in a foreign image cannot.

use std::io::Read;

use kiln_wire::failure::Failure;

use crate::files;
use crate::sys::process::Identity;

/// How much of `/etc/passwd` or `/etc/group` is read, in bytes (1 MiB).
const MAX_DATABASE: u64 = 1 << 20;

/// An identity and the home folder that goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) identity: Identity,
    pub(crate) home: String,
}

/// Looks `spec` up in `/etc/passwd` and `/etc/group`; a file that is absent is empty.
pub(crate) fn lookup(spec: &str) -> Result<User, Failure> {
    resolve(spec, &database("/etc/passwd"), &database("/etc/group"))
        .ok_or_else(|| Failure::UnknownUser(spec.to_owned()))
}

fn database(path: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = files::open_regular(path) {
        // A file that cannot be read to its end still has usable lines.
        let _ = file.take(MAX_DATABASE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(passwd: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("/");
        Some(PasswdEntry { name, uid, gid, home })
    })
}

/// Name, id and members of each group.
fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

fn resolve(spec: &str, passwd: &str, group: &str) -> Option<User> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let number: Option<u32> = user.parse().ok();
    // A name made of digits is a name first, as in every container runtime.
    let entry = passwd_entries(passwd)
        .find(|entry| entry.name == user)
        .or_else(|| passwd_entries(passwd).find(|entry| number == Some(entry.uid)));
    let uid = entry.as_ref().map(|entry| entry.uid).or(number)?;
    let (gid, groups) = match wanted_group {
        Some(wanted) => {
            let named = group_entries(group).find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
            let gid = named.or_else(|| wanted.parse().ok())?;
            (gid, vec![gid])
        }
        None => {
            let gid = entry.as_ref().map_or(0, |entry| entry.gid);
            let member = |members: &str| entry.as_ref().is_some_and(|e| members.split(',').any(|m| m == e.name));
            let extra =
                group_entries(group).filter(|&(_, id, members)| id != gid && member(members)).map(|(_, id, _)| id);
            (gid, std::iter::once(gid).chain(extra).collect())
        }
    };
    let home = entry.map_or("/", |entry| entry.home).to_owned();
    Some(User { identity: Identity { uid, gid, groups }, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nbob:x:1000:100:Bob:/home/bob:/bin/sh\n77:x:5:5::/n:/x\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nwheel:x:10:alice,bob\nvideo:x:44:bob\n";

    fn ids(spec: &str) -> Option<(u32, u32, Vec<u32>)> {
        resolve(spec, PASSWD, GROUP).map(|user| (user.identity.uid, user.identity.gid, user.identity.groups))
    }

    #[test]
    fn a_name_brings_its_groups_and_home() {
        assert_eq!(ids("bob"), Some((1000, 100, vec![100, 10, 44])));
        assert_eq!(resolve("bob", PASSWD, GROUP).expect("exists").home, "/home/bob");
    }

    #[test]
    fn a_number_needs_no_entry() {
        assert_eq!(ids("4242"), Some((4242, 0, vec![0])));
        assert_eq!(ids("1000"), Some((1000, 100, vec![100, 10, 44])));
        assert_eq!(resolve("4242", "", "").expect("numeric").home, "/");
    }

    #[test]
    fn an_explicit_group_replaces_all_others() {
        assert_eq!(ids("bob:video"), Some((1000, 44, vec![44])));
        assert_eq!(ids("4242:4343"), Some((4242, 4343, vec![4343])));
    }

    #[test]
    fn a_name_of_digits_is_a_name_first() {
        assert_eq!(ids("77"), Some((5, 5, vec![5])));
    }

    #[test]
    fn strangers_are_refused() {
        for spec in ["alice", "bob:nobody", "", ":", "broken", "-1", "4294967296"] {
            assert_eq!(ids(spec), None, "{spec:?}");
        }
    }
}
