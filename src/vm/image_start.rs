//! From an OCI image to a running VM: builds the root filesystem, once, and boots it.

use super::Assets;
use super::GuestRoot;
use super::StartError;
use super::Vm;
use super::VmConfig;
use crate::image::Image;
use crate::image::Platform;
use crate::rootfs;
use crate::rootfs::RootfsCache;

impl Image {
    /// Boots this image in a VM of its own and waits until that answers.
    ///
    /// The root filesystem is built from the layers the first time and cached by their digests. The image's ENV,
    /// WORKDIR and USER hold for every command that is run; its ENTRYPOINT and CMD are not started.
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
            return Err(StartError::Platform { image: image.clone(), guest });
        }
        let root = self.root(&config).await?;
        Vm::start(root, config).await
    }

    /// The root filesystem and the part of the configuration that concerns processes.
    async fn root(&self, config: &VmConfig) -> Result<GuestRoot, StartError> {
        let assets = config.assets.clone().or_else(Assets::user);
        let assets = assets.ok_or(StartError::Config("the user has no home folder; name a cache folder"))?;
        let cache = RootfsCache::open(assets.dir().join("rootfs")).await?;
        let built = rootfs::build(self, &cache).await?;
        let oci = self.config();
        let variable = |entry: &String| {
            let (name, value) = entry.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        let mut root = GuestRoot::erofs(built.path);
        root.env = oci.env.iter().filter_map(variable).collect();
        root.user = oci.user.clone().filter(|user| !user.is_empty());
        root.hostname = oci.hostname().map(str::to_owned);
        if let Some(folder) = oci.working_dir.clone().filter(|folder| !folder.is_empty()) {
            root.workdir = folder;
        }
        Ok(root)
    }
}
