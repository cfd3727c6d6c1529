//! A program for QEMU's guest, compiled by `qemu_restore.rs`: one TCP connection to the agent's Unix socket.
//!
//! The agent's side is connected before the guest is saved, so that after a restore only bytes are left to be moved.

use std::env;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::thread;

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let [_, port, socket] = &arguments[..] else { panic!("usage: relay PORT SOCKET") };
    let to_agent = UnixStream::connect(socket).expect("the agent listens");
    let from_agent = to_agent.try_clone().expect("a descriptor");
    let listener = TcpListener::bind(("0.0.0.0", port.parse().expect("a port"))).expect("the port is free");
    println!("relay-ready");
    let (host, _) = listener.accept().expect("a connection");
    host.set_nodelay(true).expect("a TCP socket");
    let to_host = host.try_clone().expect("a descriptor");
    thread::spawn(move || {
        copy(from_agent, &to_host);
        let _ = to_host.shutdown(Shutdown::Both);
    });
    copy(host, &to_agent);
    let _ = to_agent.shutdown(Shutdown::Both);
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
