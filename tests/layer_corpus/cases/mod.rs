//! The cases by topic. A rule that a comment calls Docker's is that of its `pkg/archive`, which containerd shares.

mod archives;
mod attributes;
mod compression;
mod kinds;
mod links;
mod metadata;
mod names;
mod replacing;
mod sparse;
mod whiteouts;

use crate::case::Case;

/// Every case, numbered within its topic.
pub(crate) fn all() -> Vec<Case> {
    let topics = [
        ("compression", compression::cases()),
        ("archives", archives::cases()),
        ("names", names::cases()),
        ("kinds", kinds::cases()),
        ("sparse", sparse::cases()),
        ("metadata", metadata::cases()),
        ("attributes", attributes::cases()),
        ("links", links::cases()),
        ("replacing", replacing::cases()),
        ("whiteouts", whiteouts::cases()),
    ];
    let numbered = topics.into_iter().flat_map(|(topic, cases)| {
        cases.into_iter().enumerate().map(move |(index, mut case)| {
            case.number = format!("{topic} {}", index + 1);
            case
        })
    });
    numbered.collect()
}
