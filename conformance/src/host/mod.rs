//! The cases for hosts: the suite is the agent.

mod ending;
mod input;
mod output;
mod play;
mod rules;

use anyhow::Result;

use crate::case::Case;
use crate::program::CommandLine;
use crate::report;
use crate::report::Line;
use crate::report::Only;
use crate::report::Report;

pub use play::Subject;

const GROUPS: &[&[Case<Subject>]] = &[input::CASES, output::CASES, ending::CASES, rules::CASES];

/// All cases, in the order of their numbers.
pub fn cases() -> impl Iterator<Item = &'static Case<Subject>> {
    GROUPS.iter().copied().flatten()
}

/// Runs those cases that `only` means against the program that `command` starts, telling `each` of every line as soon as
/// it is known.
///
/// # Errors
/// When there can be no socket to listen on.
pub fn run(command: &CommandLine, only: &Only, each: impl FnMut(&Line)) -> Result<Report> {
    let subject = Subject::new(command.clone())?;
    Ok(report::run(cases(), &subject, only, each))
}
