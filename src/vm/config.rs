//! What a VM is made of.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Vm;
use super::assets::Assets;
use super::bake::Warmup;
use super::bake::WarmupResult;
use crate::engine::EngineChoice;
use crate::image::Progress;
use crate::image::PullPolicy;
use crate::rootfs::Limits;
use crate::units::Bytes;

/// Where the guest kernel comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Kernel {
    /// The cache, as `cargo xtask kernel` filled it.
    #[default]
    Cached,
    /// This `vmlinux`.
    Path(PathBuf),
}

/// Where the in-guest agent comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Agent {
    /// The cache, as `cargo xtask agent` filled it.
    #[default]
    Cached,
    /// This static binary.
    Path(PathBuf),
}

/// The settings of a VM, each with a default that runs ordinary programs.
///
/// ```
/// use kiln::units::Bytes;
/// use kiln::vm::VmConfig;
/// let config = VmConfig::new().memory(Bytes::mib(512)).hostname("builder");
/// ```
#[derive(Clone, Debug)]
pub struct VmConfig {
    pub(super) memory: Bytes,
    pub(super) vcpus: u8,
    pub(super) hostname: Option<String>,
    pub(super) machine_id: Option<String>,
    pub(super) resolv_conf: Option<String>,
    pub(super) overlay_size: Bytes,
    pub(super) kernel: Kernel,
    pub(super) agent: Agent,
    pub(super) assets: Option<Assets>,
    pub(super) engine: EngineChoice,
    pub(super) boot_timeout: Duration,
    pub(super) verbose_boot: bool,
    pub(super) extra_cmdline: String,
    pub(super) progress: Progress,
    pub(super) root_limits: Limits,
    pub(super) bake: PullPolicy,
    pub(super) warmup: Option<Warmup>,
    pub(super) warmup_timeout: Duration,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl VmConfig {
    /// 256 MiB of memory, one vCPU, up to 128 MiB of it for files that the guest writes, a minute to boot.
    #[must_use]
    pub fn new() -> Self {
        Self {
            memory: Bytes::mib(256),
            vcpus: 1,
            hostname: None,
            machine_id: None,
            resolv_conf: None,
            overlay_size: Bytes::mib(128),
            kernel: Kernel::default(),
            agent: Agent::default(),
            assets: None,
            engine: EngineChoice::default(),
            boot_timeout: Duration::from_secs(60),
            verbose_boot: false,
            extra_cmdline: String::new(),
            progress: Progress::default(),
            root_limits: Limits::default(),
            bake: PullPolicy::Missing,
            warmup: None,
            warmup_timeout: Duration::from_secs(600),
        }
    }

    /// The guest's memory; a multiple of 4 KiB.
    #[must_use]
    pub fn memory(mut self, size: Bytes) -> Self {
        self.memory = size;
        self
    }

    /// How many vCPUs, 1 to 8; any other number is an error at start. A guest that is restored has as many as it was saved
    /// with.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The guest's host name.
    #[must_use]
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// The content of the guest's `/etc/machine-id`: 32 lowercase hexadecimal digits (machine-id(5)). Else a guest that
    /// is restored gets a random one of its own, and one that is booted keeps the image's.
    #[must_use]
    pub fn machine_id(mut self, id: impl Into<String>) -> Self {
        self.machine_id = Some(id.into());
        self
    }

    /// The content of the guest's `/etc/resolv.conf`; else the image's own file stays.
    #[must_use]
    pub fn resolv_conf(mut self, content: impl Into<String>) -> Self {
        self.resolv_conf = Some(content.into());
        self
    }

    /// How much the guest may write over its root image. It is kept in the guest's memory.
    #[must_use]
    pub fn overlay_size(mut self, size: Bytes) -> Self {
        self.overlay_size = size;
        self
    }

    /// The guest kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// The in-guest agent.
    #[must_use]
    pub fn agent(mut self, agent: Agent) -> Self {
        self.agent = agent;
        self
    }

    /// The cache in which a cached kernel and agent are looked for; else the user's.
    #[must_use]
    pub fn assets(mut self, assets: Assets) -> Self {
        self.assets = Some(assets);
        self
    }

    /// The engine to run on, by name or one that you have; else the best that this host has ([`Engine::Auto`]). The software
    /// engine that is chosen by name is one for all guests of an [`Image`](crate::Image) value and its clones.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use kiln::{Engine, VmConfig, hv::soft::Soft};
    ///
    /// let hardware_or_an_error = VmConfig::new().engine(Engine::Kvm);
    /// let counted = Arc::new(Soft::new());
    /// let mine = VmConfig::new().engine(Arc::clone(&counted));
    /// # drop((hardware_or_an_error, mine));
    /// ```
    ///
    /// [`Engine::Auto`]: crate::Engine::Auto
    #[must_use]
    pub fn engine(mut self, engine: impl Into<EngineChoice>) -> Self {
        self.engine = engine.into();
        self
    }

    /// How long the guest may take from its first instruction, booted or restored, until its agent answers.
    #[must_use]
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.boot_timeout = timeout;
        self
    }

    /// Let the kernel report its boot on the console. For debugging: it makes the boot slower.
    #[must_use]
    pub fn verbose_boot(mut self, verbose: bool) -> Self {
        self.verbose_boot = verbose;
        self
    }

    /// More for the end of the kernel's command line. For debugging.
    #[must_use]
    pub fn extra_cmdline(mut self, extra: impl Into<String>) -> Self {
        self.extra_cmdline = extra.into();
        self
    }

    /// Where [`Image::start`](crate::Image::start) reports the making of the root filesystem to.
    ///
    /// ```
    /// use kiln::image::Progress;
    /// use kiln::vm::VmConfig;
    /// let (progress, events) = Progress::channel();
    /// let config = VmConfig::new().progress(progress);
    /// # drop((config, events));
    /// ```
    #[must_use]
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// When [`Image::start`](crate::Image::start) and [`Image::bake`](crate::Image::bake) boot the image to make a snapshot of
    /// it: always anew; only when there is none, which is the default; or never, which makes it an error that there is none.
    #[must_use]
    pub fn bake(mut self, policy: PullPolicy) -> Self {
        self.bake = policy;
        self
    }

    /// What is done with the guest when it is baked, after its agent answers: guests that are restored have it done
    /// already. `tag` stands for it: change it when the same tag would mean something else, or guests go on with what
    /// the old one did.
    ///
    /// Processes that it leaves running go on in each restored guest; connections into the guest are reset.
    ///
    /// ```
    /// use kiln::VmConfig;
    /// let config = VmConfig::new().warmup("imports-1", |vm| async move {
    ///     vm.exec_builder().argv(["python3", "-c", "import json, http.client"]).output().await?;
    ///     Ok(())
    /// });
    /// ```
    #[must_use]
    pub fn warmup<F, R>(mut self, tag: impl Into<String>, run: F) -> Self
    where
        F: Fn(Arc<Vm>) -> R + Send + Sync + 'static,
        R: Future<Output = WarmupResult> + Send + 'static,
    {
        self.warmup = Some(Warmup::new(tag.into(), run));
        self
    }

    /// How long the warm-up may take; ten minutes by default.
    #[must_use]
    pub fn warmup_timeout(mut self, timeout: Duration) -> Self {
        self.warmup_timeout = timeout;
        self
    }

    /// How much an image may ask of this host when [`Image::start`](crate::Image::start) makes its root filesystem.
    #[must_use]
    pub fn root_limits(mut self, limits: Limits) -> Self {
        self.root_limits = limits;
        self
    }
}

/// What the guest runs from: a root filesystem image, and what its OCI configuration says about processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRoot {
    /// The files that, one after another, are the disk with the read-only filesystem. One file may have any length; of
    /// several each is a multiple of 4 KiB long.
    pub files: Vec<PathBuf>,
    /// The type of the filesystem, as the guest's `mount` knows it.
    pub fs: String,
    /// ENV.
    pub env: Vec<(String, String)>,
    /// WORKDIR.
    pub workdir: String,
    /// USER; root when absent.
    pub user: Option<String>,
    /// What the guest is called unless [`VmConfig::hostname`] says otherwise.
    pub hostname: Option<String>,
    /// ENTRYPOINT and CMD; empty when the image has neither.
    pub command: Vec<String>,
    /// The number of STOPSIGNAL; SIGTERM when absent.
    pub stop_signal: Option<u8>,
    /// Names what the files hold together; found out by reading them, where that matters, when absent.
    pub digest: Option<String>,
}

impl GuestRoot {
    /// An EROFS image at `path`, with an empty OCI configuration.
    #[must_use]
    pub fn erofs(path: impl Into<PathBuf>) -> Self {
        Self::erofs_files([path])
    }

    /// An EROFS image that is these files one after another, as [`rootfs`](crate::rootfs) makes them, with an empty OCI
    /// configuration.
    ///
    /// ```no_run
    /// # async fn f(image: kiln::Image) -> Result<(), kiln::RootfsError> {
    /// use kiln::vm::GuestRoot;
    /// let root = GuestRoot::erofs_files(kiln::rootfs::build(&image).await?.files());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn erofs_files<P: Into<PathBuf>>(files: impl IntoIterator<Item = P>) -> Self {
        let files = files.into_iter().map(Into::into).collect();
        Self {
            files,
            fs: "erofs".to_owned(),
            env: Vec::new(),
            workdir: "/".to_owned(),
            user: None,
            hostname: None,
            command: Vec::new(),
            stop_signal: None,
            digest: None,
        }
    }
}
