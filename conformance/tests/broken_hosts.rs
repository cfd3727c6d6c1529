//! The suite against hosts that are broken on purpose, one fault each: the case that looks for it must fail.
//!
//! The host is this very program, started again with the fault as its first argument; hence no test harness, and a main that says
//! in cargo's words what came of the checks.
#![allow(
    clippy::print_stdout,
    reason = "it is a host program, which prints what its process prints, and its own harness"
)]

use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;

use bytes::BytesMut;
use kiln_conformance::CommandLine;
use kiln_conformance::Only;
use kiln_conformance::Verdict;
use kiln_conformance::host;
use kiln_wire::exit::Exit;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;

/// What makes this program a host.
const HOST: &str = "--broken-host";

/// Each fault, with the case that must notice it. Every case holds for the fault `none`.
const FAULTS: &[(&str, &str)] = &[
    ("stdin-first", "H01"),
    ("joins-argv", "H02"),
    ("no-end-of-file", "H03"),
    ("half-closes", "H06"),
    ("mixes-outputs", "H07"),
    ("empty-is-the-end", "H08"),
    ("unknown-is-the-end", "H11"),
    ("prints-at-the-end", "H13"),
    ("exit-4-only", "H16"),
    ("code-0", "H15"),
    ("error-is-success", "H19"),
    ("silent-error", "H20"),
    ("prints-after-exit", "H22"),
    ("waits-for-the-end", "H23"),
    ("close-is-success", "H25"),
    ("truncated-is-success", "H26"),
    ("oversize-is-success", "H27"),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, fault, socket, _, argv @ ..] = &arguments[..]
        && flag == HOST
    {
        let code = Host { fault }.run(socket, argv).or_else(|error| failed(error.to_string().as_bytes()));
        return ExitCode::from(code.unwrap_or(125));
    }
    let failed: Vec<String> = FAULTS.iter().filter_map(|(fault, case)| unnoticed(fault, case)).collect();
    for failure in &failed {
        println!("{failure}");
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("test result: {verdict}. {} passed; {} failed; 0 ignored", FAULTS.len() - failed.len(), failed.len());
    ExitCode::from(u8::from(!failed.is_empty()))
}

fn verdict(fault: &str, case: &str) -> Option<Verdict> {
    let this = std::env::current_exe().expect("this program has a path");
    let command = CommandLine::new([&this.to_string_lossy(), HOST, fault, "{socket}"]).expect("names the socket");
    let report = host::run(&command, &Only::new([case]), |_| {}).expect("there is a place for sockets");
    report.verdict(case).cloned()
}

/// Why the suite does not notice `fault` with `case`, if it does not.
fn unnoticed(fault: &str, case: &str) -> Option<String> {
    match (verdict("none", case), verdict(fault, case)) {
        (Some(Verdict::Holds), Some(Verdict::Fails(_))) => None,
        (sound, broken) => Some(format!("{case} does not notice {fault}: without it {sound:?}, with it {broken:?}")),
    }
}

/// A small host, sound or with one fault.
struct Host<'a> {
    fault: &'a str,
}

impl Host<'_> {
    fn has(&self, fault: &str) -> bool {
        self.fault == fault
    }

    fn run(&self, socket: &str, argv: &[String]) -> io::Result<u8> {
        let stream = UnixStream::connect(socket)?;
        if self.has("stdin-first") {
            send(&stream, Kind::Stdin, b"early")?;
        }
        let argv = if self.has("joins-argv") { vec![argv.join(" ")] } else { argv.to_vec() };
        send(&stream, Kind::Request, &serde_json::to_vec(&Request { argv, ..Request::default() })?)?;
        let (input, no_end, half_closes) = (stream.try_clone()?, self.has("no-end-of-file"), self.has("half-closes"));
        // Ends with the program, which does not wait for its input.
        thread::spawn(move || feed(&input, no_end, half_closes));
        let code = self.listen(stream);
        io::stdout().flush()?;
        code
    }

    /// Reads up to the last frame, and says what the program ends with.
    fn listen(&self, mut stream: UnixStream) -> io::Result<u8> {
        let (mut parser, mut inbox, mut buffer) = (FrameParser::whole(), BytesMut::new(), [0; 4096]);
        let mut kept = Vec::new();
        loop {
            let parsed = match parser.parse(&mut inbox) {
                Err(_) if self.has("oversize-is-success") => return Ok(0),
                parsed => parsed?,
            };
            if let Some(frame) = parsed {
                if let Some(code) = self.take(&frame, &mut kept, &mut inbox)? {
                    if self.has("waits-for-the-end") {
                        io::copy(&mut stream, &mut io::sink())?;
                    }
                    return Ok(code);
                }
                continue;
            }
            match stream.read(&mut buffer)? {
                0 if self.has("close-is-success") && inbox.is_empty() => return Ok(0),
                0 if self.has("truncated-is-success") && parser.finish(&inbox).is_err() => return Ok(0),
                0 => return failed(b"no EXIT"),
                read => inbox.extend_from_slice(&buffer[..read]),
            }
        }
    }

    /// What the program ends with, if `frame` is the last one.
    fn take(&self, frame: &Frame, kept: &mut Vec<u8>, rest: &mut BytesMut) -> io::Result<Option<u8>> {
        let Frame { kind, payload } = frame;
        match kind {
            Kind::Stdout | Kind::Stderr if payload.is_empty() && self.has("empty-is-the-end") => return Ok(Some(0)),
            Kind::Stdout if self.has("prints-at-the-end") => kept.extend_from_slice(payload),
            Kind::Stdout => print(io::stdout(), payload)?,
            Kind::Stderr if self.has("mixes-outputs") => print(io::stdout(), payload)?,
            Kind::Stderr => print(io::stderr(), payload)?,
            Kind::Unknown(_) if self.has("unknown-is-the-end") => return failed(b"unknown").map(Some),
            Kind::Error if self.has("error-is-success") => return Ok(Some(0)),
            Kind::Error if self.has("silent-error") => return Ok(Some(125)),
            Kind::Error => return failed(&[b"failed: ", &payload[..]].concat()).map(Some),
            Kind::Exit => {
                print(io::stdout(), kept)?;
                if self.has("prints-after-exit") {
                    print(io::stdout(), rest)?;
                }
                if self.has("exit-4-only") && payload.len() != 4 {
                    return failed(b"a long EXIT").map(Some);
                }
                let code = Exit::decode(payload).map_err(io::Error::other)?.code;
                return Ok(Some(if self.has("code-0") { 0 } else { u8::try_from(code).unwrap_or(255) }));
            }
            _ => {}
        }
        Ok(None)
    }
}

fn print(mut output: impl Write, bytes: &[u8]) -> io::Result<()> {
    output.write_all(bytes)?;
    output.flush()
}

fn failed(words: &[u8]) -> io::Result<u8> {
    print(io::stderr(), words)?;
    Ok(125)
}

fn send(mut stream: &UnixStream, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut bytes = BytesMut::new();
    Frame::new(kind, payload.to_vec()).encode(&mut bytes)?;
    stream.write_all(&bytes)
}

fn feed(stream: &UnixStream, no_end: bool, half_closes: bool) -> io::Result<()> {
    let mut buffer = vec![0; 32 << 10];
    loop {
        let read = io::stdin().read(&mut buffer)?;
        if read == 0 {
            break;
        }
        send(stream, Kind::Stdin, &buffer[..read])?;
    }
    if !no_end {
        send(stream, Kind::Stdin, b"")?;
    }
    if half_closes {
        stream.shutdown(std::net::Shutdown::Write)?;
    }
    Ok(())
}
