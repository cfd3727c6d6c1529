//! `kiln-conformance`: prints which numbered cases of the exec protocol an agent or a host keeps.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its terminal")]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use clap::Parser;
use clap::Subcommand;
use kiln_conformance::CommandLine;
use kiln_conformance::Line;
use kiln_conformance::Only;
use kiln_conformance::Report;
use kiln_conformance::agent;
use kiln_conformance::agent::Target;
use kiln_conformance::host;

/// Checks an agent or a host against the numbered cases of docs/exec-protocol.md.
///
/// Prints a line a case and a line of counts; ends with 1 when a case fails, and with 2 when it could not begin.
#[derive(Parser)]
#[command(name = "kiln-conformance")]
struct Arguments {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// Check an agent, over a Unix socket.
    ///
    /// The cases run small scripts in the guest. They assume a userland there as POSIX has it, and md5sum: sh, cat, cut, date, echo, env,
    /// find, grep, head, id, kill, ln, ls, mkdir, mkfifo, printf, rm, sed, sleep, stty, test, tr, wc, and a /tmp.
    Agent {
        #[command(flatten)]
        target: AgentTarget,
        #[command(flatten)]
        options: Options,
    },
    /// Check a host program.
    ///
    /// The suite plays the agent on a Unix socket and runs, for every case, the command with `-- ARGV...` behind it. The program connects to
    /// the socket, runs ARGV, passes its standard input on, prints the process's standard output and standard error on its own, and ends
    /// with the process's code: 128+n for signal n, and 125 when the session failed, saying why on standard error.
    Host {
        /// The program and its arguments, split at white space; `{socket}` is the socket's path.
        #[arg(long, value_name = "COMMAND", required_unless_present = "list")]
        command: Option<String>,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false, args = ["socket", "command", "list"])]
struct AgentTarget {
    /// The socket of an agent that is already listening.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// An agent to start in a temporary folder and to end afterwards; split at white space, `{socket}` is where it is to listen.
    #[arg(long, value_name = "COMMAND")]
    command: Option<String>,
}

#[derive(Args)]
struct Options {
    /// Print the cases and run none.
    #[arg(long)]
    list: bool,
    /// Print one JSON object, at the end.
    #[arg(long)]
    json: bool,
    /// The cases to run, `A07,A1*`.
    #[arg(long, value_name = "CASES", value_delimiter = ',')]
    only: Vec<String>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().subject) {
        Ok(failed) => ExitCode::from(u8::from(failed)),
        Err(error) => {
            eprintln!("kiln-conformance: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether a case failed.
fn run(subject: Subject) -> Result<bool> {
    match subject {
        Subject::Agent { options, .. } if options.list => {
            agent::cases().for_each(|case| println!("{}  {}", case.id, case.title));
            Ok(false)
        }
        Subject::Host { options, .. } if options.list => {
            host::cases().for_each(|case| println!("{}  {}", case.id, case.title));
            Ok(false)
        }
        Subject::Agent { target: AgentTarget { socket, command }, options } => {
            let target = match socket {
                Some(path) => Target::Socket(path),
                None => Target::Command(CommandLine::split(&command.unwrap_or_default())?),
            };
            report(&options, |only, each| agent::run(&target, only, each))
        }
        Subject::Host { command, options } => {
            let command = CommandLine::split(&command.unwrap_or_default())?;
            report(&options, |only, each| host::run(&command, only, each))
        }
    }
}

fn report(options: &Options, suite: impl FnOnce(&Only, &mut dyn FnMut(&Line)) -> Result<Report>) -> Result<bool> {
    let mut print = |line: &Line| {
        if !options.json {
            println!("{line}");
        }
    };
    let report = suite(&Only::new(&options.only), &mut print)?;
    if options.json {
        println!("{:#}", report.to_json());
    } else {
        println!("{}", report.summary());
    }
    Ok(report.failed() > 0)
}
