//! One GiB of standard output, on its way from a process to a reader.
//!
//! `cargo bench --bench exec_throughput`. First codec, lanes and a socket alone: a task writes STDOUT frames that are encoded
//! already into one end of a socket pair, and a session reads from the other; against the same bytes without frames
//! through the same kind of pair. Then the whole way on the host: `head -c` under an agent on a Unix socket, against
//! the same program on a pipe of `tokio::process`. In turns, each read with the same buffer.
#![allow(clippy::print_stdout, reason = "a benchmark reports to its terminal")]

mod support;

use std::io;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use bytes::BytesMut;
use futures::future::BoxFuture;
use kiln::ExecBuilder;
use kiln::exec::AgentInfo;
use kiln::transport::Connector;
use kiln::transport::GuestStream;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::support::Sample;
use crate::support::agent::Agent;

/// Version 5: nothing is asked before the session.
const PROTOCOL: u32 = 5;
const TOTAL: usize = 1 << 30;
const PIECE: usize = 32 << 10;
/// What a reader asks for at once, on both sides of each comparison.
const BUFFER: usize = 64 << 10;
const ROUNDS: usize = 5;

#[tokio::main]
async fn main() {
    in_one_process().await;
    under_an_agent().await;
}

async fn in_one_process() {
    let frames = encoded(&Frame::new(Kind::Stdout, vec![0; PIECE]));
    let (mut subject, mut yardstick) = (Sample::new("exec session"), Sample::new("socket pair"));
    for round in 0..=ROUNDS {
        let ours = session(&frames).await;
        let theirs = raw().await;
        // The first round warms up.
        if round > 0 {
            subject.add(ours);
            yardstick.add(theirs);
        }
    }
    support::report_rates("1 GiB through codec and socket", megabytes(), "MB", &subject, &yardstick);
}

async fn under_an_agent() {
    let agent = Agent::start().await;
    let (mut subject, mut yardstick) = (Sample::new("kiln, agent on a socket"), Sample::new("tokio::process"));
    for round in 0..=ROUNDS {
        let ours = process_of_agent(&agent).await;
        let theirs = process_of_host().await;
        if round > 0 {
            subject.add(ours);
            yardstick.add(theirs);
        }
    }
    support::report_rates("1 GiB printed by a process on the host", megabytes(), "MB", &subject, &yardstick);
}

#[allow(clippy::cast_precision_loss, reason = "exact, and a figure for people")]
fn megabytes() -> f64 {
    TOTAL as f64 / 1e6
}

async fn session(frames: &[u8]) -> Duration {
    let (host, agent) = UnixStream::pair().expect("socket pairs can be made");
    let writing = tokio::spawn(play_agent(agent, frames.to_vec()));
    let exec =
        ExecBuilder::over(Arc::new(Once(Mutex::new(Some(host))))).agent(AgentInfo::new(PROTOCOL)).argv(["program"]);
    let started = Instant::now();
    let mut child = exec.spawn().await.expect("the stream is there");
    drop(child.stdin.take());
    read_all(child.stdout.take().expect("not taken yet")).await;
    let time = started.elapsed();
    assert!(child.wait().await.expect("an exit").success());
    writing.await.expect("the agent's part is played");
    time
}

/// What an agent would write, from memory; what the host says is not looked at.
async fn play_agent(mut stream: UnixStream, frames: Vec<u8>) {
    for _ in 0..TOTAL / PIECE {
        stream.write_all(&frames).await.expect("the host reads");
    }
    let exit = encoded(&Frame::new(Kind::Exit, vec![0; 4]));
    stream.write_all(&exit).await.expect("the host reads");
    // Open until the host has closed its end: a reset would take bytes with it.
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

async fn raw() -> Duration {
    let (reader, mut writer) = UnixStream::pair().expect("socket pairs can be made");
    let writing = tokio::spawn(async move {
        let piece = vec![0; PIECE];
        for _ in 0..TOTAL / PIECE {
            writer.write_all(&piece).await.expect("the reader reads");
        }
    });
    let started = Instant::now();
    read_all(reader).await;
    let time = started.elapsed();
    writing.await.expect("the writer has written");
    time
}

async fn process_of_agent(agent: &Agent) -> Duration {
    let started = Instant::now();
    let mut child = agent.exec().argv(printer()).spawn().await.expect("the agent answers");
    drop(child.stdin.take());
    read_all(child.stdout.take().expect("not taken yet")).await;
    assert!(child.wait().await.expect("an exit").success());
    started.elapsed()
}

async fn process_of_host() -> Duration {
    let started = Instant::now();
    let [program, arguments @ ..] = printer();
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("head starts");
    read_all(child.stdout.take().expect("requested as a pipe")).await;
    assert!(child.wait().await.expect("our child").success());
    started.elapsed()
}

fn printer() -> [String; 4] {
    ["head", "-c", &TOTAL.to_string(), "/dev/zero"].map(str::to_owned)
}

async fn read_all(mut reader: impl AsyncRead + Unpin) {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        match reader.read(&mut buffer).await.expect("the writer goes on") {
            0 => break,
            length => total += length,
        }
    }
    assert_eq!(total, TOTAL);
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    frame.clone().encode(&mut bytes).expect("far below the limit");
    bytes.to_vec()
}

/// Gives out the one stream that it has.
#[derive(Debug)]
struct Once(Mutex<Option<UnixStream>>);

impl Connector for Once {
    fn connect(&self, _port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
        let stream = self.0.lock().expect("nobody panics with it").take();
        let stream = stream.map(|stream| Box::new(stream) as Box<dyn GuestStream>);
        Box::pin(async { stream.ok_or_else(|| io::ErrorKind::ConnectionRefused.into()) })
    }
}
