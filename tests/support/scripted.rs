//! Agents that are scripts: the other end of an in-memory stream, in the hands of the test.
#![allow(dead_code, unreachable_pub, reason = "each test binary includes this file and uses its part")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use futures::future::BoxFuture;
use kiln::exec::AgentInfo;
use kiln::exec::ExecBuilder;
use kiln::transport::Connector;
use kiln::transport::GuestStream;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::DuplexStream;

/// EXIT with code 0.
pub const EXIT_0: &[u8] = &[5, 0, 0, 0, 4, 0, 0, 0, 0];

/// Hands out streams, one a connection; whoever connects when there is none is refused.
#[derive(Debug, Default)]
pub struct Streams(pub Mutex<VecDeque<DuplexStream>>);

impl Streams {
    /// A connector with one stream, and the agent's end of it.
    pub fn one(capacity: usize) -> (Arc<Self>, DuplexStream) {
        let streams = Arc::new(Self::default());
        let agent = streams.add(capacity);
        (streams, agent)
    }

    /// Adds a stream, and returns the agent's end of it.
    pub fn add(&self, capacity: usize) -> DuplexStream {
        let (host, agent) = tokio::io::duplex(capacity);
        self.0.lock().expect("no panic").push_back(host);
        agent
    }
}

impl Connector for Streams {
    fn connect(&self, _port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
        let stream = self.0.lock().expect("no panic").pop_front();
        Box::pin(async { Ok(Box::new(stream.ok_or(io::ErrorKind::ConnectionRefused)?) as Box<dyn GuestStream>) })
    }
}

/// A command for an agent of the first edition, and the agent's end of its session.
pub fn command() -> (ExecBuilder, DuplexStream) {
    let (streams, agent) = Streams::one(1 << 20);
    (ExecBuilder::over(streams).agent(AgentInfo::new(5)).argv(["program"]), agent)
}

/// A command for an agent that tells when a process has started.
pub fn confirmed_command() -> (ExecBuilder, DuplexStream) {
    let (command, agent) = command();
    let mut info = AgentInfo::new(5);
    info.tells_starts = true;
    (command.agent(info), agent)
}

/// A frame of a payload under 256 bytes.
pub fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let len = u8::try_from(payload.len()).expect("short");
    [&[kind, 0, 0, 0, len], payload].concat()
}

/// Sends `frames` to the host.
pub async fn say(agent: &mut DuplexStream, frames: &[&[u8]]) {
    agent.write_all(&frames.concat()).await.expect("the host listens");
}

/// Takes the host's next frame.
pub async fn hear(agent: &mut DuplexStream) -> (u8, Vec<u8>) {
    let mut header = [0; 5];
    agent.read_exact(&mut header).await.expect("the host speaks");
    let [kind, a, b, c, d] = header;
    let mut payload = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
    agent.read_exact(&mut payload).await.expect("the host speaks");
    (kind, payload)
}

/// Waits until the host has hung up, and returns what it had still sent.
pub async fn hung_up(agent: &mut DuplexStream) -> Vec<u8> {
    let mut rest = Vec::new();
    agent.read_to_end(&mut rest).await.expect("in memory");
    rest
}
