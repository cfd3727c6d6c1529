//! The readiness queue: epoll, level-triggered, and descriptors that know what they wait for.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::event::epoll::EventData;
use rustix::event::epoll::EventFlags;

/// In place of a session's number: what the server itself has, which is its listener, its signals and the workload.
pub(crate) const OWN: u32 = 0;

/// Which descriptor an event is about: a session's, or one of the server's [`OWN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) session: u32,
    pub(crate) role: Role,
}

/// A descriptor's part in its session, or in the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Socket,
    Stdin,
    Stdout,
    Stderr,
    /// The other end of a stream that has no process.
    Peer,
    Listener,
    Signals,
}

const ROLES: [Role; 7] =
    [Role::Socket, Role::Stdin, Role::Stdout, Role::Stderr, Role::Peer, Role::Listener, Role::Signals];

impl Token {
    fn pack(self) -> u64 {
        (u64::from(self.session) << 8) | self.role as u64
    }

    fn unpack(data: u64) -> Option<Self> {
        let role = *ROLES.get(usize::try_from(data & 0xff).ok()?)?;
        Some(Self { session: u32::try_from(data >> 8).ok()?, role })
    }
}

/// The epoll instance.
#[derive(Debug)]
pub(crate) struct Poll {
    epoll: OwnedFd,
}

/// One readiness report.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    pub(crate) flags: EventFlags,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Appends what is ready to `ready`, waiting at most `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok((events, _)) => {
                for event in events {
                    let (data, flags) = (event.data, event.flags);
                    ready.extend(Token::unpack(data.u64()).map(|token| Ready { token, flags }));
                }
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A descriptor and what it waits for; closing it also takes it out of the queue.
#[derive(Debug)]
pub(crate) struct Watched {
    fd: OwnedFd,
    token: Token,
    interest: Option<EventFlags>,
}

impl Watched {
    pub(crate) fn new(fd: OwnedFd, token: Token) -> Self {
        Self { fd, token, interest: None }
    }

    /// Waits for `interest` from now on. `None` takes the descriptor out of the queue entirely: an empty interest would
    /// still report a hang-up, again and again.
    pub(crate) fn want(&mut self, poll: &Poll, interest: Option<EventFlags>) -> io::Result<()> {
        if interest == self.interest {
            return Ok(());
        }
        let data = EventData::new_u64(self.token.pack());
        match (self.interest, interest) {
            (None, Some(flags)) => epoll::add(&poll.epoll, &self.fd, data, flags)?,
            (Some(_), Some(flags)) => epoll::modify(&poll.epoll, &self.fd, data, flags)?,
            (_, None) => epoll::delete(&poll.epoll, &self.fd)?,
        }
        self.interest = interest;
        Ok(())
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
