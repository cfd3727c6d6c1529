//! The server and a small client.
//!
//! ```sh
//! cargo run -p kiln-example-grpc -- serve IMAGE [PORT]             # boots the image
//! cargo run -p kiln-example-grpc -- serve --socket PATH [PORT]     # uses a guest that somebody else booted
//! cargo run -p kiln-example-grpc -- exec PORT COMMAND [ARGUMENT...]
//! ```
//! The client's standard streams are the command's. An image that starts with `/` is an OCI layout folder, anything else is
//! pulled from its registry.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use futures::Stream;
use futures::StreamExt;
use futures::stream;
use kiln::ExecBuilder;
use kiln::Image;
use kiln::VmConfig;
use kiln_example_grpc::ExecService;
use kiln_example_grpc::proto::ExecRequest;
use kiln_example_grpc::proto::Exit;
use kiln_example_grpc::proto::Start;
use kiln_example_grpc::proto::exec_client::ExecClient;
use kiln_example_grpc::proto::exec_request::Request;
use kiln_example_grpc::proto::exec_response::Response;
use kiln_example_grpc::proto::exec_server::ExecServer;
use kiln_example_grpc::proto::exit::Status;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

const USAGE: &str = "usage: serve (IMAGE | --socket PATH) [PORT], or exec PORT COMMAND [ARGUMENT...]";

const DEFAULT_PORT: u16 = 50051;

/// How long calls may go on after the server was asked to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A piece of standard input.
const PIECE: usize = 32 << 10;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let result = runtime.block_on(run(std::env::args().skip(1)));
    // Dropping the runtime would wait for a read of standard input, which nothing can cancel.
    runtime.shutdown_background();
    result
}

async fn run(mut args: impl Iterator<Item = String>) -> Result<ExitCode, Box<dyn Error>> {
    match args.next().as_deref() {
        Some("serve") => serve(args).await.map(|()| ExitCode::SUCCESS),
        Some("exec") => exec(args.next().ok_or(USAGE)?.parse()?, args.collect()).await,
        _ => Err(USAGE.into()),
    }
}

async fn serve(mut args: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let target = args.next().ok_or(USAGE)?;
    if target == "--socket" {
        let exec = ExecBuilder::new(args.next().ok_or(USAGE)?);
        return listen(exec, args.next()).await;
    }
    let image = if target.starts_with('/') { Image::from_path(&target).await? } else { Image::pull(&target).await? };
    let vm = image.start(VmConfig::new()).await?;
    let served = tokio::select! {
        served = listen(vm.exec_builder(), args.next()) => served,
        end = vm.wait() => Err(format!("the guest ended: {end:?}").into()),
    };
    vm.shutdown().await?;
    served
}

/// Serves until SIGINT or SIGTERM, and then for as long as calls go on, [`GRACE`] at most.
async fn listen(exec: ExecBuilder, port: Option<String>) -> Result<(), Box<dyn Error>> {
    let port = port.map_or(Ok(DEFAULT_PORT), |text| text.parse())?;
    // Whoever can reach this port can run anything in the guest, so only this machine can.
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("listening on {}", listener.local_addr()?);
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (asked, stopping) = tokio::sync::oneshot::channel::<()>();
    let server = Server::builder()
        .add_service(ExecServer::new(ExecService::new(exec)))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async { drop(stopping.await) });
    let stop = async {
        tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} }
        drop(asked);
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = server => Ok(served?),
        // Commands that still run lose their connections with us, and the agent kills them.
        () = stop => Ok(()),
    }
}

/// The client: one command with our standard streams, whose exit code becomes ours.
async fn exec(port: u16, argv: Vec<String>) -> Result<ExitCode, Box<dyn Error>> {
    let mut client = ExecClient::connect(format!("http://127.0.0.1:{port}")).await?;
    let start = Request::Start(Start { argv, ..Start::default() });
    let requests = stream::iter([start]).chain(our_stdin()).map(|request| ExecRequest { request: Some(request) });
    let mut responses = client.exec(requests).await?.into_inner();
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    while let Some(response) = responses.message().await? {
        match response.response {
            Some(Response::Stdout(bytes)) => show(&mut stdout, &bytes).await?,
            Some(Response::Stderr(bytes)) => show(&mut stderr, &bytes).await?,
            Some(Response::Exit(exit)) => return Ok(code_of(&exit)),
            Some(Response::Started(_)) | None => {}
        }
    }
    Err("the call ended without an exit".into())
}

/// What we read, until there is no more: the end of the requests is the end of the command's input.
fn our_stdin() -> impl Stream<Item = Request> {
    stream::unfold(tokio::io::stdin(), |mut stdin| async move {
        let mut bytes = bytes::BytesMut::with_capacity(PIECE);
        match stdin.read_buf(&mut bytes).await {
            Ok(1..) => Some((Request::Stdin(bytes.freeze()), stdin)),
            Ok(0) | Err(_) => None,
        }
    })
}

async fn show(output: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    output.write_all(bytes).await?;
    output.flush().await
}

/// The command's code; as in a shell, 128 and the number of the signal that ended it.
fn code_of(exit: &Exit) -> ExitCode {
    let code = match exit.status {
        Some(Status::Code(code)) => code,
        Some(Status::Signal(number)) => 128 + number,
        None => return ExitCode::FAILURE,
    };
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}
