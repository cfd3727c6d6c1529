//! Snapshots: a paused machine as a folder, and machines that go on from it.
//!
//! ```text
//!   <folder>/snapshot.json    manifest: versions, digests, origin, the machine's state
//!   <folder>/memory           the guest's memory, sparse: pages of zeros are holes
//!   <folder>/memory.sha256    a digest for each 4 MiB of it
//! ```
//!
//! [`Snapshot::write`] makes one from a machine's state and memory, in full or as the difference to another;
//! [`Snapshot::open`] checks the manifest, which is small, and the sizes of the rest; a restore maps the memory and reads
//! nothing. [`Snapshot::verify`] reads it all. The format is specified in `docs/snapshot-format.md`.
//!
//! **Trust.** A snapshot from a stranger is as good as an image from one: what its guest does is the guest's matter,
//! and damage of any kind is a typed error. Whoever can write the files of a snapshot that is in use can end the
//! process, by cutting them short (see [`GuestRam::from_file`]).

mod error;
mod manifest;
mod memory;
mod write;

pub use error::SnapshotError;
pub use manifest::{FORMAT, Kind, Origin};

use std::fs;
use std::fs::File;
use std::io;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};
use sha2::{Digest as _, Sha256};

use crate::block::BlockBackend;
use crate::hv::Hypervisor;
use crate::mem::Extent;
use crate::mem::GuestRam;
use crate::mem::MemoryId;
use crate::mem::MemoryImage;
use crate::units::Bytes;
use crate::vmm::Machine;
use crate::vmm::MachineState;
use manifest::MANIFEST_MAX;
use manifest::Manifest;
use manifest::Memory;
use write::Draft;

const MANIFEST: &str = "snapshot.json";
const MEMORY: &str = "memory";
const DIGESTS: &str = "memory.sha256";
/// Attempts to open a snapshot before giving up: each loses only to a writer that puts another in its place.
const MAX_OPENS: usize = 8;

/// What goes into a snapshot.
#[derive(Debug)]
pub struct Contents<'a> {
    /// The state of a machine that is paused.
    pub state: &'a MachineState,
    /// Its memory.
    pub memory: &'a GuestRam,
    /// What the guest was made from.
    pub origin: &'a Origin,
    /// Write only what changed since this snapshot, which must then be there to open the new one. It need not be the
    /// one that the machine was restored from, but that is when the difference is found fast.
    pub since: Option<&'a Snapshot>,
}

/// A snapshot that was opened. Its files stay open: it is whole whatever becomes of the folder.
#[derive(Clone, Debug)]
pub struct Snapshot {
    folder: PathBuf,
    manifest: Arc<Manifest>,
    /// The memory's file of this snapshot itself.
    file: Arc<File>,
    /// The digests of that.
    digests: Arc<File>,
    /// All of the memory: of a diff with the parent's below.
    memory: MemoryImage,
}

impl Snapshot {
    /// Writes a snapshot to the folder `target`, in the stead of one that is there, and opens it. The machine must stay
    /// paused meanwhile. Safe on disk when it returns; a crash before leaves what was there.
    ///
    /// Blocks for as long as writing the memory takes: call it where that is allowed.
    ///
    /// # Errors
    /// [`SnapshotError`]; `target` is as before then.
    ///
    /// # Examples
    /// ```no_run
    /// use kiln::snapshot::{Contents, Origin, Snapshot};
    /// # async fn f(mut machine: kiln::vmm::Machine) -> Result<(), Box<dyn std::error::Error>> {
    /// machine.pause().await?;
    /// let (state, memory) = (machine.save().await?, machine.memory().clone());
    /// let write = move || {
    ///     let origin = Origin { root: "sha256:...".to_owned(), ..Origin::default() };
    ///     let contents = Contents { state: &state, memory: &memory, origin: &origin, since: None };
    ///     Snapshot::write("snapshots/base".as_ref(), &contents)
    /// };
    /// let snapshot = tokio::task::spawn_blocking(write).await??;
    /// machine.resume();
    /// # Ok(()) }
    /// ```
    pub fn write(target: &Path, contents: &Contents<'_>) -> Result<Self, SnapshotError> {
        let Contents { state, memory, origin, since } = contents;
        if state.memory != memory.size() {
            return Err(SnapshotError::MachineMemory { wanted: state.memory, given: memory.size() });
        }
        let extents = match since {
            Some(parent) => parent.changes(memory)?,
            None => vec![Extent { offset: 0, len: memory.size().0 }],
        };
        let draft = Draft::beside(target)?;
        let file = draft.create(MEMORY)?;
        let written = file.set_len(memory.size().0).and_then(|()| memory::write(memory, &extents, &file));
        let digests = written.and_then(|digests| file.sync_all().map(|()| digests));
        let digests = digests.map_err(io_error(&target.join(MEMORY)))?;
        let digests_file = draft.write(DIGESTS, &digests)?;
        let mut manifest = Manifest {
            format: FORMAT,
            integrity: String::new(),
            kind: if since.is_some() { Kind::Diff } else { Kind::Full },
            parent: since.map(|parent| parent.digest().to_owned()),
            origin: (*origin).clone(),
            memory: Memory {
                size: memory.size(),
                digests: manifest::name_of(&Sha256::digest(&digests)),
                extents: if since.is_some() { extents } else { Vec::new() },
            },
            machine: (*state).clone(),
        };
        draft.write(MANIFEST, &manifest.seal()?)?;
        draft.commit(target)?;
        Self::assemble(target, manifest, Files { memory: file, digests: digests_file }, *since)
    }

    /// Opens the full snapshot in `folder` and checks all of the manifest, and the sizes of the other files. Reads
    /// some tens of KiB, so it hardly blocks.
    ///
    /// # Errors
    /// [`SnapshotError`], which says what is wrong; [`SnapshotError::NeedsParent`] for a diff.
    pub fn open(folder: &Path) -> Result<Self, SnapshotError> {
        Self::open_over(folder, None)
    }

    /// Opens the diff in `folder` that builds on `parent`, as [`open`](Self::open) does.
    ///
    /// # Errors
    /// [`SnapshotError`]; [`SnapshotError::WrongParent`] when it does not build on `parent`.
    pub fn open_on(folder: &Path, parent: &Snapshot) -> Result<Self, SnapshotError> {
        Self::open_over(folder, Some(parent))
    }

    fn open_over(folder: &Path, parent: Option<&Snapshot>) -> Result<Self, SnapshotError> {
        let (manifest, files) = open_files(folder)?;
        Self::assemble(folder, manifest, files, parent)
    }

    fn assemble(folder: &Path, manifest: Manifest, files: Files, on: Option<&Snapshot>) -> Result<Self, SnapshotError> {
        let given = on.map(Snapshot::digest);
        match (&manifest.parent, given) {
            (Some(parent), None) => return Err(SnapshotError::NeedsParent { parent: parent.clone() }),
            (wanted, Some(given)) if wanted.as_deref() != Some(given) => {
                return Err(SnapshotError::WrongParent { wanted: wanted.clone(), given: given.to_owned() });
            }
            _ => {}
        }
        if on.is_some_and(|parent| parent.memory_size() != manifest.memory.size) {
            return Err(SnapshotError::Damaged("a diff of another size than its parent"));
        }
        let (file, id) = (Arc::new(files.memory), memory_id(&manifest));
        let memory = match on {
            Some(parent) => parent.memory.with(Arc::clone(&file), manifest.memory.extents.clone(), id),
            None => MemoryImage::new(Arc::clone(&file), manifest.memory.size, id),
        };
        let (manifest, digests) = (Arc::new(manifest), Arc::new(files.digests));
        Ok(Self { folder: folder.to_owned(), manifest, file, digests, memory })
    }

    /// Checks that the snapshot was made from what it is to be used with.
    ///
    /// # Errors
    /// [`SnapshotError::Origin`] with the first difference.
    pub fn expect_origin(&self, wanted: &Origin) -> Result<(), SnapshotError> {
        let found = self.origin();
        let pairs = [
            ("root image", &found.root, &wanted.root),
            ("kernel", &found.kernel, &wanted.kernel),
            ("agent", &found.agent, &wanted.agent),
        ];
        match pairs.into_iter().find(|(_, found, wanted)| found != wanted) {
            None => Ok(()),
            Some((what, found, wanted)) => {
                Err(SnapshotError::Origin { what, found: found.clone(), wanted: wanted.clone() })
            }
        }
    }

    /// Checks that the snapshot belongs to a root image, which is what a machine that is restored from it needs.
    ///
    /// # Errors
    /// [`SnapshotError::Origin`].
    pub fn expect_root(&self, root: &str) -> Result<(), SnapshotError> {
        self.expect_origin(&Origin { root: root.to_owned(), ..self.origin().clone() })
    }

    /// Reads all of the memory and checks it against the digests. For a snapshot that came from elsewhere, or lay for
    /// long; [`restore`](Self::restore) does without. Of a diff this is the part above its parent.
    ///
    /// Blocks for as long as reading the memory takes.
    ///
    /// # Errors
    /// [`SnapshotError::Memory`] with the first damaged place, [`SnapshotError::Damaged`] when the digests themselves
    /// are; [`SnapshotError::Io`].
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let path = self.folder.join(DIGESTS);
        let mut digests = vec![0; self.manifest.digests_len() as usize];
        self.digests.read_exact_at(&mut digests, 0).map_err(io_error(&path))?;
        if manifest::name_of(&Sha256::digest(&digests)) != self.manifest.memory.digests {
            return Err(SnapshotError::Damaged("the memory's digests are not those that were written"));
        }
        let damage = memory::find_damage(&self.file, self.memory_size().0, &digests);
        match damage.map_err(io_error(&self.folder.join(MEMORY)))? {
            Some(offset) => Err(SnapshotError::Memory { offset }),
            None => Ok(()),
        }
    }

    /// A machine that goes on from here, paused; `disks` are those that the saved one had. Nothing of the memory is
    /// read, and all machines of a snapshot share what they do not write.
    ///
    /// # Errors
    /// [`SnapshotError::Restore`] and [`SnapshotError::Map`]; nothing is left running then.
    ///
    /// # Cancel safety
    /// Cancelled, nothing is left running.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(disk: std::sync::Arc<dyn kiln::block::BlockBackend>) -> Result<(), Box<dyn std::error::Error>> {
    /// use kiln::{hv::soft::Soft, snapshot::Snapshot};
    /// let snapshot = Snapshot::open("snapshots/base".as_ref())?;
    /// let mut machine = snapshot.restore(&Soft::new(), &[disk]).await?;
    /// machine.resume();
    /// # Ok(()) }
    /// ```
    pub async fn restore(
        &self,
        engine: &dyn Hypervisor,
        disks: &[Arc<dyn BlockBackend>],
    ) -> Result<Machine, SnapshotError> {
        Ok(Machine::restore(engine, self.state(), self.map_memory()?, disks).await?)
    }

    /// The memory, mapped copy-on-write.
    ///
    /// # Errors
    /// [`SnapshotError::Map`].
    pub fn map_memory(&self) -> Result<GuestRam, SnapshotError> {
        Ok(self.memory.map()?)
    }

    /// The digest that names the snapshot: of its manifest, and through that of everything in it.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.manifest.integrity
    }

    /// The folder that it was opened from, or written to; something else may be there by now.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether it stands alone.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.manifest.kind
    }

    /// What the guest was made from.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.manifest.origin
    }

    /// The machine's state.
    #[must_use]
    pub fn state(&self) -> &MachineState {
        &self.manifest.machine
    }

    /// The size of the guest's memory.
    #[must_use]
    pub fn memory_size(&self) -> Bytes {
        self.manifest.memory.size
    }

    /// What the memory's file takes on the host's disk, without the parent's.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn memory_on_disk(&self) -> Result<Bytes, SnapshotError> {
        let data = self.file.metadata().map_err(io_error(&self.folder.join(MEMORY)))?;
        Ok(Bytes(data.blocks().saturating_mul(512)))
    }

    /// What differs in `ram` from this snapshot's memory.
    fn changes(&self, ram: &GuestRam) -> Result<Vec<Extent>, SnapshotError> {
        if ram.size() != self.memory_size() {
            return Err(SnapshotError::MachineMemory { wanted: self.memory_size(), given: ram.size() });
        }
        let written = ram.written_since(&memory_id(&self.manifest));
        let may_differ = |offset| written.as_ref().is_none_or(|pages| pages.contains(offset));
        let changes = memory::changes(ram, may_differ, |offset, page| self.memory.read_page(offset, page));
        changes.map_err(io_error(&self.folder.join(MEMORY)))
    }
}

/// The digest of a snapshot as the name of its memory.
fn memory_id(manifest: &Manifest) -> MemoryId {
    Sha256::digest(&manifest.integrity).into()
}

/// A snapshot's files beside the manifest.
struct Files {
    memory: File,
    digests: File,
}

/// The manifest and the files of one and the same snapshot, also while others are written to the place.
fn open_files(folder: &Path) -> Result<(Manifest, Files), SnapshotError> {
    for _ in 0..MAX_OPENS {
        let opened = open_at_once(CWD, folder).map_err(|source| missing(folder, folder, source))?;
        let files = files_in(folder, &opened);
        // The old one, from which its writer has begun to remove the files.
        let is_gone = |opened: &File| {
            let (found, there) = (opened.metadata(), fs::metadata(folder));
            found.is_ok_and(|found| there.is_ok_and(|there| (there.dev(), there.ino()) != (found.dev(), found.ino())))
        };
        if files.is_ok() || !is_gone(&opened) {
            return files;
        }
    }
    Err(SnapshotError::Missing(folder.to_owned()))
}

fn files_in(folder: &Path, opened: &File) -> Result<(Manifest, Files), SnapshotError> {
    let manifest = Manifest::parse(&read_manifest(folder, opened)?)?;
    let memory = open_file(folder, opened, MEMORY, manifest.memory.size)?;
    let digests = open_file(folder, opened, DIGESTS, Bytes(manifest.digests_len()))?;
    Ok((manifest, Files { memory, digests }))
}

fn missing(folder: &Path, path: &Path, source: io::Error) -> SnapshotError {
    match source.kind() {
        io::ErrorKind::NotFound => SnapshotError::Missing(folder.to_owned()),
        _ => io_error(path)(source),
    }
}

fn read_manifest(folder: &Path, opened: &File) -> Result<Vec<u8>, SnapshotError> {
    let path = folder.join(MANIFEST);
    let file = open_at_once(opened, MANIFEST.as_ref()).map_err(|source| missing(folder, &path, source))?;
    // Room for all of it at once; the size is only a hint.
    let size = file.metadata().map_or(0, |data| data.len()).min(MANIFEST_MAX);
    let mut json = Vec::with_capacity(size as usize + 1);
    // A byte more than may be there tells a file that is too large.
    file.take(MANIFEST_MAX + 1).read_to_end(&mut json).map_err(io_error(&path))?;
    if json.len() as u64 > MANIFEST_MAX {
        return Err(SnapshotError::Damaged("the manifest is too large"));
    }
    Ok(json)
}

/// Opens a file that must be one, and of this size.
fn open_file(folder: &Path, opened: &File, name: &'static str, wanted: Bytes) -> Result<File, SnapshotError> {
    let path = folder.join(name);
    let file = open_at_once(opened, name.as_ref()).map_err(io_error(&path))?;
    let data = file.metadata().map_err(io_error(&path))?;
    if !data.is_file() {
        return Err(SnapshotError::Damaged("something in the folder is not a file"));
    }
    if data.len() != wanted.0 {
        return Err(SnapshotError::FileSize { name, found: Bytes(data.len()), wanted });
    }
    Ok(file)
}

/// Does not wait for the other end of what turns out to be a pipe.
fn open_at_once(folder: impl AsFd, name: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?.into())
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io { path, source }
}
