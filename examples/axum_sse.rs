//! Commands in a guest over HTTP: what they print comes as server-sent events while they run.
//!
//! ```sh
//! cargo run --example axum_sse -- IMAGE [PORT]              # boots the image
//! cargo run --example axum_sse -- --socket PATH [PORT]      # uses a guest that somebody else booted
//! curl -N http://127.0.0.1:8080/exec -H 'content-type: application/json' \
//!     -d '{"argv": ["sh", "-c", "echo hi; exit 7"], "stdin": "", "timeout_ms": 5000}'
//! ```
//! The events are `stdout` and `stderr`, whose data is base64, and one last `exit` or `error`, whose data is JSON. Base64
//! because a process prints bytes: they need not be UTF-8, and one event may end in the middle of a character.
//!
//! An image that starts with `/` is an OCI layout folder or an archive, anything else is pulled from its registry.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use std::convert::Infallible;
use std::error::Error;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::Sse;
use axum::response::sse::Event;
use axum::response::sse::KeepAlive;
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::Stream;
use futures::StreamExt;
use futures::future;
use futures::stream;
use kiln::ExecBuilder;
use kiln::ExecError;
use kiln::ExecEvent;
use kiln::ExecExit;
use kiln::ExecStdin;
use kiln::Image;
use kiln::Vm;
use kiln::VmConfig;
use serde::Deserialize;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio_util::sync::CancellationToken;

const USAGE: &str = "usage: axum_sse (IMAGE | --socket PATH) [PORT]";

const DEFAULT_PORT: u16 = 8080;

/// How long commands may go on after we were asked to stop.
const GRACE: Duration = Duration::from_secs(5);

/// The body of `POST /exec`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Command {
    argv: Vec<String>,
    stdin: Option<String>,
    timeout_ms: Option<u64>,
}

/// An answer without a stream, because there is no process.
type Refusal = (StatusCode, String);

/// The service: `exec` says where commands run and holds the defaults that all of them share.
pub(crate) fn router(exec: ExecBuilder) -> Router {
    Router::new().route("/exec", post(run)).with_state(exec)
}

async fn run(
    State(exec): State<ExecBuilder>,
    body: Result<Json<Command>, JsonRejection>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let Json(command) = body.map_err(bad_body)?;
    if command.argv.is_empty() {
        return Err((StatusCode::BAD_REQUEST, "argv is empty".to_owned()));
    }
    let mut exec = exec.argv(command.argv);
    if let Some(milliseconds) = command.timeout_ms {
        exec = exec.timeout(Duration::from_millis(milliseconds));
    }
    let mut child = exec.spawn().await.map_err(refusal)?;
    let stdin = child.stdin.take().zip(command.stdin);
    // The stream owns the process: when the client goes away, hyper drops the response, and that kills it. Nothing is
    // read ahead of the client either, so one that reads slowly slows down its own process and no other.
    let events = child.events().map(|event| Some(event.map_or_else(failure, to_sse)));
    let feeding = stream::once(feed(stdin)).map(|()| None);
    let events = stream::select(events, feeding).filter_map(future::ready).map(Ok);
    // The comments that it sends let a dead connection be noticed while the process is silent.
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

/// Writes the input and closes it. Part of the response's stream, so that it ends with it.
async fn feed(stdin: Option<(ExecStdin, String)>) {
    if let Some((mut stdin, text)) = stdin {
        // Fails when the process ends without reading its input, which it may.
        let _ = stdin.write_all(text.as_bytes()).await;
    }
}

fn to_sse(event: ExecEvent) -> Event {
    match event {
        ExecEvent::Stdout(bytes) => Event::default().event("stdout").data(STANDARD.encode(bytes)),
        ExecEvent::Stderr(bytes) => Event::default().event("stderr").data(STANDARD.encode(bytes)),
        ExecEvent::Exit(exit) => with_json("exit", &exit_json(&exit)),
        // A comment, which clients skip: an event of a later version of kiln.
        _ => Event::default().comment("unknown event"),
    }
}

fn exit_json(exit: &ExecExit) -> serde_json::Value {
    json!({
        "code": exit.status.code(),
        "signal": exit.status.signal(),
        "duration_ms": u64::try_from(exit.duration.as_millis()).unwrap_or(u64::MAX),
        "peak_rss_kib": exit.peak_rss_kib,
        "timed_out": exit.timed_out,
    })
}

/// The stream has begun, so what goes wrong now cannot be a status any more.
fn failure(error: ExecError) -> Event {
    with_json("error", &json!({ "message": error.to_string() }))
}

fn with_json(name: &str, value: &serde_json::Value) -> Event {
    Event::default().event(name).data(value.to_string())
}

/// axum tells JSON that cannot be read (400) from JSON of another shape (422); both are the client's bad request here.
fn bad_body(rejection: JsonRejection) -> Refusal {
    let status = match rejection.status() {
        StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
        other => other,
    };
    (status, rejection.body_text())
}

/// Why there is no process. Only the message goes out: the causes below it are the server's business.
fn refusal(error: ExecError) -> Refusal {
    let status = match &error {
        ExecError::NotFound { .. } => StatusCode::NOT_FOUND,
        ExecError::BadRequest { .. } => StatusCode::BAD_REQUEST,
        ExecError::NotExecutable { .. } | ExecError::BadCwd { .. } | ExecError::UnknownUser { .. } => {
            StatusCode::UNPROCESSABLE_ENTITY
        }
        ExecError::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        ExecError::Connect(_) | ExecError::AgentGone(_) | ExecError::Protocol { .. } => StatusCode::BAD_GATEWAY,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, error.to_string())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let target = args.next().ok_or(USAGE)?;
    if target == "--socket" {
        let exec = ExecBuilder::new(args.next().ok_or(USAGE)?);
        return serve(router(exec), port(args.next())?).await;
    }
    let port = port(args.next())?;
    let vm = boot(&target).await?;
    let served = tokio::select! {
        served = serve(router(vm.exec_builder()), port) => served,
        end = vm.wait() => Err(format!("the guest ended: {end:?}").into()),
    };
    vm.shutdown().await?;
    served
}

fn port(argument: Option<String>) -> Result<u16, Box<dyn Error>> {
    Ok(argument.map_or(Ok(DEFAULT_PORT), |text| text.parse())?)
}

async fn boot(name: &str) -> Result<Vm, Box<dyn Error>> {
    let image = if name.starts_with('/') { Image::from_path(name).await? } else { Image::pull(name).await? };
    Ok(image.start(VmConfig::new()).await?)
}

/// Serves until SIGINT or SIGTERM, and then for as long as commands run, [`GRACE`] at most.
async fn serve(router: Router, port: u16) -> Result<(), Box<dyn Error>> {
    // Whoever can reach this port can run anything in the guest, so only this machine can.
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stopping = CancellationToken::new();
    let server = axum::serve(listener, router).with_graceful_shutdown(stopping.clone().cancelled_owned());
    let stop = async {
        tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} }
        stopping.cancel();
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = server.into_future() => Ok(served?),
        // Commands that still run lose their connections with us, and the agent kills them.
        () = stop => Ok(()),
    }
}
