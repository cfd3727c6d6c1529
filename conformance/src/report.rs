//! Running cases, and what came of them: a line a case, and the counts.

use std::fmt;

use serde_json::Value;
use serde_json::json;

use crate::case::Case;
use crate::case::Offers;

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The sentence holds.
    Holds,
    /// It does not; what was seen.
    Fails(String),
    /// The case says nothing about this subject; why.
    NotApplicable(String),
}

/// One case's line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The case's number.
    pub id: &'static str,
    /// The case's title.
    pub title: &'static str,
    /// What came of it.
    pub verdict: Verdict,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, title, verdict } = self;
        match verdict {
            Verdict::Holds => write!(f, "{id}  holds     {title}"),
            Verdict::Fails(seen) => write!(f, "{id}  FAILS     {title}: {seen}"),
            Verdict::NotApplicable(why) => write!(f, "{id}  n/a       {title}: {why}"),
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The cases that were run, in their order.
    pub lines: Vec<Line>,
}

impl Report {
    /// How many cases hold.
    #[must_use]
    pub fn passed(&self) -> usize {
        self.count(|verdict| matches!(verdict, Verdict::Holds))
    }

    /// How many fail.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.count(|verdict| matches!(verdict, Verdict::Fails(_)))
    }

    /// How many say nothing about the subject.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.count(|verdict| matches!(verdict, Verdict::NotApplicable(_)))
    }

    /// The line of plain counts.
    #[must_use]
    pub fn summary(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed(), self.failed(), self.skipped())
    }

    /// What came of the case `id`.
    #[must_use]
    pub fn verdict(&self, id: &str) -> Option<&Verdict> {
        self.lines.iter().find(|line| line.id == id).map(|line| &line.verdict)
    }

    /// The report for programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let cases = self.lines.iter().map(|Line { id, title, verdict }| match verdict {
            Verdict::Holds => json!({ "id": id, "title": title, "verdict": "holds" }),
            Verdict::Fails(seen) => json!({ "id": id, "title": title, "verdict": "fails", "seen": seen }),
            Verdict::NotApplicable(why) => json!({ "id": id, "title": title, "verdict": "n/a", "why": why }),
        });
        json!({
            "passed": self.passed(),
            "failed": self.failed(),
            "skipped": self.skipped(),
            "cases": cases.collect::<Vec<_>>(),
        })
    }

    fn count(&self, wanted: impl Fn(&Verdict) -> bool) -> usize {
        self.lines.iter().filter(|line| wanted(&line.verdict)).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "{line}")?;
        }
        f.write_str(&self.summary())
    }
}

/// Which cases to run: numbers, or their beginnings with a `*` behind; all by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Only(Vec<String>);

impl Only {
    /// The cases that one of `patterns` means.
    pub fn new(patterns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self(patterns.into_iter().map(Into::into).collect())
    }

    /// Whether the case `id` is meant.
    #[must_use]
    pub fn means(&self, id: &str) -> bool {
        let one = |pattern: &String| match pattern.strip_suffix('*') {
            Some(head) => id.starts_with(head),
            None => id == pattern,
        };
        self.0.is_empty() || self.0.iter().any(one)
    }
}

/// Runs those `cases` that `only` means, telling `each` of every line as soon as it is known.
pub(crate) fn run<'a, S: Offers + 'a>(
    cases: impl Iterator<Item = &'a Case<S>>,
    subject: &S,
    only: &Only,
    mut each: impl FnMut(&Line),
) -> Report {
    let mut report = Report::default();
    for &Case { id, title, requires, run } in cases.filter(|case| only.means(case.id)) {
        let verdict = match requires.iter().find_map(|what| subject.lacks(what)) {
            Some(why) => Verdict::NotApplicable(why),
            None => run(subject).map_or_else(|finding| Verdict::Fails(finding.to_string()), |()| Verdict::Holds),
        };
        let line = Line { id, title, verdict };
        each(&line);
        report.lines.push(line);
    }
    report
}
