//! `connect`: TCP ports of the guest's loopback interface.

mod wire;

use std::io;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::net::TcpListener;
use std::net::TcpStream;

use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use rustix::net::sockopt;
use wire::Agent;
use wire::Connection;
use wire::PATIENCE;
use wire::pattern;
use wire::until;

fn listener(address: &str) -> (TcpListener, u16) {
    let listener = TcpListener::bind((address, 0)).expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

fn connect(port: u16) -> String {
    format!(r#"{{"action":"connect","port":{port}}}"#)
}

/// A stream and the peer's end of its connection.
fn pair(agent: &Agent) -> (Connection, TcpStream) {
    let (listener, port) = listener("127.0.0.1");
    let stream = agent.stream(&connect(port));
    let (peer, _) = listener.accept().expect("connected");
    peer.set_read_timeout(Some(PATIENCE)).expect("valid");
    (stream, peer)
}

fn receive(stream: &mut Connection, length: usize) -> Vec<u8> {
    let mut received = Vec::new();
    while received.len() < length {
        let Frame { kind, payload } = stream.next().expect("more");
        assert!(kind == Kind::Stdout && !payload.is_empty(), "{kind:?}");
        received.extend_from_slice(&payload);
    }
    received
}

/// The peer's end of the connection is reset instead of closed.
fn reset(peer: TcpStream) {
    sockopt::set_socket_linger(&peer, Some(std::time::Duration::ZERO)).expect("valid");
    drop(peer);
}

#[test]
fn bytes_go_both_ways_and_the_host_ends_first() {
    let agent = Agent::start();
    let (mut stream, mut peer) = pair(&agent);
    stream.send(Kind::Stdin, b"to the guest");
    let mut received = [0; 12];
    peer.read_exact(&mut received).expect("arrives");
    assert_eq!(&received, b"to the guest");
    peer.write_all(b"to the host").expect("written");
    assert_eq!(receive(&mut stream, 11), b"to the host");
    stream.end_of_file();
    assert_eq!(peer.read(&mut received).expect("end-of-file"), 0);
    // The other direction is still open.
    peer.write_all(b"more").expect("written");
    assert_eq!(receive(&mut stream, 4), b"more");
    drop(peer);
    assert_eq!(stream.next(), Some(Frame::new(Kind::Stdout, &b""[..])));
    assert_eq!(stream.output(), b"");
}

#[test]
fn the_guest_ends_first() {
    let agent = Agent::start();
    let (mut stream, mut peer) = pair(&agent);
    peer.write_all(b"all I have").expect("written");
    peer.shutdown(Shutdown::Write).expect("open");
    assert_eq!(receive(&mut stream, 10), b"all I have");
    assert_eq!(stream.next(), Some(Frame::new(Kind::Stdout, &b""[..])));
    let sent = pattern(300_000);
    for piece in sent.chunks(10_000) {
        stream.send(Kind::Stdin, piece);
    }
    stream.end_of_file();
    let mut received = Vec::new();
    peer.read_to_end(&mut received).expect("to the end");
    assert!(received == sent);
    assert_eq!(stream.output(), b"");
}

#[test]
fn what_comes_with_the_action_waits_for_the_connection() {
    let agent = Agent::start();
    let (listener, port) = listener("127.0.0.1");
    let mut stream = agent.control(&connect(port));
    stream.send(Kind::Stdin, b"impatient");
    stream.end_of_file();
    let (mut peer, _) = listener.accept().expect("connected");
    let mut received = Vec::new();
    peer.read_to_end(&mut received).expect("to the end");
    assert_eq!(received, b"impatient");
    drop(peer);
    assert!(stream.ack().ok);
    assert_eq!(stream.output(), b"");
}

#[test]
fn a_port_that_only_ipv6_has_is_reached() {
    let agent = Agent::start();
    let (listener, port) = listener("::1");
    let mut stream = agent.stream(&connect(port));
    let (mut peer, _) = listener.accept().expect("connected");
    peer.write_all(b"six").expect("written");
    drop(peer);
    stream.end_of_file();
    assert_eq!(stream.output(), b"six");
}

#[test]
fn a_port_where_nobody_listens_is_refused_in_the_answer() {
    let agent = Agent::start();
    let (listener, port) = listener("127.0.0.1");
    drop(listener);
    let text = agent.refused(&connect(port), Some(111));
    assert!(text.contains(&port.to_string()) && text.contains("Connection refused"), "{text}");
    agent.refused(&connect(0), Some(111));
    assert!(!agent.ask(r#"{"action":"connect","port":65536}"#).ok);
}

#[test]
fn a_reset_is_an_error_with_its_number() {
    let agent = Agent::start();
    let is_reset = |failure: Failure| assert!(matches!(failure, Failure::System { errno: 104, .. }), "{failure:?}");
    let (mut stream, peer) = pair(&agent);
    reset(peer);
    is_reset(stream.failure());
    // After what had been sent before it.
    let (mut stream, mut peer) = pair(&agent);
    peer.write_all(b"famous last words").expect("written");
    assert_eq!(receive(&mut stream, 17), b"famous last words");
    reset(peer);
    is_reset(stream.failure());
    // Also when the host has ended, and when the guest has.
    let (mut stream, mut peer) = pair(&agent);
    stream.end_of_file();
    assert_eq!(peer.read(&mut [0]).expect("end-of-file"), 0);
    reset(peer);
    is_reset(stream.failure());
    let (mut stream, peer) = pair(&agent);
    peer.shutdown(Shutdown::Write).expect("open");
    assert_eq!(stream.next(), Some(Frame::new(Kind::Stdout, &b""[..])));
    reset(peer);
    is_reset(stream.failure());
}

#[test]
fn a_peer_that_closes_while_the_host_sends_is_a_reset() {
    let agent = Agent::start();
    let (mut stream, mut peer) = pair(&agent);
    peer.write_all(b"enough").expect("written");
    drop(peer);
    let mut sent = 0;
    while stream.try_send(Kind::Stdin, &pattern(1000)).is_ok() && sent < 1000 {
        sent += 1;
    }
    let (output, last) = stream.drain();
    assert_eq!(output, b"enough");
    assert!(matches!(Failure::decode(&last.payload), Failure::System { errno: 104, .. }), "{last:?}");
}

#[test]
fn a_host_that_disconnects_closes_the_connection() {
    let agent = Agent::start();
    let (stream, mut peer) = pair(&agent);
    drop(stream);
    assert_eq!(peer.read(&mut [0]).expect("end-of-file"), 0);
    // Also while the peer does not read.
    let (mut stream, mut peer) = pair(&agent);
    stream.stream.set_nonblocking(true).expect("valid");
    let error = loop {
        if let Err(error) = stream.try_send(Kind::Stdin, &pattern(60_000)) {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    drop(stream);
    let mut received = Vec::new();
    let _ = peer.read_to_end(&mut received);
    until("the socket is closed", || !has_tcp_socket(&agent));
}

fn has_tcp_socket(agent: &Agent) -> bool {
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/tcp", agent.pid())).expect("it runs");
    let links = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("it runs").flatten();
    let mut inodes = links.filter_map(|link| {
        let target = std::fs::read_link(link.path()).ok()?.to_string_lossy().into_owned();
        Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
    });
    inodes.any(|inode| sockets.lines().any(|line| line.split_whitespace().nth(9) == Some(&inode)))
}

#[test]
fn a_slow_peer_slows_the_host_down_and_loses_nothing() {
    let agent = Agent::start();
    let (mut stream, mut peer) = pair(&agent);
    let whole = pattern(16 << 20);
    let mut writer = stream.stream.try_clone().expect("a copy");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for piece in whole.chunks(32 << 10) {
                let header = kiln_wire::frame::header(Kind::Stdin, piece.len()).expect("small");
                writer.write_all(&header).and_then(|()| writer.write_all(piece)).expect("the agent reads");
            }
            writer.write_all(&kiln_wire::frame::header(Kind::Stdin, 0).expect("small")).expect("the agent reads");
        });
        // An echo, so that both directions are full at times.
        let mut reader = peer.try_clone().expect("a copy");
        scope.spawn(move || {
            io::copy(&mut reader, &mut peer).expect("both ends are there");
            peer.shutdown(Shutdown::Write).expect("open");
        });
        assert!(stream.output() == whole);
    });
}

#[test]
fn fifty_connections_at_once() {
    let agent = Agent::start();
    let (listener, port) = listener("127.0.0.1");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                let (mut peer, _) = listener.accept().expect("connected");
                scope.spawn(move || {
                    let mut reader = peer.try_clone().expect("a copy");
                    io::copy(&mut reader, &mut peer).expect("both ends are there");
                });
            }
        });
        let mut streams: Vec<_> = (0..50).map(|_| agent.control(&connect(port))).collect();
        for stream in &mut streams {
            assert!(stream.ack().ok);
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.send(Kind::Stdin, &vec![number as u8; 5000]);
            stream.end_of_file();
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            assert_eq!(stream.output(), vec![number as u8; 5000]);
        }
    });
    until("all sockets are closed", || !has_tcp_socket(&agent));
}
