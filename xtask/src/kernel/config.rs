//! The list of options that are on, and the check that the kernel kept them.
//!
//! Kconfig drops an option in silence when what it depends on is off or it was renamed; a kernel without, say,
//! vsock then boots to an agent that nobody can reach. Only lines `CONFIG_NAME=value` are accepted: what is
//! not listed is off, so a line that turns something off would say nothing.

use std::collections::HashSet;

use anyhow::Result;
use anyhow::bail;

/// A parsed configuration fragment: its assignments, a line each, in the order written.
///
/// Comments are left out, so that explaining an option better does not rebuild the kernel.
#[derive(Debug)]
pub(crate) struct Config {
    options: String,
}

impl Config {
    /// Accepts comments, empty lines and assignments other than `=n`, each option once.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut options = String::new();
        let mut seen = HashSet::new();
        for (index, line) in text.lines().enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line.split_once('=') {
                Some((name, value)) if is_option(name) && !value.is_empty() && value != "n" => {
                    if !seen.insert(name) {
                        bail!("kernel configuration line {}: {name} is set twice", index + 1);
                    }
                    options.push_str(line);
                    options.push('\n');
                }
                _ => bail!("kernel configuration line {}: `{line}` does not turn an option on", index + 1),
            }
        }
        Ok(Self { options })
    }

    /// The assignments, ready for Kconfig.
    pub(crate) fn options(&self) -> &str {
        &self.options
    }

    /// Fails with the lines that the kernel's own full `.config` does not hold.
    pub(crate) fn check_kept(&self, full: &str) -> Result<()> {
        let kept: HashSet<_> = full.lines().collect();
        let dropped: Vec<_> = self.options.lines().filter(|line| !kept.contains(line)).collect();
        if dropped.is_empty() {
            return Ok(());
        }
        bail!("this kernel source did not accept these lines of the configuration:\n{}", dropped.join("\n"))
    }
}

fn is_option(name: &str) -> bool {
    name.strip_prefix("CONFIG_")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repositorys_configuration_is_well_formed() {
        Config::parse(include_str!("../../../guest-kernel/kernel.config")).unwrap();
    }

    #[test]
    fn a_dropped_option_is_named() {
        let config = Config::parse("# why\nCONFIG_NET=y\nCONFIG_NR_CPUS=8\n").unwrap();
        assert_eq!(config.options(), "CONFIG_NET=y\nCONFIG_NR_CPUS=8\n");
        config.check_kept("CONFIG_NR_CPUS=8\nCONFIG_NET=y\nCONFIG_TTY=y\n").unwrap();
        let error = config.check_kept("# CONFIG_NET is not set\nCONFIG_NR_CPUS=64\n").unwrap_err().to_string();
        assert!(error.ends_with(":\nCONFIG_NET=y\nCONFIG_NR_CPUS=8"), "{error}");
    }

    #[test]
    fn lines_that_turn_nothing_on_are_refused() {
        for line in ["CONFIG_NET=n", "CONFIG_NET", "NET=y", "CONFIG_=y", "CONFIG_NET =y", "CONFIG_NET=y\nCONFIG_NET=y"]
        {
            assert!(Config::parse(line).is_err(), "{line}");
        }
    }
}
