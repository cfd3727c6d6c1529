//! What a guest that goes on from a snapshot, or as a clone, has to hear before anything else: who it is, what time it is, and
//! randomness that no other guest has.
//!
//! Nothing of the image is needed for it.

use std::io::Read;
use std::path::Path;

use kiln_wire::control::TimeStamp;
use rustix::io::Errno;

use crate::clock;
use crate::files;
use crate::refusal::Refusal;
use crate::sys::random;

/// Less is not worth the name: the generator's key has as many bytes.
const ENTROPY_MIN: usize = 32;

/// Linux's limit of a host name, in bytes.
const HOSTNAME_MAX: usize = 64;

/// Hexadecimal digits of a machine id (machine-id(5)).
const MACHINE_ID_DIGITS: usize = 32;

const MACHINE_ID: &str = "/etc/machine-id";
const HOSTS: &str = "/etc/hosts";

/// The fields of the action.
#[derive(Debug)]
pub(crate) struct Renewal {
    pub(crate) host_unix_ns: u64,
    pub(crate) tsc: Option<TimeStamp>,
    pub(crate) entropy_b64: String,
    pub(crate) hostname: Option<String>,
    pub(crate) machine_id: Option<String>,
}

impl Renewal {
    /// Checks everything, then does everything, and reports what failed first. Only if the agent `owns_machine`: elsewhere
    /// the clock and the names are another system's.
    pub(crate) fn make(self, owns_machine: bool) -> Result<(), Refusal> {
        let entropy = self.check()?;
        if !owns_machine {
            return Err(Refusal::numbered("not the first process of a guest", Errno::PERM));
        }
        let mut failed = Ok(());
        let mut attempt = |what: &str, result: std::io::Result<()>| {
            let result = result.map_err(|error| Refusal::system(what, &error));
            failed = std::mem::replace(&mut failed, Ok(())).and(result);
        };
        attempt("mixing in entropy", random::add_entropy(&entropy));
        attempt("setting the clock", clock::set(self.host_unix_ns, self.tsc));
        if let Some(name) = &self.hostname {
            attempt("setting the host name", rename(name));
        }
        if let Some(id) = &self.machine_id {
            attempt(MACHINE_ID, write_machine_id(id));
        }
        failed
    }

    /// The entropy, if all fields are what they must be.
    fn check(&self) -> Result<Vec<u8>, Refusal> {
        let refuse = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Refusal::numbered(what, Errno::INVAL)) };
        let decoded = files::decode(&self.entropy_b64).ok();
        let entropy = decoded.ok_or_else(|| Refusal::numbered("entropy_b64: not base64", Errno::INVAL))?;
        refuse((ENTROPY_MIN..=random::ENTROPY_MAX).contains(&entropy.len()), "entropy_b64: not 32 to 512 bytes")?;
        if let Some(name) = &self.hostname {
            refuse(!name.is_empty() && name.len() <= HOSTNAME_MAX, "hostname: not 1 to 64 bytes")?;
            refuse(!name.bytes().any(|byte| byte.is_ascii_control()), "hostname: a control character")?;
        }
        if let Some(id) = &self.machine_id {
            let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            let is_id = id.len() == MACHINE_ID_DIGITS && id.bytes().all(is_digit);
            refuse(is_id, "machine_id: not 32 lowercase hexadecimal digits")?;
        }
        Ok(entropy)
    }
}

/// Writes the machine id; a link there is replaced, not followed.
pub(crate) fn write_machine_id(id: &str) -> std::io::Result<()> {
    files::write_atomically(Path::new(MACHINE_ID), format!("{id}\n").as_bytes(), Some(0o444))
}

/// The `/etc/hosts` of an image that has none.
pub(crate) fn hosts(hostname: &str) -> String {
    format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost\n")
}

/// Gives the guest its name, also in a `/etc/hosts` that is as the agent has written it.
fn rename(name: &str) -> std::io::Result<()> {
    let old = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if old == name {
        return Ok(());
    }
    rustix::system::sethostname(name.as_bytes())?;
    if has_content(HOSTS, hosts(&old).as_bytes()) {
        files::write_atomically(Path::new(HOSTS), hosts(name).as_bytes(), None)?;
    }
    Ok(())
}

/// Whether `path` is a regular file with this content. What else a workload may have put there is not waited for, nor
/// read to its end.
fn has_content(path: &str, content: &[u8]) -> bool {
    let mut found = Vec::new();
    let limit = content.len() as u64 + 1;
    let read = files::open_regular(path).and_then(|file| file.take(limit).read_to_end(&mut found));
    read.is_ok() && found == content
}
