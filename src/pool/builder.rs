//! The rules of a pool, and making one.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Pool;
use super::core::Core;
use super::core::Settings;
use super::error::PoolError;
use crate::image::Image;
use crate::vm::StartError;
use crate::vm::VmConfig;

/// Makes a [`Pool`]; from [`Image::pool`].
///
/// # Examples
/// ```no_run
/// # async fn f(image: kiln::Image) -> Result<(), kiln::Error> {
/// use std::time::Duration;
/// use kiln::VmConfig;
/// use kiln::units::Bytes;
///
/// let pool = image
///     .pool()
///     .config(VmConfig::new().memory(Bytes::mib(128)))
///     .min(2)
///     .max(16)
///     .acquire_timeout(Duration::from_secs(5))
///     .build()
///     .await?;
/// assert_eq!(pool.stats().idle, 2);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until `build`"]
pub struct PoolBuilder {
    image: Image,
    config: VmConfig,
    settings: Settings,
}

impl Image {
    /// Prepares a pool of VMs of this image: 1 to 4 of them, each restored for each user.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(image: kiln::Image) -> Result<(), kiln::Error> {
    /// let pool = image.pool().build().await?;
    /// # Ok(()) }
    /// ```
    pub fn pool(&self) -> PoolBuilder {
        let settings = Settings {
            min: 1,
            max: 4,
            idle_timeout: Duration::from_secs(300),
            acquire_timeout: Duration::from_secs(60),
            grace: Duration::from_secs(10),
            reuse: false,
            parallel: thread::available_parallelism().map_or(1, NonZeroUsize::get),
        };
        PoolBuilder { image: self.clone(), config: VmConfig::new(), settings }
    }
}

impl PoolBuilder {
    /// How many VMs there are at least, those in use among them: 1 unless set. With 0 the pool begins empty, and is
    /// empty again after an [`idle_timeout`](Self::idle_timeout).
    pub fn min(mut self, vms: usize) -> Self {
        self.settings.min = vms;
        self
    }

    /// How many VMs exist at most, those that are starting or being stopped among them: 4 unless set.
    pub fn max(mut self, vms: usize) -> Self {
        self.settings.max = vms;
        self
    }

    /// How long a VM beyond [`min`](Self::min) may be idle before it is stopped: five minutes unless set.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.settings.idle_timeout = timeout;
        self
    }

    /// How long [`Pool::acquire`] waits at most, for others and for a start: a minute unless set.
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.settings.acquire_timeout = timeout;
        self
    }

    /// How long VMs in use may go on once [`Pool::shutdown`] is called: ten seconds unless set.
    pub fn shutdown_grace(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Whether each user gets a VM that nobody had before: true unless set.
    ///
    /// With true a VM that is given back is stopped, and a fresh one is started when somebody waits or
    /// [`min`](Self::min) wants it. Nothing of one user reaches the next.
    ///
    /// With false the next user gets the VM as the last one left it, unless it has ended or was
    /// [discarded](super::PooledVm::discard). That saves the start, and **everything in the guest stays**:
    ///
    /// - files that were written, changed or removed anywhere, and the room on the disk and in memory that they take;
    /// - processes that were left in the background, a workload and its logs, and what they do next: they can watch and
    ///   disturb the next user. Commands whose [`ExecChild`](crate::ExecChild) was dropped are killed, their
    ///   descendants in a session of their own are not;
    /// - memory: shared memory, the page cache, and what freed memory held;
    /// - settings of the kernel: mounts, sysctls, the host name, the clock if it was set, users and limits;
    /// - ports that are listened on, connections, forwarders and exec sockets made from the VM;
    /// - the state of the kernel's random number generator, process ids and the console's text.
    ///
    /// The environment, working folder and user of a command do not stay: they are the command's own, though what they
    /// name in the guest, such as `/etc/passwd` and profiles, does. Use it for users who trust each other alone.
    pub fn restore_on_release(mut self, restore: bool) -> Self {
        self.settings.reuse = !restore;
        self
    }

    /// The settings of each VM.
    pub fn config(mut self, config: VmConfig) -> Self {
        self.config = config;
        self
    }

    /// Makes the pool and waits until [`min`](Self::min) VMs are ready. The image is [baked](Image::bake) first, if it is not yet;
    /// then as many VMs are restored at the same time as the host has processors, after a first one alone.
    ///
    /// # Errors
    /// [`PoolError`]: the limits contradict each other, or a VM did not start. What had started has been stopped.
    ///
    /// # Cancel safety
    /// Cancelled, what has been started is stopped.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn build(self) -> Result<Pool, PoolError> {
        let Self { image, config, settings } = self;
        let Settings { min, max, acquire_timeout, .. } = settings;
        if max == 0 || min > max {
            return Err(PoolError::Limits { min, max });
        }
        let baked = image.bake(config).await?;
        let make = move || {
            let baked = baked.clone();
            async move { baked.start().await }
        };
        let (core, built) = Core::open(settings, make);
        // Without an answer the driver is gone, and its runtime with it.
        match built.await.unwrap_or(Err(StartError::Config("the runtime is shutting down"))) {
            Ok(()) => Ok(Pool { core: Arc::new(core), acquire_timeout }),
            Err(error) => {
                core.shutdown().await;
                Err(PoolError::Start(error))
            }
        }
    }
}
