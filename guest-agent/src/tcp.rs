//! The stream of `connect`: a TCP connection to a port of the guest's loopback interface.
//!
//! ```text
//!   Connecting --accepted--> Open --(host's end-of-file sent on, peer's end-of-file forwarded)--> over
//!       \--refused by both addresses                \--reset: what the peer had sent is forwarded first
//! ```

use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use bytes::Bytes;
use kiln_wire::frame::Kind;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::Shutdown;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::sockopt;

use crate::backlog::Backlog;
use crate::outbox::Outbox;
use crate::poll::Poll;
use crate::poll::Role;
use crate::poll::Token;
use crate::poll::Watched;
use crate::process::Sink;
use crate::refusal::Refusal;
use crate::relay::Step;

#[derive(Debug)]
pub(crate) struct Tcp {
    peer: Watched,
    token: Token,
    address: SocketAddr,
    connected: bool,
    /// From the host, for the peer.
    backlog: Backlog,
    /// The host will send no more.
    host_ended: bool,
    /// The peer has been told so.
    shut: bool,
    /// The peer will send no more, and the host has been told.
    peer_ended: bool,
    /// The peer takes no more.
    broken: Option<Errno>,
}

impl Tcp {
    /// Begins to connect; [`Step::Opened`] or [`Step::Refused`] comes later.
    pub(crate) fn dial(session: u32, port: u16) -> Result<Self, Refusal> {
        let token = Token { session, role: Role::Peer };
        let mut address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let mut dialled = connect(address);
        if let Err(Errno::CONNREFUSED) = dialled {
            address.set_ip(IpAddr::V6(Ipv6Addr::LOCALHOST));
            dialled = connect(address).map_err(|_| Errno::CONNREFUSED);
        }
        let peer = dialled.map_err(|error| refused(port, error))?;
        Ok(Self {
            peer: Watched::new(peer, token),
            token,
            address,
            connected: false,
            backlog: Backlog::default(),
            host_ended: false,
            shut: false,
            peer_ended: false,
            broken: None,
        })
    }

    pub(crate) fn wants_input(&self) -> bool {
        self.connected && self.backlog.has_room()
    }

    pub(crate) fn on_stdin(&mut self, payload: Bytes) -> Step {
        if self.host_ended || self.broken.is_some() {
            return Step::Continues;
        }
        if payload.is_empty() {
            self.host_ended = true;
        } else {
            self.backlog.push(payload);
        }
        self.write();
        self.progress()
    }

    pub(crate) fn on_ready(&mut self, flags: EventFlags, outbox: &mut Outbox) -> Step {
        if !self.connected {
            return self.on_connected();
        }
        if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            self.write();
        }
        if self.peer_ended {
            // Both directions are closed and ours was not closed by us.
            if flags.intersects(EventFlags::HUP | EventFlags::ERR) && !self.shut {
                self.broken.get_or_insert(Errno::CONNRESET);
            }
        } else if outbox.has_room() {
            self.read(outbox);
        }
        self.progress()
    }

    pub(crate) fn watch(&mut self, poll: &Poll, has_room: bool) -> io::Result<()> {
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::OUT, !self.connected || !self.backlog.is_empty());
        interest.set(EventFlags::IN, self.connected && has_room && !self.peer_ended);
        // An empty interest still reports a reset, which is wanted unless it cannot be acted on before there is room.
        let wanted = !interest.is_empty() || self.peer_ended;
        self.peer.want(poll, wanted.then_some(interest))
    }

    fn on_connected(&mut self) -> Step {
        let port = self.address.port();
        match sockopt::socket_error(&self.peer) {
            Ok(Ok(())) if self.is_own_peer() => Step::Refused(refused(port, Errno::CONNREFUSED)),
            Ok(Ok(())) => {
                self.connected = true;
                // What the host sends comes in frames already; without the option small ones wait for the peer's next packet.
                let _ = sockopt::set_tcp_nodelay(&self.peer, true);
                Step::Opened
            }
            Ok(Err(Errno::CONNREFUSED)) if self.address.is_ipv4() => {
                self.address.set_ip(IpAddr::V6(Ipv6Addr::LOCALHOST));
                match connect(self.address) {
                    Ok(peer) => {
                        self.peer = Watched::new(peer, self.token);
                        Step::Continues
                    }
                    // A kernel without IPv6 says something else, which is not what is wrong.
                    Err(_) => Step::Refused(refused(port, Errno::CONNREFUSED)),
                }
            }
            Ok(Err(error)) | Err(error) => Step::Refused(refused(port, error)),
        }
    }

    /// TCP connects a socket to itself when the system happens to choose the port that it dials for its own end.
    fn is_own_peer(&self) -> bool {
        match (rustix::net::getsockname(&self.peer), rustix::net::getpeername(&self.peer)) {
            (Ok(own), Ok(Some(peer))) => own == peer,
            _ => false,
        }
    }

    fn write(&mut self) {
        if self.broken.is_some() || self.shut {
            return;
        }
        let written = self.backlog.write_to(self.peer.as_fd()).and_then(|()| {
            if self.host_ended && self.backlog.is_empty() {
                rustix::net::shutdown(&self.peer, Shutdown::Write)?;
                self.shut = true;
            }
            Ok(())
        });
        if let Err(error) = written {
            self.backlog.clear();
            // Our direction is open, so a peer that is gone has reset it.
            let reset = matches!(error, Errno::PIPE | Errno::NOTCONN);
            self.broken = Some(if reset { Errno::CONNRESET } else { error });
        }
    }

    fn read(&mut self, outbox: &mut Outbox) {
        match outbox.fill(Kind::Stdout, self.peer.as_fd()) {
            Ok(0) => {
                self.peer_ended = true;
                // After a reset the system reports an end too, which is none.
                if self.broken.is_none() {
                    outbox.push(Kind::Stdout, &[]);
                }
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                self.peer_ended = true;
                self.broken = Some(Errno::from_io_error(&error).unwrap_or(Errno::IO));
            }
        }
    }

    fn progress(&self) -> Step {
        match self.broken {
            // What the peer sent before it broke the connection comes first.
            Some(error) if self.peer_ended => {
                Step::Failed(Refusal::system(&self.address.to_string(), &error.into()).into())
            }
            None if self.peer_ended && self.shut => Step::Over,
            _ => Step::Continues,
        }
    }
}

fn refused(port: u16, error: Errno) -> Refusal {
    Refusal::system(&format!("localhost:{port}"), &error.into())
}

/// A socket that is connected or about to be.
fn connect(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}
