//! From an OCI image to a running VM: builds the root filesystem, once, and boots it.

use super::GuestRoot;
use super::StartError;
use super::Vm;
use super::VmConfig;
use crate::image::Image;
use crate::image::Platform;
use crate::rootfs;
use crate::workload::signal_number;

impl Image {
    /// Boots this image in a VM of its own and waits until that answers.
    ///
    /// The root filesystem is built from the layers the first time and kept in the image's store. The image's ENV,
    /// WORKDIR and USER hold for every command that is run; its ENTRYPOINT and CMD are started by [`Vm::workload`].
    ///
    /// # Errors
    /// [`StartError`]: the root filesystem cannot be built from the layers, the guest kernel or agent is missing, or
    /// the guest does not come up in time. Nothing is left running then.
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
        let (image, guest) = (&self.config().platform, Platform::default());
        if !image.serves(&guest) {
            return Err(StartError::Platform { image: Box::new(image.clone()), guest: Box::new(guest) });
        }
        let root = self.root(&config).await?;
        Vm::start(root, config).await
    }

    /// The root filesystem and the part of the configuration that concerns processes.
    async fn root(&self, config: &VmConfig) -> Result<GuestRoot, StartError> {
        let builder = rootfs::Builder::new(self).limits(config.root_limits).progress(config.progress.clone());
        let built = builder.build().await?;
        let oci = self.config();
        let variable = |entry: &String| {
            let (name, value) = entry.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        let mut root = GuestRoot::erofs_files(built.files());
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
