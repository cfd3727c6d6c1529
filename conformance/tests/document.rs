//! The table of the protocol document and the cases in code are one list.

use kiln_conformance::agent;
use kiln_conformance::host;

const DOCUMENT: &str = include_str!("../../docs/exec-protocol.md");

/// The rows `| A01 | title |` of the document.
fn table() -> Vec<(String, String)> {
    let rows = DOCUMENT.lines().filter_map(|line| {
        let (id, title) = line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | ")?;
        is_id(id).then(|| (id.to_owned(), title.to_owned()))
    });
    rows.collect()
}

fn is_id(text: &str) -> bool {
    let digits = text.strip_prefix(['A', 'H']).unwrap_or_default();
    digits.len() >= 2 && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn cases() -> Vec<(String, String)> {
    let agents = agent::cases().map(|case| (case.id.to_owned(), case.title.to_owned()));
    agents.chain(host::cases().map(|case| (case.id.to_owned(), case.title.to_owned()))).collect()
}

#[test]
fn the_document_lists_every_case_and_no_other() {
    let (table, cases) = (table(), cases());
    for row in &cases {
        assert!(table.contains(row), "the document has no row | {} | {} |", row.0, row.1);
    }
    assert_eq!(table, cases);
}

#[test]
fn numbers_are_consecutive() {
    let numbered = |letter: char, count| (1..=count).map(move |number| format!("{letter}{number:02}"));
    let expected: Vec<_> = numbered('A', agent::cases().count()).chain(numbered('H', host::cases().count())).collect();
    assert_eq!(cases().into_iter().map(|(id, _)| id).collect::<Vec<_>>(), expected);
}

#[test]
fn every_number_in_brackets_is_a_case() {
    let ids: Vec<_> = cases().into_iter().map(|(id, _)| id).collect();
    let brackets = DOCUMENT.split('[').skip(1).filter_map(|rest| rest.split_once(']')).map(|(inside, _)| inside);
    for id in brackets.flat_map(|inside| inside.split(", ")).filter(|id| is_id(id)) {
        assert!(ids.iter().any(|known| known == id), "[{id}] is no case");
    }
}
