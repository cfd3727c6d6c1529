//! From an OCI image to a running VM.

use std::sync::Arc;

use super::GuestRoot;
use super::StartError;
use super::Vm;
use super::VmConfig;
use crate::hv::Hypervisor;
use crate::hv::soft::Soft;
use crate::image::Image;
use crate::image::Platform;
use crate::image::run_blocking;
use crate::rootfs;
use crate::workload::signal_number;

impl Image {
    /// Starts this image in a VM of its own and waits until that answers.
    ///
    /// The first time the root filesystem is built from the layers, a guest is booted and kept as a snapshot; from then on
    /// guests are restored from that, in milliseconds, with the host's time, entropy of their own and a machine id of their
    /// own ([`bake`](Self::bake)). Both are kept in the image's store. The image's ENV, WORKDIR and USER hold for every
    /// command that is run; its ENTRYPOINT and CMD are started by [`Vm::workload`].
    ///
    /// # Errors
    /// [`StartError`]: the root filesystem cannot be built from the layers, the guest kernel or agent is missing, the
    /// guest does not come up in time, or its snapshot cannot be written. Nothing is left running then.
    ///
    /// # Cancel safety
    /// Dropping the future stops what has been started; a root filesystem half built is removed.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::Error> {
    /// let image = kiln::Image::from_oci_layout("busybox-layout").await?;
    /// let vm = image.start(kiln::VmConfig::new()).await?;
    /// let out = vm.exec_builder().argv(["uname", "-a"]).output().await?;
    /// assert!(out.success());
    /// # Ok(()) }
    /// ```
    pub async fn start(&self, config: VmConfig) -> Result<Vm, StartError> {
        self.bake(config).await?.start().await
    }

    /// Boots this image in a VM of its own, from the kernel's first instruction on, and neither looks for a snapshot nor
    /// makes one. [`VmConfig::warmup`] does not count.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    ///
    /// # Cancel safety
    /// As [`start`](Self::start).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(image: kiln::Image) -> Result<(), kiln::Error> {
    /// let vm = image.boot(kiln::VmConfig::new().verbose_boot(true)).await?;
    /// println!("{}", vm.console().text());
    /// # Ok(()) }
    /// ```
    pub async fn boot(&self, config: VmConfig) -> Result<Vm, StartError> {
        let root = self.root(&config).await?;
        Vm::start(root, self.with_engine(config, None).await?).await
    }

    /// `config` with its engine open, for a guest that knows the processor `profile`, if it does. The software engine is that of this value and its clones, so that guests of one image
    /// spare each other what they can.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn with_engine(
        &self,
        mut config: VmConfig,
        profile: Option<String>,
    ) -> Result<VmConfig, StartError> {
        let (image, choice) = (self.clone(), config.engine);
        let engine =
            run_blocking(move || Ok::<_, StartError>(choice.open(profile.as_deref(), || image.soft())?)).await?;
        config.engine = engine.into();
        Ok(config)
    }

    fn soft(&self) -> Arc<dyn Hypervisor> {
        match self.companion(Soft::new) {
            Some(engine) => engine,
            None => Arc::new(Soft::new()),
        }
    }

    /// The root filesystem and the part of the configuration that concerns processes.
    pub(super) async fn root(&self, config: &VmConfig) -> Result<GuestRoot, StartError> {
        let (image, guest) = (&self.config().platform, Platform::default());
        if !image.serves(&guest) {
            return Err(StartError::Platform { image: Box::new(image.clone()), guest: Box::new(guest) });
        }
        let builder = rootfs::Builder::new(self).limits(config.root_limits).progress(config.progress.clone());
        let built = builder.build().await?;
        let oci = self.config();
        let variable = |entry: &String| {
            let (name, value) = entry.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        let mut root = GuestRoot::erofs_files(built.files());
        root.digest = Some(built.digest().to_string());
        root.env = oci.env.iter().filter_map(variable).collect();
        root.command = oci.command();
        root.stop_signal = oci.stop_signal.as_deref().and_then(stop_signal);
        root.user = oci.user.clone().filter(|user| !user.is_empty());
        root.hostname = oci.hostname().map(str::to_owned);
        if let Some(folder) = oci.working_dir.clone().filter(|folder| !folder.is_empty()) {
            root.workdir = folder;
        }
        Ok(root)
    }
}

/// The number of a STOPSIGNAL; one that is no signal counts as none, as with Docker.
fn stop_signal(text: &str) -> Option<u8> {
    let number = signal_number(text);
    if number.is_none() {
        tracing::warn!(stop_signal = text, "the image's stop signal is unknown, SIGTERM takes its place");
    }
    number
}
