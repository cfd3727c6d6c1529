//! Streams without a process: a file to the host, a file from the host, and a TCP connection both ways.
//!
//! A regular file is always ready, so epoll cannot say when to go on with it. A download goes on whenever the host's
//! socket takes more, one piece an event, which leaves every other session its turn; an upload is written as it arrives.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use bytes::Bytes;
use kiln_wire::control::ControlAck;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use rustix::event::epoll::EventFlags;

use crate::files;
use crate::files::Replacement;
use crate::outbox::Outbox;
use crate::poll::Poll;
use crate::process::Sink;
use crate::refusal::Refusal;
use crate::tcp::Tcp;

/// What a stream has come to.
#[derive(Debug)]
pub(crate) enum Step {
    Continues,
    /// It is open from now on.
    Opened,
    /// It will not be opened.
    Refused(Refusal),
    /// It ended well.
    Over,
    /// It broke off.
    Failed(Failure),
}

#[derive(Debug)]
pub(crate) enum Relay {
    Download(Download),
    Upload(Upload),
    Tcp(Tcp),
}

impl Relay {
    /// The host sent a frame.
    pub(crate) fn on_frame(&mut self, kind: Kind, payload: Bytes) -> Step {
        match (self, kind) {
            (Self::Upload(upload), Kind::Stdin) => upload.on_stdin(&payload),
            (Self::Tcp(tcp), Kind::Stdin) => tcp.on_stdin(payload),
            _ => Step::Continues,
        }
    }

    /// The host's socket takes more.
    pub(crate) fn on_turn(&mut self, outbox: &mut Outbox) -> Step {
        match self {
            Self::Download(download) => download.send(outbox),
            Self::Upload(_) | Self::Tcp(_) => Step::Continues,
        }
    }

    /// The other end's descriptor is ready.
    pub(crate) fn on_peer(&mut self, flags: EventFlags, outbox: &mut Outbox) -> Step {
        match self {
            Self::Tcp(tcp) => tcp.on_ready(flags, outbox),
            Self::Download(_) | Self::Upload(_) => Step::Continues,
        }
    }

    /// Whether frames may be read from the host.
    pub(crate) fn wants_input(&self) -> bool {
        match self {
            Self::Download(_) | Self::Upload(_) => true,
            Self::Tcp(tcp) => tcp.wants_input(),
        }
    }

    /// Whether there is more to send as soon as the host's socket takes it.
    pub(crate) const fn wants_turn(&self) -> bool {
        matches!(self, Self::Download(_))
    }

    /// Waits for what the stream needs next of its other end.
    pub(crate) fn watch(&mut self, poll: &Poll, has_room: bool) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.watch(poll, has_room),
            Self::Download(_) | Self::Upload(_) => Ok(()),
        }
    }
}

/// A file on its way to the host.
#[derive(Debug)]
pub(crate) struct Download {
    file: File,
    path: String,
}

impl Download {
    pub(crate) fn open(path: String) -> Result<(Self, ControlAck), Refusal> {
        let opened = files::open_regular(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (total_len, file) = opened.map_err(|error| Refusal::system(&path, &error))?;
        Ok((Self { file, path }, ControlAck { total_len: Some(total_len), ..ControlAck::done() }))
    }

    fn send(&self, outbox: &mut Outbox) -> Step {
        if !outbox.has_room() {
            return Step::Continues;
        }
        match outbox.fill(Kind::Stdout, self.file.as_fd()) {
            Ok(0) => Step::Over,
            Ok(_) => Step::Continues,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Step::Continues,
            Err(error) => Step::Failed(Refusal::system(&self.path, &error).into()),
        }
    }
}

/// A file on its way from the host.
#[derive(Debug)]
pub(crate) struct Upload {
    /// Absent once it has been put in its place.
    replacement: Option<Replacement>,
    path: String,
    mode: Option<u32>,
}

impl Upload {
    pub(crate) fn open(path: String, mode: Option<u32>) -> Result<Self, Refusal> {
        let replacement = Replacement::new(Path::new(&path)).map_err(|error| Refusal::system(&path, &error))?;
        Ok(Self { replacement: Some(replacement), path, mode })
    }

    fn on_stdin(&mut self, payload: &[u8]) -> Step {
        let Some(mut replacement) = self.replacement.take() else {
            return Step::Continues;
        };
        let (step, done) = if payload.is_empty() {
            (Step::Over, replacement.finish(self.mode))
        } else {
            let written = replacement.write(payload);
            self.replacement = Some(replacement);
            (Step::Continues, written)
        };
        match done {
            Ok(()) => step,
            Err(error) => Step::Failed(Refusal::system(&self.path, &error).into()),
        }
    }
}
