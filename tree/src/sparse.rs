//! Sparse files: which parts of a file an archive has the data of (GNU tar's manual, "Sparse Formats").
//!
//! The old format has the map in the header and in blocks after it, pax 0.0 and 0.1 in records, pax 1.0 at the start of the
//! content. In all of them it is a list of runs of data; what is between them, and after the last, reads as zeros.

use std::collections::VecDeque;

use tar::GnuSparseHeader;

use crate::error::ArchiveError;
use crate::pax;

/// A run of data in a file, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Extent {
    start: u64,
    end: u64,
}

/// A map as it is read, run by run.
#[derive(Debug)]
pub(crate) struct Map {
    extents: VecDeque<Extent>,
    /// Where the last run ends, one without data too.
    end: u64,
    /// The length of all runs together.
    stored: u64,
    limit: usize,
    /// What is left of the limit.
    left: usize,
}

const MALFORMED: ArchiveError = ArchiveError::Malformed("map of a sparse file");

impl Map {
    /// A map that may have `limit` runs.
    pub(crate) const fn new(limit: usize) -> Self {
        Self { extents: VecDeque::new(), end: 0, stored: 0, limit, left: limit }
    }

    /// Appends a run, which may not start before the one before it ends.
    pub(crate) fn push(&mut self, start: u64, length: u64) -> Result<(), ArchiveError> {
        self.charge()?;
        let end = start.checked_add(length).filter(|_| start >= self.end).ok_or(MALFORMED)?;
        self.end = end;
        // No more than `end`, as runs do not overlap.
        self.stored += length;
        match self.extents.back_mut() {
            _ if length == 0 => {}
            Some(last) if last.end == start => last.end = end,
            _ => self.extents.push_back(Extent { start, end }),
        }
        Ok(())
    }

    /// Appends what the old format has in a header or in a block after it. An unused place ends the list there, as with GNU tar.
    pub(crate) fn push_headers(&mut self, headers: &[GnuSparseHeader]) -> Result<(), ArchiveError> {
        // Blocks without a run may not follow each other for ever either.
        self.charge()?;
        for header in headers.iter().take_while(|header| !header.is_empty()) {
            let number = |value: std::io::Result<u64>| value.map_err(|_| MALFORMED);
            self.push(number(header.offset())?, number(header.length())?)?;
        }
        Ok(())
    }

    /// Counts against the limit.
    fn charge(&mut self) -> Result<(), ArchiveError> {
        let limit = ArchiveError::Limit { what: "runs of data in a sparse file", limit: self.limit as u64 };
        self.left = self.left.checked_sub(1).ok_or(limit)?;
        Ok(())
    }

    /// The content of a file of `size` bytes, of which the archive has `stored`.
    pub(crate) fn content(self, size: u64, stored: u64) -> Result<Content, ArchiveError> {
        if self.end > size || self.stored != stored {
            return Err(MALFORMED);
        }
        Ok(Content { extents: self.extents, at: 0, size })
    }
}

/// The map at the start of a content, in the format of pax 1.0: numbers in lines, filled up to a block.
#[derive(Debug)]
pub(crate) struct Lines {
    map: Map,
    /// Runs still to come; not known before the first line.
    runs: Option<u64>,
    start: Option<u64>,
    line: Vec<u8>,
}

impl Lines {
    pub(crate) const fn new(map: Map) -> Self {
        Self { map, runs: None, start: None, line: Vec::new() }
    }

    /// Takes the next block, and whether the map ends in it.
    pub(crate) fn push(&mut self, block: &[u8]) -> Result<bool, ArchiveError> {
        for byte in block {
            if *byte != b'\n' {
                // The longest number of 64 bits.
                if self.line.len() == 20 {
                    return Err(MALFORMED);
                }
                self.line.push(*byte);
                continue;
            }
            let number = pax::number(&self.line)?.ok_or(MALFORMED)?;
            self.line.clear();
            match (self.runs, self.start.take()) {
                (None, _) => self.runs = Some(number),
                (Some(_), None) => self.start = Some(number),
                (Some(runs), Some(start)) => {
                    self.map.push(start, number)?;
                    self.runs = Some(runs - 1);
                }
            }
            if self.runs == Some(0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(crate) fn into_map(self) -> Map {
        self.map
    }
}

/// What the pax records before an entry say of a sparse file.
#[derive(Debug, Default)]
pub(crate) struct Records {
    /// The file's name: that of the entry may be another, for programs that do not know the format.
    pub(crate) name: Option<Vec<u8>>,
    /// The file's size: that of the entry is that of what the archive has of it.
    pub(crate) size: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
    /// Runs in the map.
    runs: Option<u64>,
    /// Starts and lengths of runs, in turns.
    numbers: Vec<u64>,
}

/// Where an entry has its map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the records: pax 0.0 and 0.1, which need not say so.
    Records,
    /// At the start of the content: pax 1.0.
    Content,
    /// In a way that nobody had thought of yet.
    Unknown,
}

impl Records {
    /// Takes the record `GNU.sparse.KEY`.
    pub(crate) fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveError> {
        match key {
            b"name" => self.name = (!value.is_empty()).then(|| value.to_vec()),
            b"size" | b"realsize" => self.size = pax::number(value)?,
            b"major" => self.major = pax::number(value)?,
            b"minor" => self.minor = pax::number(value)?,
            b"numblocks" => self.runs = pax::number(value)?,
            b"map" => {
                let numbers = value.split(|byte| *byte == b',').map(|text| pax::number(text)?.ok_or(MALFORMED));
                self.numbers = numbers.collect::<Result<_, _>>()?;
            }
            b"offset" | b"numbytes" => {
                let is_start = self.numbers.len().is_multiple_of(2);
                if is_start != (key == b"offset") {
                    return Err(MALFORMED);
                }
                self.numbers.push(pax::number(value)?.ok_or(MALFORMED)?);
            }
            _ => {}
        }
        Ok(())
    }

    pub(crate) const fn place(&self) -> Place {
        match (self.major, self.minor) {
            (None, None) | (Some(0), Some(0 | 1)) => Place::Records,
            (Some(1), Some(0)) => Place::Content,
            _ => Place::Unknown,
        }
    }

    /// Adds the runs in the records to `map`.
    pub(crate) fn fill(&self, map: &mut Map) -> Result<(), ArchiveError> {
        let found = self.numbers.len() as u64 / 2;
        if self.runs.is_some_and(|runs| runs != found) {
            return Err(MALFORMED);
        }
        for run in self.numbers.chunks(2) {
            let [start, length] = *run else { return Err(MALFORMED) };
            map.push(start, length)?;
        }
        Ok(())
    }
}

/// What is still to come of an entry's content. Empty by default.
#[derive(Debug, Default)]
pub(crate) struct Content {
    extents: VecDeque<Extent>,
    at: u64,
    size: u64,
}

/// What comes next in a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Data(u64),
    Hole(u64),
    End,
}

impl Content {
    /// Nothing; `default` as a constant.
    pub(crate) const fn empty() -> Self {
        Self { extents: VecDeque::new(), at: 0, size: 0 }
    }

    /// Becomes `size` bytes of data. Keeps its allocation: most files are like this.
    pub(crate) fn begin_whole(&mut self, size: u64) {
        self.extents.clear();
        if size > 0 {
            self.extents.push_back(Extent { start: 0, end: size });
        }
        (self.at, self.size) = (0, size);
    }

    pub(crate) fn next(&self) -> Next {
        match self.extents.front() {
            Some(extent) if extent.start <= self.at => Next::Data(extent.end - self.at),
            Some(extent) => Next::Hole(extent.start - self.at),
            None if self.at < self.size => Next::Hole(self.size - self.at),
            None => Next::End,
        }
    }

    /// Goes on by `count` bytes, at most as far as what comes next reaches.
    pub(crate) fn advance(&mut self, count: u64) {
        self.at += count;
        if self.extents.front().is_some_and(|extent| extent.end <= self.at) {
            self.extents.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The content as data (`true`) and holes.
    fn runs(mut content: Content) -> Vec<(bool, u64)> {
        let mut runs = Vec::new();
        loop {
            let (is_data, length) = match content.next() {
                Next::Data(length) => (true, length),
                Next::Hole(length) => (false, length),
                Next::End => return runs,
            };
            content.advance(length);
            runs.push((is_data, length));
        }
    }

    fn map(runs: &[(u64, u64)]) -> Result<Map, ArchiveError> {
        let mut map = Map::new(10);
        for &(start, length) in runs {
            map.push(start, length)?;
        }
        Ok(map)
    }

    #[test]
    fn holes_are_between_the_runs_and_after_them() {
        let content = map(&[(0, 2), (5, 1), (6, 1), (9, 0)]).expect("ascends").content(20, 4).expect("adds up");
        assert_eq!(runs(content), [(true, 2), (false, 3), (true, 2), (false, 13)]);
        assert_eq!(runs(map(&[(1 << 40, 0)]).expect("one").content(1 << 40, 0).expect("adds up")), [(false, 1 << 40)]);
        assert_eq!(runs(map(&[]).expect("none").content(0, 0).expect("adds up")), []);
    }

    #[test]
    fn a_map_that_cannot_be_is_refused() {
        for bad in [&[(1, 1), (1, 1)][..], &[(0, 3), (2, 1)], &[(5, 0), (4, 1)], &[(u64::MAX, 1)]] {
            assert!(matches!(map(bad), Err(ArchiveError::Malformed(_))), "{bad:?}");
        }
        let content = |size, stored| map(&[(0, 2), (5, 1)]).expect("ascends").content(size, stored);
        content(6, 3).expect("as it is");
        for (size, stored) in [(5, 3), (6, 2), (6, 4)] {
            assert!(matches!(content(size, stored), Err(ArchiveError::Malformed(_))), "{size} {stored}");
        }
    }

    #[test]
    fn more_runs_than_allowed_are_refused_also_empty_ones() {
        for length in [0, 1] {
            let many: Vec<_> = (0..11).map(|at| (2 * at, length)).collect();
            map(&many[..10]).expect("ten");
            assert!(matches!(map(&many), Err(ArchiveError::Limit { limit: 10, .. })));
        }
    }

    #[test]
    fn lines_end_where_they_say_and_not_before() {
        let mut lines = Lines::new(Map::new(10));
        assert!(!lines.push(b"2\n0\n1").expect("numbers"));
        assert!(!lines.push(b"0\n20\n").expect("numbers"));
        assert!(lines.push(b"5\n\0\0\0").expect("numbers"));
        assert_eq!(
            runs(lines.into_map().content(30, 15).expect("adds up")),
            [(true, 10), (false, 10), (true, 5), (false, 5)]
        );
        for bad in [&b"x\n"[..], b"\n", b"1\n\n", b"-1\n", b"000000000000000000001\n", b"18446744073709551616\n"] {
            Lines::new(Map::new(10)).push(bad).expect_err("no numbers");
        }
    }

    #[test]
    fn records_take_turns() {
        let apply = |pairs: &[(&str, &str)]| {
            let mut records = Records::default();
            for (key, value) in pairs {
                records.apply(key.as_bytes(), value.as_bytes())?;
            }
            let mut map = Map::new(10);
            records.fill(&mut map)?;
            map.content(10, 2).map(runs)
        };
        let whole = apply(&[("offset", "1"), ("numbytes", "2"), ("offset", "10"), ("numbytes", "0")]);
        assert_eq!(whole.expect("0.0"), [(false, 1), (true, 2), (false, 7)]);
        assert_eq!(apply(&[("map", "1,2,10,0")]).expect("0.1"), [(false, 1), (true, 2), (false, 7)]);
        let no_turns = [("offset", "1"), ("offset", "2")];
        for bad in [
            &no_turns[..],
            &[("numbytes", "2")],
            &[("offset", "")],
            &[("map", "1,2,3")],
            &[("map", "1,2"), ("numblocks", "2")],
            &[("map", "1,,2")],
        ] {
            apply(bad).expect_err("no turns");
        }
    }

    proptest! {
        #[test]
        fn any_map_gives_back_its_runs_or_is_refused(
            numbers in prop::collection::vec((0..50_u64, 0..20_u64), 0..10), size in 0..100_u64,
        ) {
            let stored = numbers.iter().map(|(_, length)| length).sum();
            let Ok(content) = map(&numbers).and_then(|map| map.content(size, stored)) else { return Ok(()) };
            let found = runs(content);
            prop_assert_eq!(found.iter().map(|(_, length)| length).sum::<u64>(), size);
            let mut expected = vec![false; size as usize];
            for (start, length) in numbers {
                expected[start as usize..(start + length) as usize].fill(true);
            }
            let found: Vec<_> = found.iter().flat_map(|&(is_data, length)| vec![is_data; length as usize]).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_lines_are_read_or_refused(text in "[0-9\n]{0,60}") {
            let _ = Lines::new(Map::new(5)).push(text.as_bytes());
        }
    }
}
