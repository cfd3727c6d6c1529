//! One connection seen from either end: frames out, frames in, a deadline on everything.

use std::io;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use bytes::BytesMut;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;

use crate::case::Finding;
use crate::case::quoted;

/// Longer than anything here takes on a busy machine, so that a hang is a finding and not a wait for ever.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes read from the socket at once.
const READ_BUFFER: usize = 64 << 10;

/// A connection, as its host or its agent sees it.
#[derive(Debug)]
pub(crate) struct Session {
    stream: UnixStream,
    parser: FrameParser,
    inbox: BytesMut,
}

impl Session {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, parser: FrameParser::whole(), inbox: BytesMut::new() })
    }

    pub(crate) fn send(&mut self, kind: Kind, payload: impl Into<Bytes>) -> Result<(), Finding> {
        self.send_all(&[Frame::new(kind, payload)])
    }

    /// Sends `frames` in one write.
    pub(crate) fn send_all(&mut self, frames: &[Frame]) -> Result<(), Finding> {
        self.send_bytes(&encoded(frames)?)
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), Finding> {
        self.stream.write_all(bytes).map_err(|error| Finding::new(format!("the peer took no more bytes: {error}")))
    }

    pub(crate) fn end_of_input(&mut self) -> Result<(), Finding> {
        self.send(Kind::Stdin, Bytes::new())
    }

    pub(crate) fn signal(&mut self, number: u8) -> Result<(), Finding> {
        self.send(Kind::Signal, vec![number])
    }

    /// How many of `bytes` the peer takes before it has taken nothing more for as long as `stall`.
    pub(crate) fn send_until_stuck(&mut self, bytes: &[u8], stall: Duration) -> Result<usize, Finding> {
        self.stream.set_write_timeout(Some(stall))?;
        let mut sent = 0;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(written) => sent += written,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.stream.set_write_timeout(Some(PATIENCE))?;
        Ok(sent)
    }

    pub(crate) fn half_close(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }

    /// The next frame, or `None` when the peer has closed; a finding when neither comes.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, Finding> {
        match self.next_within(PATIENCE)? {
            Some(next) => Ok(next),
            None => Err(Finding::new(format!("neither a frame nor an end within {PATIENCE:?}"))),
        }
    }

    /// As [`next`](Self::next), and `None` when nothing comes for as long as `within`.
    pub(crate) fn next_within(&mut self, within: Duration) -> Result<Option<Option<Frame>>, Finding> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(frame) = self.parser.parse(&mut self.inbox)? {
                return Ok(Some(Some(frame)));
            }
            match self.read(deadline)? {
                None => return Ok(None),
                Some(0) => {
                    self.parser.finish(&self.inbox)?;
                    return Ok(Some(None));
                }
                Some(_) => {}
            }
        }
    }

    /// Everything up to EXIT, ERROR or the end.
    pub(crate) fn rest(&mut self) -> Result<Transcript, Finding> {
        let mut frames = Vec::new();
        while let Some(frame) = self.next()? {
            let last = matches!(frame.kind, Kind::Exit | Kind::Error);
            frames.push(frame);
            if last {
                break;
            }
        }
        Ok(Transcript { frames })
    }

    /// Waits until standard output has `expected`, and nothing else.
    pub(crate) fn hear(&mut self, expected: &str) -> Result<(), Finding> {
        let mut heard = Vec::new();
        while heard.len() < expected.len() {
            match self.next()? {
                Some(Frame { kind: Kind::Stdout, payload }) => heard.extend_from_slice(&payload),
                Some(Frame { kind: Kind::Unknown(_), .. }) => {}
                other => return Err(Finding::new(format!("{} in place of output", describe(other.as_ref())))),
            }
        }
        crate::case::same("stdout", &heard, expected)
    }

    /// A finding unless the peer closes, without another frame.
    pub(crate) fn closed(&mut self) -> Result<(), Finding> {
        match self.next()? {
            None => Ok(()),
            frame => Err(Finding::new(format!("{} in place of an end", describe(frame.as_ref())))),
        }
    }

    /// Reads what is there into the inbox: its length, 0 at the end, `None` at the deadline.
    fn read(&mut self, deadline: Instant) -> Result<Option<usize>, Finding> {
        let mut buffer = [0; READ_BUFFER];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(read) => {
                    self.inbox.extend_from_slice(buffer.get(..read).unwrap_or_default());
                    return Ok(Some(read));
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut => {}
                    // What a peer that closes before it has read everything looks like.
                    ErrorKind::ConnectionReset => return Ok(Some(0)),
                    _ => return Err(error.into()),
                },
            }
        }
    }
}

/// The bytes of `frames`.
pub(crate) fn encoded(frames: &[Frame]) -> Result<BytesMut, Finding> {
    let mut bytes = BytesMut::new();
    for frame in frames {
        frame.encode(&mut bytes)?;
    }
    Ok(bytes)
}

/// What was received instead of something else.
pub(crate) fn describe(frame: Option<&Frame>) -> String {
    match frame {
        None => "the end of the connection".to_owned(),
        Some(Frame { kind: Kind::Exit, payload }) => match Exit::decode(payload) {
            Ok(exit) => format!("EXIT {}", exit.code),
            Err(error) => error.to_string(),
        },
        Some(Frame { kind, payload }) => format!("{kind:?} {}", quoted(payload)),
    }
}

/// What one end said, up to its last frame.
#[derive(Debug)]
pub(crate) struct Transcript {
    pub(crate) frames: Vec<Frame>,
}

impl Transcript {
    pub(crate) fn stdout(&self) -> Vec<u8> {
        self.of(Kind::Stdout)
    }

    pub(crate) fn stderr(&self) -> Vec<u8> {
        self.of(Kind::Stderr)
    }

    pub(crate) fn of(&self, kind: Kind) -> Vec<u8> {
        self.frames.iter().filter(|frame| frame.kind == kind).flat_map(|frame| frame.payload.to_vec()).collect()
    }

    pub(crate) fn exit(&self) -> Result<Exit, Finding> {
        match self.frames.last() {
            Some(Frame { kind: Kind::Exit, payload }) => Ok(Exit::decode(payload)?),
            last => Err(Finding::new(format!("{} in place of EXIT", describe(last)))),
        }
    }

    pub(crate) fn failure(&self) -> Result<Failure, Finding> {
        match self.frames.last() {
            Some(Frame { kind: Kind::Error, payload }) => Ok(Failure::decode(payload)),
            last => Err(Finding::new(format!("{} in place of ERROR", describe(last)))),
        }
    }

    /// A finding unless it ended with EXIT `code`.
    pub(crate) fn exits(&self, code: u32) -> Result<(), Finding> {
        let seen = self.exit()?.code;
        let stderr = self.stderr();
        crate::case::ensure(seen == code, || format!("EXIT {seen}, expected {code} (stderr {})", quoted(&stderr)))
    }

    /// A finding unless it ended with EXIT 0 after printing `expected`.
    pub(crate) fn prints(&self, expected: impl AsRef<[u8]>) -> Result<(), Finding> {
        self.exits(0)?;
        crate::case::same("stdout", &self.stdout(), expected)
    }
}
