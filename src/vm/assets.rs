//! Where the guest kernel and the agent are found: a cache folder that `cargo xtask` fills.
//!
//! ```text
//!   <cache>/kernel/<key>/vmlinux        <cache>/kernel/current -> <key>
//!   <cache>/agent/<key>/kiln-agent      <cache>/agent/current  -> <key>
//! ```
//! This module only looks; it never builds or downloads.

use std::path::{Path, PathBuf};

/// Builds the guest kernel into the cache.
pub const KERNEL_COMMAND: &str = "cargo xtask kernel";
/// Builds the agent into the cache.
pub const AGENT_COMMAND: &str = "cargo xtask agent";

/// A cache folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assets {
    dir: PathBuf,
}

impl Assets {
    /// The cache at `dir`.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The user's cache, `.cache/kiln` in the home folder; `None` when the user has no home.
    #[must_use]
    pub fn user() -> Option<Self> {
        std::env::home_dir().filter(|home| home.is_absolute()).map(|home| Self::at(home.join(".cache/kiln")))
    }

    /// The cache folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the current kernel is, if it was built.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("kernel/current/vmlinux")
    }

    /// Where the current agent is, if it was built.
    #[must_use]
    pub fn agent(&self) -> PathBuf {
        self.dir.join("agent/current/kiln-agent")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_what_xtask_writes() {
        let assets = Assets::at("/cache");
        assert_eq!(assets.kernel(), Path::new("/cache/kernel/current/vmlinux"));
        assert_eq!(assets.agent(), Path::new("/cache/agent/current/kiln-agent"));
    }
}
