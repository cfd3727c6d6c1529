//! Ranges of whole pages of RAM.

use serde::{Deserialize, Serialize};

use crate::units::PAGE_SIZE;

/// A range of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Where it begins, in bytes; a multiple of the page size.
    pub offset: u64,
    /// Its bytes; a positive multiple of the page size.
    pub len: u64,
}

impl Extent {
    /// The byte after it.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// As few extents as `pages` make: offsets of pages, ascending.
    pub fn runs(pages: impl Iterator<Item = u64>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for offset in pages {
            match runs.last_mut().filter(|run| run.end() == offset) {
                Some(run) => run.len += PAGE_SIZE,
                None => runs.push(Self { offset, len: PAGE_SIZE }),
            }
        }
        runs
    }

    /// Joins those of `extents`, ascending, that have the smallest gaps between them, until there are at most `most`,
    /// which is one at least.
    #[must_use]
    pub fn join(extents: Vec<Self>, most: usize) -> Vec<Self> {
        let too_many = extents.len().saturating_sub(most);
        if too_many == 0 {
            return extents;
        }
        let mut gaps: Vec<u64> = extents.windows(2).map(|pair| pair[1].offset - pair[0].end()).collect();
        let (_, largest, _) = gaps.select_nth_unstable(too_many - 1);
        let largest = *largest;
        let mut joined: Vec<Self> = Vec::with_capacity(most);
        for extent in extents {
            match joined.last_mut().filter(|last| extent.offset - last.end() <= largest) {
                Some(last) => last.len = extent.end() - last.offset,
                None => joined.push(extent),
            }
        }
        joined
    }

    /// The one of `extents`, ascending, that holds `offset`.
    #[must_use]
    pub fn find(extents: &[Self], offset: u64) -> Option<Self> {
        let next = extents.partition_point(|extent| extent.end() <= offset);
        extents.get(next).copied().filter(|extent| extent.offset <= offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(ranges: &[(u64, u64)]) -> Vec<Extent> {
        ranges.iter().map(|(offset, len)| Extent { offset: offset * PAGE_SIZE, len: len * PAGE_SIZE }).collect()
    }

    #[test]
    fn pages_in_a_row_are_one_extent() {
        let pages = [0, 1, 4, 6, 7, 8].map(|page| page * PAGE_SIZE);
        assert_eq!(Extent::runs(pages.into_iter()), extents(&[(0, 2), (4, 1), (6, 3)]));
        assert_eq!(Extent::runs(std::iter::empty()), []);
    }

    #[test]
    fn too_many_extents_are_joined_across_the_smallest_gaps() {
        let scattered = extents(&[(0, 1), (2, 1), (10, 1), (13, 2), (100, 1)]);
        assert_eq!(Extent::join(scattered.clone(), 5), scattered);
        assert_eq!(Extent::join(scattered.clone(), 3), extents(&[(0, 3), (10, 5), (100, 1)]));
        assert_eq!(Extent::join(scattered, 1), extents(&[(0, 101)]));
    }

    #[test]
    fn an_offset_is_found_in_the_extent_that_holds_it() {
        let some = extents(&[(1, 2), (5, 1)]);
        let found = |page: u64| Extent::find(&some, page * PAGE_SIZE).map(|extent| extent.offset / PAGE_SIZE);
        assert_eq!([0, 1, 2, 3, 5, 6].map(found), [None, Some(1), Some(1), None, Some(5), None]);
    }
}
