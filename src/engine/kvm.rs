//! What is asked of `/dev/kvm` before there is an engine on it, and that engine, where both can be.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(super) use linux::{examine, open};
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub(super) use nowhere::{examine, open};

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod linux {
    use std::ffi::CString;
    use std::io;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;
    use std::sync::Arc;

    use crate::engine::KvmDevice;
    use crate::hv::HvError;
    use crate::hv::Hypervisor;
    use crate::hv::kvm::Kvm;

    /// The engine.
    pub(in crate::engine) fn open() -> Result<Arc<dyn Hypervisor>, HvError> {
        Ok(Arc::new(Kvm::new()?))
    }

    /// Opens the device at `path` and asks what it is.
    pub(in crate::engine) fn examine(path: &Path) -> io::Result<KvmDevice> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let device = kvm_ioctls::Kvm::new_with_path(path);
        let device = device.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        match device.get_api_version() {
            // It is something else, and knows no such request.
            ..0 => Err(io::Error::last_os_error()),
            api_version => Ok(KvmDevice::Open { api_version }),
        }
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod nowhere {
    use std::io;
    use std::path::Path;
    use std::sync::Arc;

    use crate::engine::KvmDevice;
    use crate::hv::HvError;
    use crate::hv::Hypervisor;

    pub(in crate::engine) fn open() -> Result<Arc<dyn Hypervisor>, HvError> {
        Err(HvError::Unsupported("KVM"))
    }

    pub(in crate::engine) fn examine(_path: &Path) -> io::Result<KvmDevice> {
        Err(io::ErrorKind::NotFound.into())
    }
}
