//! Commands in a guest over gRPC: one call of `Exec` is one process, with its streams, signals and terminal.
//!
//! ```text
//!   requests  ──> feed ──> ExecStdin, ExecSignaller ──> process
//!   responses <─────────────────────── ExecEvents <──── process
//! ```
//! There is no queue between a call and its process. Responses are made when the client has room for one, so a client
//! that reads slowly slows down its own process and no other; requests are read when the process takes its input. Both
//! directions live in the response stream: tonic drops it when the call is cancelled or its connection is lost, and with it
//! goes the process.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use futures::FutureExt;
use futures::Stream;
use futures::StreamExt;
use futures::future;
use futures::stream;
use futures::stream::BoxStream;
use kiln::ExecBuilder;
use kiln::ExecError;
use kiln::ExecEvent;
use kiln::ExecExit;
use kiln::ExecSignaller;
use kiln::ExecStdin;
use tokio::io::AsyncWriteExt;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::Streaming;

use crate::proto::ExecRequest;
use crate::proto::ExecResponse;
use crate::proto::Start;
use crate::proto::exec_request::Request as Input;
use crate::proto::exec_response::Response as Output;
use crate::proto::exec_server::Exec;

/// The messages and the service, as generated.
#[allow(missing_docs, clippy::all, reason = "generated; proto/exec.proto has the documentation")]
pub mod proto {
    tonic::include_proto!("kiln.exec.v1");
}

/// The service: runs what its clients ask for in one guest.
#[derive(Clone, Debug)]
pub struct ExecService {
    exec: ExecBuilder,
}

impl ExecService {
    /// Runs commands where `exec` says, with its settings as defaults.
    #[must_use]
    pub fn new(exec: ExecBuilder) -> Self {
        Self { exec }
    }
}

#[tonic::async_trait]
impl Exec for ExecService {
    type ExecStream = BoxStream<'static, Result<ExecResponse, Status>>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let Some(Input::Start(start)) = requests.message().await?.and_then(|first| first.request) else {
            return Err(Status::invalid_argument("the first request has to be `start`"));
        };
        let mut child = command(self.exec.clone(), start)?.spawn().await.map_err(status)?;
        let started = Output::Started(proto::Started { pid: child.id() });
        let stdin = child.stdin.take();
        let signaller = child.signaller();
        // An error of either direction ends the call. Feeding ends without a response, before the process or with it.
        let feeding =
            feed(requests, stdin, signaller).map(Result::err).into_stream().filter_map(future::ready).map(Err);
        let events =
            child.events().map(|event| event.map_or_else(|error| Err(status(error)), |event| Ok(output(event))));
        let first = stream::once(future::ready(Ok(started)));
        let responses = first.chain(until_exit(stream::select(events, feeding)));
        Ok(Response::new(responses.map(|output| Ok(ExecResponse { response: Some(output?) })).boxed()))
    }
}

/// Ends the responses with the exit or an error: the client may keep its own direction open for ever.
fn until_exit(
    responses: impl Stream<Item = Result<Option<Output>, Status>> + Send + 'static,
) -> impl Stream<Item = Result<Output, Status>> + Send {
    let step = |responses: Option<BoxStream<'static, _>>| async {
        let mut responses = responses?;
        let response: Result<Option<Output>, Status> = responses.next().await?;
        let last = matches!(response, Ok(Some(Output::Exit(_))) | Err(_));
        Some((response, (!last).then_some(responses)))
    };
    stream::unfold(Some(responses.boxed()), step).filter_map(|response| future::ready(response.transpose()))
}

/// What `start` asks for.
fn command(exec: ExecBuilder, start: Start) -> Result<ExecBuilder, Status> {
    let mut exec = exec.argv(start.argv).tty(start.tty);
    for (name, value) in start.env {
        exec = exec.env(name, value);
    }
    if let Some(cwd) = start.cwd {
        exec = exec.cwd(cwd);
    }
    if start.cols != 0 && start.rows != 0 {
        exec = exec.winsize(characters(start.cols)?, characters(start.rows)?);
    }
    Ok(match start.timeout_ms {
        Some(milliseconds) => exec.timeout(Duration::from_millis(milliseconds)),
        None => exec,
    })
}

/// Hands requests to the process until there are no more, and then closes its standard input.
async fn feed(
    mut requests: Streaming<ExecRequest>,
    mut stdin: Option<ExecStdin>,
    signaller: ExecSignaller,
) -> Result<(), Status> {
    while let Some(request) = requests.message().await? {
        match request.request {
            Some(Input::Stdin(bytes)) => {
                let Some(open) = &mut stdin else {
                    return Err(Status::failed_precondition("standard input was closed before"));
                };
                // Fails when the process has ended, and how it did is about to be said.
                let _ = open.write_all(&bytes).await;
            }
            Some(Input::StdinEof(_)) => stdin = None,
            Some(Input::Signal(number)) => {
                let number = u8::try_from(number).ok().filter(|number| (1..=64).contains(number));
                let number = number.ok_or_else(|| Status::invalid_argument("no such signal"))?;
                delivered(signaller.signal(number).await)?;
            }
            Some(Input::Resize(size)) => {
                delivered(signaller.resize(characters(size.cols)?, characters(size.rows)?).await)?;
            }
            Some(Input::Start(_)) => return Err(Status::invalid_argument("a call starts one process")),
            // Of a later version of the protocol.
            None => return Err(Status::unimplemented("unknown request")),
        }
    }
    Ok(())
}

/// A client cannot know that the process has ended meanwhile, so that is no error of its.
fn delivered(sent: Result<(), ExecError>) -> Result<(), Status> {
    match sent {
        Ok(()) | Err(ExecError::Ended) => Ok(()),
        Err(error) => Err(status(error)),
    }
}

/// A width or height of a terminal.
fn characters(number: u32) -> Result<u16, Status> {
    u16::try_from(number).map_err(|_| Status::invalid_argument("a terminal is not that large"))
}

/// `None` for an event of a later version of kiln.
fn output(event: ExecEvent) -> Option<Output> {
    match event {
        ExecEvent::Stdout(bytes) => Some(Output::Stdout(bytes)),
        ExecEvent::Stderr(bytes) => Some(Output::Stderr(bytes)),
        ExecEvent::Exit(exit) => Some(Output::Exit(ended(&exit))),
        _ => None,
    }
}

fn ended(exit: &ExecExit) -> proto::Exit {
    let code = exit.status.code().map(proto::exit::Status::Code);
    proto::Exit {
        status: code.or_else(|| exit.status.signal().map(proto::exit::Status::Signal)),
        duration_ms: u64::try_from(exit.duration.as_millis()).unwrap_or(u64::MAX),
        peak_rss_kib: exit.peak_rss_kib,
        timed_out: exit.timed_out,
    }
}

/// Why there is no process, or why its end is not known. A process that ran is never an error, whatever its code.
fn status(error: ExecError) -> Status {
    let text = error.to_string();
    match error {
        ExecError::NotFound { .. } => Status::not_found(text),
        ExecError::BadRequest { .. } | ExecError::BadCwd { .. } | ExecError::UnknownUser { .. } => {
            Status::invalid_argument(text)
        }
        ExecError::NotExecutable { .. } | ExecError::Refused { .. } => Status::failed_precondition(text),
        ExecError::Timeout { .. } => Status::deadline_exceeded(text),
        ExecError::Connect(_) | ExecError::AgentGone(_) => Status::unavailable(text),
        ExecError::Dropped => Status::cancelled(text),
        _ => Status::internal(text),
    }
}
