//! The cases for agents: the suite is the host.

mod chunks;
mod control;
mod ending;
mod failing;
mod files;
mod flow;
mod framing;
mod renew;
mod request;
mod started;
mod stdio;
mod streams;
mod subject;
mod tars;
mod terminal;
mod workload;

use anyhow::Result;

use crate::case::Case;
use crate::report;
use crate::report::Line;
use crate::report::Only;
use crate::report::Report;

pub use subject::Subject;
pub use subject::Target;

const GROUPS: &[&[Case<Subject>]] = &[
    framing::CASES,
    request::CASES,
    failing::CASES,
    stdio::CASES,
    ending::CASES,
    flow::CASES,
    terminal::CASES,
    control::CASES,
    files::CASES,
    chunks::CASES,
    started::CASES,
    streams::CASES,
    tars::CASES,
    workload::CASES,
    renew::CASES,
];

/// All cases, in the order of their numbers.
pub fn cases() -> impl Iterator<Item = &'static Case<Subject>> {
    GROUPS.iter().copied().flatten()
}

/// Runs those cases that `only` means against `target`, telling `each` of every line as soon as it is known.
///
/// # Errors
/// When the agent cannot be started or reached, or does not get as far as the suite's folder.
pub fn run(target: &Target, only: &Only, each: impl FnMut(&Line)) -> Result<Report> {
    let subject = Subject::prepare(target)?;
    Ok(report::run(cases(), &subject, only, each))
}
