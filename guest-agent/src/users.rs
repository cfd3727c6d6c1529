//! Who a process runs as: `user`, `user:group` or `:group`, each a name or a number, looked up in the image's own files by Docker's rules.
//!
//! - A number is never a name, also where a name is made of digits; it needs no entry. One that has an entry brings what belongs to it.
//! - Without a group the user's own counts and every other that lists the user; with one only that.
//! - The first entry counts; a line that is none is skipped.
//!
//! The C library's lookup is not used: it loads plug-ins at run time, which a static program in a foreign image cannot.

use std::io::Read;

use kiln_wire::failure::Failure;

use crate::files;
use crate::sys::process::Identity;

/// How much of `/etc/passwd` or `/etc/group` is read, in bytes (1 MiB).
const MAX_DATABASE: u64 = 1 << 20;

/// The highest number of a user or a group. Beyond it lies, among others, -1, which to the system means "leave it as it is": root.
const MAX_ID: u32 = i32::MAX as u32;

/// Who has the number 0, under whatever name.
pub(crate) const ROOT: &str = "0";

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

/// A number that a user or a group may have.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

/// Whether `text` means a number, if only one that nobody may have.
fn is_number(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether an entry's name and number are those that `wanted` means.
fn means(wanted: &str, name: &str, number: u32) -> bool {
    if is_number(wanted) { id(wanted) == Some(number) } else { name == wanted }
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(passwd: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = id(fields.nth(1)?)?;
        let gid = id(fields.next()?)?;
        let home = fields.nth(1).filter(|home| !home.is_empty()).unwrap_or("/");
        Some(PasswdEntry { name, uid, gid, home })
    })
}

/// Name, id and members of each group.
fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = id(fields.nth(1)?)?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

fn resolve(spec: &str, passwd: &str, group: &str) -> Option<User> {
    let (user, wanted_group) = spec.split_once(':').unwrap_or((spec, ""));
    if user.is_empty() && wanted_group.is_empty() {
        return None;
    }
    let user = if user.is_empty() { ROOT } else { user };
    let entry = passwd_entries(passwd).find(|entry| means(user, entry.name, entry.uid));
    let uid = entry.as_ref().map(|entry| entry.uid).or_else(|| id(user))?;
    let groups =
        if wanted_group.is_empty() { own_groups(entry.as_ref(), group) } else { vec![gid(wanted_group, group)?] };
    let gid = groups.first().copied().unwrap_or_default();
    let home = entry.map_or("/", |entry| entry.home).to_owned();
    Some(User { identity: Identity { uid, gid, groups }, home })
}

fn gid(wanted: &str, group: &str) -> Option<u32> {
    let entry = group_entries(group).find(|(name, gid, _)| means(wanted, name, *gid));
    entry.map(|(_, gid, _)| gid).or_else(|| id(wanted))
}

/// The group of a user, 0 without an entry, and then the others that list its name.
fn own_groups(entry: Option<&PasswdEntry<'_>>, group: &str) -> Vec<u32> {
    let own = entry.map_or(0, |entry| entry.gid);
    let listed = |members: &str| entry.is_some_and(|entry| members.split(',').any(|name| name.trim() == entry.name));
    let others = group_entries(group).filter(|&(_, gid, members)| gid != own && listed(members)).map(|(_, gid, _)| gid);
    std::iter::once(own).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\n# a comment\n\nshort:x:9\nwords:x:ten:10::/:/x\n\
        :x:8:8::/:/x\n  bob:x:1000:100:Bob:/home/bob:/bin/sh\nbob:x:1001:101:again:/other:/x\ntwin:x:1000:200::/twin:/x\n\
        77:x:5:5::/n:/x\nbare:x:6:6:::\nall:x:4294967295:4294967295::/:/x\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nbroken\nwords:x:ten:bob\nwheel:x:10:alice,bob\nvideo:x:44:bob\n\
        88:x:7:\nnone:x:4294967295:bob\nbob:x:100:bob\n";

    fn ids(spec: &str) -> Option<(u32, u32, Vec<u32>)> {
        resolve(spec, PASSWD, GROUP).map(|user| (user.identity.uid, user.identity.gid, user.identity.groups))
    }

    fn home(spec: &str) -> String {
        resolve(spec, PASSWD, GROUP).expect("exists").home
    }

    #[test]
    fn a_name_brings_its_groups_and_home() {
        assert_eq!(ids("bob"), Some((1000, 100, vec![100, 10, 44])));
        assert_eq!(ids("bob:"), ids("bob"));
        assert_eq!(home("bob"), "/home/bob");
        assert_eq!(home("bare"), "/");
    }

    #[test]
    fn a_number_needs_no_entry() {
        assert_eq!(ids("4242"), Some((4242, 0, vec![0])));
        assert_eq!(home("4242"), "/");
        assert_eq!(resolve("0", "", "").expect("numeric").home, "/");
    }

    #[test]
    fn a_number_with_an_entry_brings_what_belongs_to_it() {
        assert_eq!(ids("1000"), Some((1000, 100, vec![100, 10, 44])));
        assert_eq!(home("1000"), "/home/bob");
        assert_eq!(ids("0"), Some((0, 0, vec![0])));
    }

    #[test]
    fn an_explicit_group_replaces_all_others() {
        for (spec, expected) in [
            ("bob:video", (1000, 44)),
            ("bob:44", (1000, 44)),
            ("1000:video", (1000, 44)),
            ("4242:4343", (4242, 4343)),
            ("4242:wheel", (4242, 10)),
            (":wheel", (0, 10)),
        ] {
            let (uid, gid) = expected;
            assert_eq!(ids(spec), Some((uid, gid, vec![gid])), "{spec}");
        }
        assert_eq!(home("bob:video"), "/home/bob");
    }

    #[test]
    fn a_number_is_never_a_name() {
        assert_eq!(ids("77"), Some((77, 0, vec![0])));
        assert_eq!(ids("bob:88"), Some((1000, 88, vec![88])));
    }

    #[test]
    fn strangers_and_impossible_numbers_are_refused() {
        for spec in [
            "alice",
            "bob:nobody",
            "4242:nobody",
            "",
            ":",
            "broken",
            "short",
            "words",
            "-1",
            "0:-1",
            "2147483648",
            "4294967295",
            "0:4294967295",
            "4294967296",
            "all",
            "bob:none",
            "bob:words",
            "Bob",
            "bob:video:x",
            "bob ",
        ] {
            assert_eq!(ids(spec), None, "{spec:?}");
        }
        assert_eq!(ids("2147483647"), Some((2_147_483_647, 0, vec![0])));
    }

    #[test]
    fn an_image_without_the_files_has_numbers_only() {
        assert_eq!(resolve("bob", "", ""), None);
        assert_eq!(resolve("5:users", "", ""), None);
        assert_eq!(resolve("5:6", "", "").expect("numbers").identity, Identity { uid: 5, gid: 6, groups: vec![6] });
    }
}
