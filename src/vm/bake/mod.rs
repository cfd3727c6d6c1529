//! Baking an image: booted once, kept as a snapshot, and restored from it from then on.
//!
//! ```text
//!   Image + VmConfig --root filesystem, digests--> key --a snapshot is there-------------------------------> Baked --start--> Vm
//!                                                   \--none: boot, run a command, warm up, freeze, write it--^
//! ```
//! Snapshots are kept in the image's store under a key of everything that shapes them ([`key`]). Whoever bakes claims the
//! key, so that several tasks and processes that want the same wait for one of them.

mod key;
mod warmup;

pub use warmup::WarmupResult;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;

use kiln_wire::boot::GuestConfig;

use super::Vm;
use super::VmConfig;
use super::config::GuestRoot;
use super::error::StartError;
use super::restore;
use super::restore::Identity;
use super::start;
use super::start::Sources;
use super::template::Provenance;
use super::template::Template;
use super::template::digest_of;
use crate::image::Image;
use crate::image::ProgressEvent;
use crate::image::PullPolicy;
use crate::image::run_blocking;
use crate::snapshot::Contents;
use crate::snapshot::Origin;
use crate::snapshot::Snapshot;
use crate::snapshot::SnapshotError;
use key::BakeKey;
pub(super) use warmup::Warmup;

/// How long another process's baking is waited for before it is done here too: longer than a warm-up takes as a rule.
const CLAIM_PATIENCE: Duration = Duration::from_secs(900);

/// How long the command may take that a guest runs when it is baked; a few milliseconds as a rule.
const FIRST_COMMAND: Duration = Duration::from_secs(10);

/// An image baked for a configuration: each [`start`](Self::start) restores a guest of it, and nothing is looked up again.
///
/// It goes on working whatever becomes of the image's store: its files are open. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Baked {
    snapshot: Snapshot,
    template: Arc<Template>,
    config: VmConfig,
    /// Keeps what the image needs in its store.
    _image: Image,
}

impl Baked {
    /// A guest that goes on from where the snapshot was taken, with the host's time, entropy of its own, its own machine
    /// id and the configured name; returns when its agent has confirmed that.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running then.
    ///
    /// # Cancel safety
    /// Dropping the future stops what has been started.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(image: kiln::Image) -> Result<(), kiln::Error> {
    /// let baked = image.bake(kiln::VmConfig::new()).await?;
    /// let (one, other) = tokio::try_join!(baked.start(), baked.start())?;
    /// # Ok(()) }
    /// ```
    pub async fn start(&self) -> Result<Vm, StartError> {
        let identity = Identity::of(&self.config, &self.template)?;
        restore::snapshot(&self.snapshot, Arc::clone(&self.template), &identity).await
    }

    /// The snapshot.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl Image {
    /// Bakes this image for `config`, or finds that done: boots a guest from it, warms it up if `config` says so, and keeps
    /// it as a snapshot in the image's store. [`Image::start`] does this too.
    ///
    /// # Errors
    /// [`StartError`]: what booting can give, the warm-up's own error, [`StartError::NotBaked`] under
    /// [`PullPolicy::Never`], [`StartError::Snapshot`] when the snapshot cannot be written. Nothing half-written is left.
    ///
    /// # Cancel safety
    /// Dropping the future stops the guest that is being baked; a snapshot that is being written is finished or removed.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(image: kiln::Image) -> Result<(), kiln::Error> {
    /// let config = kiln::VmConfig::new().warmup("imports-1", |vm| async move {
    ///     vm.exec_builder().argv(["python3", "-c", "import json, http.client"]).output().await?;
    ///     Ok(())
    /// });
    /// let baked = image.bake(config).await?;
    /// # Ok(()) }
    /// ```
    pub async fn bake(&self, config: VmConfig) -> Result<Baked, StartError> {
        let bakery = Bakery::open(self, self.with_engine(config, None).await?).await?;
        let snapshot = bakery.snapshot().await?;
        bakery.config.progress.send(ProgressEvent::Baked { image: *self.digest() });
        Ok(Baked { snapshot, template: bakery.template, config: bakery.config, _image: bakery.image })
    }
}

/// All that baking needs to know.
struct Bakery {
    image: Image,
    config: VmConfig,
    guest: GuestConfig,
    /// What the digests are of, and what is booted.
    sources: Sources,
    origin: Origin,
    template: Arc<Template>,
    key: BakeKey,
    place: PathBuf,
}

impl Bakery {
    async fn open(image: &Image, config: VmConfig) -> Result<Self, StartError> {
        let root = image.root(&config).await?;
        let image = image.clone();
        run_blocking(move || {
            let sources = Sources::open(&config)?;
            let origin = digests(&image, &root, &sources)?;
            let template = Arc::new(Template::open(&root, &config, Provenance::known(origin.clone()))?);
            // The name and the machine id are for those who are restored.
            let nobody = GuestConfig::default();
            let guest =
                GuestConfig { hostname: nobody.hostname, machine_id: None, ..start::guest_config(&root, &config) };
            let key = BakeKey::new(image.digest(), &config, &guest, &origin, template.engine.cpu_profile());
            let place = image.store().baked_place(image.digest(), &key.variant, &key.key);
            Ok(Self { image, config, guest, sources, origin, template, key, place })
        })
        .await
    }

    /// The snapshot, baked if it must be.
    async fn snapshot(&self) -> Result<Snapshot, StartError> {
        let policy = self.config.bake;
        if policy != PullPolicy::Always
            && let Some(snapshot) = self.find().await?
        {
            return Ok(snapshot);
        }
        if policy == PullPolicy::Never {
            return Err(StartError::NotBaked { image: *self.image.digest() });
        }
        let began = SystemTime::now();
        let name = format!("bake {}", self.key.key);
        let _claim = self.image.store().claim(&name, CLAIM_PATIENCE).await?;
        // Somebody else has baked it while the claim was waited for; what was there before is not wanted again.
        if let Some(snapshot) = self.find().await?
            && (policy != PullPolicy::Always || self.is_since(began))
        {
            return Ok(snapshot);
        }
        self.bake().await
    }

    /// The snapshot, if a whole one is there. One that is damaged counts as none: it will be replaced.
    async fn find(&self) -> Result<Option<Snapshot>, StartError> {
        let (place, origin) = (self.place.clone(), self.origin.clone());
        run_blocking(move || {
            let found = Snapshot::open(&place).and_then(|snapshot| snapshot.expect_origin(&origin).map(|()| snapshot));
            match found {
                Ok(snapshot) => Ok(Some(snapshot)),
                Err(SnapshotError::Missing(_)) => Ok(None),
                Err(error) => {
                    tracing::warn!(place = %place.display(), %error, "a baked snapshot cannot be used, it is baked anew");
                    Ok(None)
                }
            }
        })
        .await
    }

    fn is_since(&self, began: SystemTime) -> bool {
        fs::metadata(&self.place).and_then(|meta| meta.modified()).is_ok_and(|written| written >= began)
    }

    async fn bake(&self) -> Result<Snapshot, StartError> {
        let image = *self.image.digest();
        self.config.progress.send(ProgressEvent::Booting { image });
        let vm = Arc::new(self.boot().await?);
        run_a_command(&vm).await;
        if let Some(warmup) = &self.config.warmup {
            self.config.progress.send(ProgressEvent::WarmingUp { image });
            let failed = |source| StartError::Warmup { tag: warmup.tag().to_owned(), source };
            let done = tokio::time::timeout(self.config.warmup_timeout, warmup.run(Arc::clone(&vm))).await;
            done.unwrap_or_else(|_| Err("it did not come to an end in time".into())).map_err(failed)?;
            // What it has freed would be kept in every snapshot; a guest that has just booted has freed nothing.
            if let Err(error) = vm.reclaim_memory().await {
                tracing::warn!(%error, "the guest gave no memory back, its snapshot is larger for it");
            }
        }
        self.config.progress.send(ProgressEvent::Saving { image });
        let frozen = vm.driver.freeze().await.map_err(StartError::Freeze)?;
        vm.driver.stop();
        let (place, origin, store) = (self.place.clone(), self.origin.clone(), self.image.store().clone());
        run_blocking(move || {
            let memory = frozen.map_memory().map_err(SnapshotError::from)?;
            let contents = Contents { state: frozen.state(), memory: &memory, origin: &origin, since: None };
            let snapshot = Snapshot::write(&place, &contents)?;
            // What is written counts as used already; what is too much is removed.
            store.reserve(0).inspect_err(|_| drop(fs::remove_dir_all(&place)))?;
            Ok(snapshot)
        })
        .await
    }

    async fn boot(&self) -> Result<Vm, StartError> {
        let template = Arc::clone(&self.template);
        let sources = self.sources.again()?;
        start::boot(self.config.clone(), self.guest.clone(), |_| Ok((template, sources))).await
    }
}

/// Has the guest run a command, so that what every first command needs is in its memory when it is restored: above all
/// the shell and its libraries, which most commands are run by. An image without one is none the worse for it.
async fn run_a_command(vm: &Vm) {
    let outcome = vm.exec_builder().argv(["/bin/sh", "-c", ":"]).timeout(FIRST_COMMAND).output().await;
    tracing::debug!(?outcome, "the guest has run a command");
}

/// The digests of what a guest is made from, read or remembered. Blocking.
fn digests(image: &Image, root: &GuestRoot, sources: &Sources) -> Result<Origin, StartError> {
    let known = image.store().file_digests();
    let digest = |(path, file): &(PathBuf, fs::File)| {
        let digest = known.of(file, || digest_of(std::slice::from_ref(file)));
        digest.map(|digest| digest.to_string()).map_err(|source| StartError::Unreadable { path: path.clone(), source })
    };
    let root = root.digest.clone().ok_or(StartError::Config("a root filesystem without a digest"))?;
    Ok(Origin { root, kernel: digest(&sources.kernel)?, agent: digest(&sources.agent)? })
}
