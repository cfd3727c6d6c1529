//! Where the kernel's source comes from: the distribution's package, or a tree given by hand.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;

use crate::packages;
use crate::process;
use crate::progress::Running;

const PACKAGE: &str = "linux-source-6.12";
const ARCHIVE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// A kernel source and its version.
#[derive(Debug)]
pub(crate) struct Source {
    version: String,
    /// The unpacked tree, or nothing for the package's archive.
    tree: Option<PathBuf>,
}

impl Source {
    /// The distribution's package, if it is installed.
    pub(crate) fn installed_package() -> Option<Self> {
        Some(Self { version: format!("{PACKAGE} {}", packages::version(PACKAGE)?), tree: None })
    }

    /// The distribution's package, installed now.
    pub(crate) fn install_package() -> Result<Self> {
        let elsewhere = "on a system without Debian's packages, give an unpacked Linux 6.12 tree by --source DIR";
        packages::ensure("the guest kernel's source", &[PACKAGE]).context(elsewhere)?;
        Self::installed_package().context(elsewhere)
    }

    /// An unpacked tree, named by the version in its Makefile; edits below that are the caller's to remember.
    pub(crate) fn tree(dir: &Path) -> Result<Self> {
        let dir = fs::canonicalize(dir).with_context(|| format!("cannot find {}", dir.display()))?;
        let makefile = fs::read_to_string(dir.join("Makefile"))
            .with_context(|| format!("{} holds no Linux source tree", dir.display()))?;
        let version = makefile_version(&makefile)
            .with_context(|| format!("{} is not the Makefile of a Linux tree", dir.join("Makefile").display()))?;
        Ok(Self { version: format!("linux {version}"), tree: Some(dir) })
    }

    /// Which source this is, to a reader and to the cache's key.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The tree to build from, unpacked into `scratch` if need be.
    pub(crate) fn unpack(&self, scratch: &Path) -> Result<PathBuf> {
        if let Some(tree) = &self.tree {
            return Ok(tree.clone());
        }
        let _running = Running::start(format!("unpacking {ARCHIVE}"));
        fs::create_dir(scratch)?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--xz", "--strip-components=1", "--file", ARCHIVE, "--directory"]).arg(scratch);
        process::output(&mut tar)?;
        Ok(scratch.to_owned())
    }
}

fn makefile_version(makefile: &str) -> Option<String> {
    let field = |name: &str| {
        makefile.lines().find_map(|line| Some(line.strip_prefix(name)?.trim_start().strip_prefix('=')?.trim()))
    };
    Some(format!("{}.{}.{}{}", field("VERSION")?, field("PATCHLEVEL")?, field("SUBLEVEL")?, field("EXTRAVERSION")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_makefile() {
        let makefile = "# SPDX\nVERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 117\nEXTRAVERSION = -rc1\nNAME = x\n";
        assert_eq!(makefile_version(makefile).as_deref(), Some("6.12.117-rc1"));
        assert_eq!(makefile_version("all:\n"), None);
    }
}
