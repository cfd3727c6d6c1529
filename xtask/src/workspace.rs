//! Where the repository is and how to call its cargo.

use std::path::Path;
use std::process::Command;

/// The repository's root folder.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies one level below the root")
}

/// Cargo, in the repository's root: the one that started this task if there is one.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// The script that continuous integration runs.
pub(crate) fn ci_script() -> Command {
    let mut script = Command::new(root().join(".ci/run"));
    script.current_dir(root());
    script
}
