//! What VMs of one origin share: a booted one, those restored from its snapshots, and their clones.

use std::fs::File;
use std::io;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use kiln_wire::boot::DEFAULT_HOSTNAME;
use sha2::Digest as _;
use sha2::Sha256;
use tokio::sync::OnceCell;

use super::config::GuestRoot;
use super::config::VmConfig;
use super::error::StartError;
use super::start;
use super::workload::ImageCommand;
use crate::block::BlockBackend;
use crate::blocking::ShuttingDown;
use crate::blocking::blocking;
use crate::hv::Hypervisor;
use crate::hv::soft::Soft;
use crate::image::Digest;
use crate::snapshot::Origin;

/// Read at once when a file is digested, in bytes.
const PIECE: usize = 1 << 20;

/// What another machine like this one needs beside a state and memory.
#[derive(Debug)]
pub(super) struct Template {
    pub(super) engine: Arc<dyn Hypervisor>,
    pub(super) disks: Vec<Arc<dyn BlockBackend>>,
    pub(super) command: ImageCommand,
    pub(super) hostname: String,
    /// How long a guest may take until its agent answers.
    pub(super) answer: Duration,
    pub(super) provenance: Provenance,
}

/// Where a guest comes from, by digests: known, or to be found out when somebody asks, because it takes reading it all.
#[derive(Debug)]
pub(super) struct Provenance {
    origin: OnceCell<Origin>,
    files: Arc<Files>,
}

/// Open, so that they stay what the guest was made from whatever becomes of their names.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub(super) root: Vec<File>,
    /// Known without reading it.
    pub(super) root_digest: Option<String>,
    pub(super) kernel: Option<File>,
    pub(super) agent: Option<File>,
}

impl Template {
    /// Of a guest of `root` as `config` says. Opens the disks; blocking.
    pub(super) fn open(root: &GuestRoot, config: &VmConfig, provenance: Provenance) -> Result<Self, StartError> {
        start::vcpus(config)?;
        let engine = config.engine.open(None, || Arc::new(Soft::new()))?;
        let name = config.hostname.clone().or_else(|| root.hostname.clone());
        Ok(Self {
            engine,
            disks: vec![start::disk(&root.files)?],
            command: ImageCommand { argv: root.command.clone(), stop_signal: root.stop_signal },
            hostname: name.unwrap_or_else(|| DEFAULT_HOSTNAME.to_owned()),
            answer: config.boot_timeout,
            provenance,
        })
    }
}

impl Provenance {
    pub(super) fn known(origin: Origin) -> Self {
        Self { origin: OnceCell::new_with(Some(origin)), files: Arc::default() }
    }

    pub(super) fn of(files: Files) -> Self {
        Self { origin: OnceCell::new(), files: Arc::new(files) }
    }

    /// The digests; reads the files the first time.
    ///
    /// # Cancel safety
    /// Cancel safe: the next caller reads.
    pub(super) async fn origin(&self) -> io::Result<&Origin> {
        let find_out = || async {
            let files = Arc::clone(&self.files);
            let digests = blocking(move || files.digest()).await;
            digests.unwrap_or_else(|ShuttingDown| Err(io::Error::other("the runtime is shutting down")))
        };
        self.origin.get_or_try_init(find_out).await
    }
}

impl Files {
    fn digest(&self) -> io::Result<Origin> {
        Ok(Origin {
            root: match &self.root_digest {
                Some(digest) => digest.clone(),
                None => digest_of(&self.root)?.to_string(),
            },
            kernel: digest_of(self.kernel.as_slice())?.to_string(),
            agent: digest_of(self.agent.as_slice())?.to_string(),
        })
    }
}

/// The SHA-256 of files, one after another, whatever their positions. Blocking.
pub(super) fn digest_of(files: &[File]) -> io::Result<Digest> {
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; PIECE]);
    for file in files {
        let mut file = FromStart::of(file);
        loop {
            match file.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => hasher.update(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(Digest::from_hasher(hasher))
}

/// Reads a file from its beginning without moving the position that all its handles share.
pub(super) struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl<'a> FromStart<'a> {
    pub(super) const fn of(file: &'a File) -> Self {
        Self { file, at: 0 }
    }
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = std::os::unix::fs::FileExt::read_at(self.file, buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}
