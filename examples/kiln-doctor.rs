//! What this machine can do for guests, what is in the way, and what helps: `cargo run --example kiln-doctor -- [--json]`.
//!
//! Ends with 0 when guests can be started, else with 1; `--json` prints the report as data, with the facts that it follows from.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example talks to its terminal")]

use std::process::ExitCode;

use kiln::doctor::Report;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(form) = parse(std::env::args().skip(1)) else {
        eprintln!("usage: kiln-doctor [--json]");
        return ExitCode::from(2);
    };
    let report = kiln::doctor().await;
    println!("{}", print(&report, form));
    if report.is_ready() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// How the report is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    Json,
}

pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Option<Form> {
    match (args.next().as_deref(), args.next()) {
        (None, _) => Some(Form::Text),
        (Some("--json"), None) => Some(Form::Json),
        _ => None,
    }
}

pub(crate) fn print(report: &Report, form: Form) -> String {
    match form {
        Form::Text => report.to_string(),
        Form::Json => serde_json::to_string_pretty(report).expect("a report is plain data"),
    }
}
