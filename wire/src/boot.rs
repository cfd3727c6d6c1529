//! The boot configuration: what the host tells the agent about the image, as `/kiln.json` in the initramfs.

use serde::{Deserialize, Serialize};

/// Where the initramfs has the configuration.
pub const CONFIG_PATH: &str = "/kiln.json";

/// The host name of a guest whose configuration names none.
pub const DEFAULT_HOSTNAME: &str = "kiln";

/// What the agent, as PID 1, makes of the guest.
///
/// Every field has a default, so that a configuration of `{}` boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestConfig {
    /// The guest's host name.
    pub hostname: String,
    /// The content of `/etc/machine-id`; the image's own file stays when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// The content of `/etc/resolv.conf`; the image's own file stays when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolv_conf: Option<String>,
    /// The image's ENV, in its order; a later entry of a name wins.
    pub env: Vec<(String, String)>,
    /// The image's WORKDIR.
    pub workdir: String,
    /// The image's USER: `name`, `uid`, `name:group` or `uid:gid`; root when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// How much the guest may write over its root image, in bytes.
    pub overlay_size_bytes: u64,
    /// The block device with the root image.
    pub root_device: String,
    /// The type of the filesystem on it.
    pub root_fs: String,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            hostname: DEFAULT_HOSTNAME.to_owned(),
            machine_id: None,
            resolv_conf: None,
            env: Vec::new(),
            workdir: "/".to_owned(),
            user: None,
            overlay_size_bytes: 64 << 20,
            root_device: "/dev/vda".to_owned(),
            root_fs: "erofs".to_owned(),
        }
    }
}

impl GuestConfig {
    /// The JSON that goes to [`CONFIG_PATH`].
    ///
    /// # Panics
    /// Never: a structure of strings and numbers always has a JSON form.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings, numbers and lists of them always serialise")
    }
}
