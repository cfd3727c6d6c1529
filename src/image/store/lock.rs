//! Who may do what to a store at the same time, across tasks and processes.
//!
//! All locks are `flock`s, which end with their holder however it ends:
//!
//! ```text
//! lock            shared for the moment of taking a lease, exclusive while garbage is collected
//! leases/<random> exclusive for as long as somebody needs the digests that are written in it
//! claims/<hex>    exclusive while somebody does the work of that name
//! ```

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use crate::image::digest::Digest;
use crate::image::store::ImageStore;
use crate::image::store::StoreError;
use crate::image::store::run_blocking;

/// How long a collection may keep others waiting: it reads some documents and removes some files.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at a lock: short at first, because most are held for moments.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// A lock that is held; dropping it gives it up.
#[derive(Debug)]
pub(super) struct Held {
    _file: File,
}

impl ImageStore {
    fn lock_path(&self) -> PathBuf {
        self.root().join("lock")
    }

    pub(super) fn claims(&self) -> PathBuf {
        self.root().join("claims")
    }

    /// No garbage is collected while this is held. Blocking.
    pub(super) fn lock_shared(&self) -> Result<Held, StoreError> {
        self.lock(File::try_lock_shared)
    }

    /// No lease is taken while this is held. Blocking.
    pub(super) fn lock_exclusive(&self) -> Result<Held, StoreError> {
        self.lock(File::try_lock)
    }

    fn lock(&self, lock: impl Fn(&File) -> Result<(), TryLockError>) -> Result<Held, StoreError> {
        let path = self.lock_path();
        let file = open(&path).map_err(StoreError::io(&path))?;
        let mut pauses = Pauses::start(PATIENCE);
        loop {
            match lock(&file) {
                Ok(()) => return Ok(Held { _file: file }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(StoreError::io(&path)(source)),
            }
            match pauses.next() {
                Some(pause) => thread::sleep(pause),
                None => return Err(StoreError::Busy { path, after: PATIENCE }),
            }
        }
    }

    /// Waits until nobody else does the work called `name`, so that it need not be done twice; gives up waiting after
    /// `patience` and returns `None`. The work must therefore be harmless when it is done twice at the same time.
    ///
    /// # Cancel safety
    /// Dropping the future gives up the claim.
    pub(crate) async fn claim(&self, name: &str, patience: Duration) -> Result<Option<Claim>, StoreError> {
        let path = self.claims().join(Digest::of(name.as_bytes()).hex());
        let mut pauses = Pauses::start(patience);
        loop {
            let attempt = path.clone();
            if let Some(claim) = run_blocking(move || Claim::attempt(&attempt)).await? {
                return Ok(Some(claim));
            }
            match pauses.next() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Ok(None),
            }
        }
    }
}

/// The right to do some work alone; dropping it gives it up.
#[derive(Debug)]
pub(crate) struct Claim {
    _file: File,
}

impl Claim {
    fn attempt(path: &Path) -> Result<Option<Self>, StoreError> {
        let file = open(path).map_err(StoreError::io(path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(source)) => return Err(StoreError::io(path)(source)),
        }
        // The collector may have removed the file between the opening and the lock: then others lock another one.
        let is_there = file.metadata().map_err(StoreError::io(path))?.nlink() > 0;
        Ok(is_there.then_some(Self { _file: file }))
    }

    /// Removes the files of claims that nobody holds; how many. Blocking.
    pub(super) fn sweep(folder: &Path) -> io::Result<u64> {
        let mut removed = 0;
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let Ok(file) = File::open(&path) else { continue };
            // Held while it is removed, so that nobody takes a lock on a file without a name for a claim.
            if file.try_lock().is_ok() && fs::remove_file(&path).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// The pauses between attempts, until time is up.
struct Pauses {
    until: Instant,
    next: Duration,
}

impl Pauses {
    fn start(patience: Duration) -> Self {
        Self { until: Instant::now() + patience, next: FIRST_PAUSE }
    }

    fn next(&mut self) -> Option<Duration> {
        let left = self.until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        let pause = self.next.min(left);
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        Some(pause)
    }
}
