//! `snapshot.json`: what a snapshot is, as text that a person can read and no bit of which can change unnoticed.
//!
//! `integrity` is the SHA-256 of the manifest itself, written compactly with an empty `integrity`. It covers the
//! machine's state directly and the memory through the digests of its pieces, so it names the whole snapshot.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::SnapshotError;
use crate::mem::Extent;
use crate::units::{Bytes, PAGE_SIZE};
use crate::vmm::MACHINE_STATE_VERSION;
use crate::vmm::MachineState;
use crate::vmm::RestoreError;

/// The version of the format that this library writes, and the only one that it opens.
pub const FORMAT: u64 = 1;
/// The manifest's largest size, in bytes; one with all the extents there can be has some 40 KiB.
pub(super) const MANIFEST_MAX: u64 = 1 << 20;
/// The memory's digests are made of pieces of this size, in bytes.
pub(super) const CHUNK: u64 = 4 << 20;
/// Most extents of a diff: each is a mapping of its own in the process, of which the host allows some 65,000.
pub(super) const EXTENTS_MAX: usize = 256;
/// Longest name of an origin, in bytes: a digest has 71.
const ORIGIN_MAX: usize = 256;
/// Bytes of a chunk's digest.
pub(super) const DIGEST_LEN: u64 = 32;

/// Whether a snapshot stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// All of the memory.
    Full,
    /// The memory that changed since another snapshot.
    Diff,
}

/// What a guest was made from. The names are the caller's: digests, as a rule. A snapshot is of use only with the
/// same root image, and a caller that keeps snapshots by these names finds out that one is out of date.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The root filesystem image, which the restored machine gets as its disk.
    pub root: String,
    /// The guest kernel.
    pub kernel: String,
    /// The agent.
    pub agent: String,
}

/// What is said about the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Memory {
    /// Size of RAM and of the file.
    pub(super) size: Bytes,
    /// SHA-256 of the file with the chunks' digests.
    pub(super) digests: String,
    /// What a diff replaces of its parent, ascending; empty in a full snapshot.
    pub(super) extents: Vec<Extent>,
}

/// The manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) format: u64,
    pub(super) integrity: String,
    pub(super) kind: Kind,
    /// The digest of the snapshot that a diff builds on.
    pub(super) parent: Option<String>,
    pub(super) origin: Origin,
    pub(super) memory: Memory,
    pub(super) machine: MachineState,
}

/// Of all versions, past and future, this much stays...
#[derive(Deserialize)]
struct AnyFormat {
    format: u64,
}

/// ...and of all versions of the state in this format this much.
#[derive(Deserialize)]
struct AnyState {
    machine: AnyMachine,
}

#[derive(Deserialize)]
struct AnyMachine {
    version: u32,
}

impl Manifest {
    /// Reads and checks a manifest.
    pub(super) fn parse(json: &[u8]) -> Result<Self, SnapshotError> {
        let malformed = |error: serde_json::Error| SnapshotError::Manifest(Box::new(error));
        let AnyFormat { format } = serde_json::from_slice(json).map_err(malformed)?;
        if format != FORMAT {
            return Err(SnapshotError::Format { found: format });
        }
        let AnyState { machine: AnyMachine { version } } = serde_json::from_slice(json).map_err(malformed)?;
        check_version(version)?;
        let manifest: Self = serde_json::from_slice(json).map_err(malformed)?;
        if manifest.integrity != manifest.compute_integrity() {
            return Err(SnapshotError::Damaged("the manifest does not have the digest that it names"));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// The file's bytes; sets the digest.
    pub(super) fn seal(&mut self) -> Result<Vec<u8>, SnapshotError> {
        self.integrity = self.compute_integrity();
        self.check()?;
        let mut json = serde_json::to_vec_pretty(self).map_err(|error| SnapshotError::Manifest(Box::new(error)))?;
        json.push(b'\n');
        if json.len() as u64 > MANIFEST_MAX {
            return Err(SnapshotError::Unwritable("the manifest is too large"));
        }
        Ok(json)
    }

    fn compute_integrity(&self) -> String {
        let unsealed = Self { integrity: String::new(), ..self.clone() };
        // Plain structs of numbers, strings and sequences always have a JSON form.
        let json = serde_json::to_vec(&unsealed).unwrap_or_default();
        name_of(&Sha256::digest(json))
    }

    /// Everything that must hold of a manifest by itself.
    fn check(&self) -> Result<(), SnapshotError> {
        let require = |holds: bool, what| if holds { Ok(()) } else { Err(SnapshotError::Damaged(what)) };
        check_version(self.machine.version)?;
        let size = self.memory.size;
        let possible = size.0 > 0 && size.0.is_multiple_of(PAGE_SIZE) && size <= Bytes::gib(1024);
        require(possible, "a memory size that no machine has")?;
        require(self.machine.memory == size, "machine and memory of different sizes")?;
        let origin = [&self.origin.root, &self.origin.kernel, &self.origin.agent];
        require(origin.iter().all(|name| name.len() <= ORIGIN_MAX), "the name of an origin is too long")?;
        require(is_name(&self.memory.digests), "the memory's digest is none")?;
        match self.kind {
            Kind::Full => {
                require(self.parent.is_none(), "a full snapshot with a parent")?;
                require(self.memory.extents.is_empty(), "a full snapshot with extents")
            }
            Kind::Diff => {
                require(self.parent.as_deref().is_some_and(is_name), "a diff without the digest of its parent")?;
                self.check_extents()
            }
        }
    }

    fn check_extents(&self) -> Result<(), SnapshotError> {
        let mut free = 0;
        for extent in &self.memory.extents {
            let aligned = extent.offset.is_multiple_of(PAGE_SIZE) && extent.len.is_multiple_of(PAGE_SIZE);
            if !aligned || extent.len == 0 || extent.offset < free || extent.end() > self.memory.size.0 {
                return Err(SnapshotError::Damaged("an extent outside the memory or out of order"));
            }
            free = extent.end();
        }
        if self.memory.extents.len() > EXTENTS_MAX {
            return Err(SnapshotError::Damaged("more extents than a diff may have"));
        }
        Ok(())
    }

    /// Size of the file with the chunks' digests.
    pub(super) fn digests_len(&self) -> u64 {
        self.memory.size.0.div_ceil(CHUNK) * DIGEST_LEN
    }
}

fn check_version(found: u32) -> Result<(), SnapshotError> {
    if found == MACHINE_STATE_VERSION { Ok(()) } else { Err(RestoreError::Version { found }.into()) }
}

/// A digest as it is written.
pub(super) fn name_of(digest: &[u8]) -> String {
    format!("sha256:{}", hex::encode(digest))
}

fn is_name(name: &str) -> bool {
    let digits = name.strip_prefix("sha256:").unwrap_or_default();
    digits.len() == 64 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}
