//! The service with a real guest behind it, called over TCP.

#[path = "../../../tests/support/guest.rs"]
mod guest;
#[path = "../../../tests/image_support/mod.rs"]
mod image_support;

use std::net::SocketAddr;

use bytes::Bytes;
use guest::DEADLINE;
use guest::boot;
use guest::until;
use kiln::ExecBuilder;
use kiln_example_grpc::ExecService;
use kiln_example_grpc::proto::ExecRequest;
use kiln_example_grpc::proto::ExecResponse;
use kiln_example_grpc::proto::Exit;
use kiln_example_grpc::proto::Resize;
use kiln_example_grpc::proto::Start;
use kiln_example_grpc::proto::StdinEof;
use kiln_example_grpc::proto::exec_client::ExecClient;
use kiln_example_grpc::proto::exec_request::Request;
use kiln_example_grpc::proto::exec_response::Response;
use kiln_example_grpc::proto::exec_server::ExecServer;
use kiln_example_grpc::proto::exit::Status as Ended;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use tonic::Status;
use tonic::Streaming;
use tonic::transport::Server;

/// The service on a port of its own.
struct Service {
    address: SocketAddr,
    server: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Service {
    async fn start(exec: ExecBuilder) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder().add_service(ExecServer::new(ExecService::new(exec)));
        let serving = async { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() };
        Self { address, server: tokio::spawn(serving) }
    }

    /// A call on a connection of its own, with `first` as its first request.
    async fn call(&self, first: Request) -> Result<Call, Status> {
        let mut client = ExecClient::connect(format!("http://{}", self.address)).await.unwrap();
        let (requests, queue) = mpsc::channel(1);
        requests.send(ExecRequest { request: Some(first) }).await.unwrap();
        let answer = timeout(DEADLINE, client.exec(ReceiverStream::new(queue))).await.expect("an answer in time")?;
        Ok(Call { requests: Some(requests), responses: answer.into_inner() })
    }

    async fn run<const N: usize>(&self, argv: [&str; N]) -> Result<Call, Status> {
        self.call(Request::Start(start(argv))).await
    }
}

fn start<const N: usize>(argv: [&str; N]) -> Start {
    Start { argv: argv.map(str::to_owned).to_vec(), ..Start::default() }
}

struct Call {
    requests: Option<mpsc::Sender<ExecRequest>>,
    responses: Streaming<ExecResponse>,
}

impl Call {
    async fn send(&self, request: Request) {
        let requests = self.requests.as_ref().expect("not closed");
        requests.send(ExecRequest { request: Some(request) }).await.unwrap();
    }

    async fn stdin(&self, bytes: &'static [u8]) {
        self.send(Request::Stdin(Bytes::from_static(bytes))).await;
    }

    async fn next(&mut self) -> Result<Option<Response>, Status> {
        let response = timeout(DEADLINE, self.responses.message()).await.expect("a response in time")?;
        Ok(response.map(|response| response.response.expect("of this version")))
    }

    /// Reads standard output until it has `text` at its end.
    async fn see(&mut self, text: &[u8]) {
        let mut seen = Vec::new();
        while !seen.ends_with(text) {
            match self.next().await.unwrap() {
                Some(Response::Stdout(bytes)) => seen.extend(bytes),
                Some(Response::Started(_)) => {}
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
    }

    /// What is left of the outputs, and the exit; nothing comes after it.
    async fn collect(mut self) -> Result<(Vec<u8>, Vec<u8>, Exit), Status> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next().await?.expect("an exit") {
                Response::Started(_) => {}
                Response::Stdout(bytes) => stdout.extend(bytes),
                Response::Stderr(bytes) => stderr.extend(bytes),
                Response::Exit(exit) => {
                    assert_eq!(self.next().await?, None);
                    return Ok((stdout, stderr, exit));
                }
            }
        }
    }
}

#[tokio::test]
async fn a_conversation_and_its_exit_code() {
    let vm = boot().await;
    let folder = tempfile::tempdir().unwrap();
    let socket = vm.exec_socket(folder.path().join("exec.sock")).await.unwrap();
    for exec in [vm.exec_builder(), ExecBuilder::new(socket.path())] {
        let service = Service::start(exec).await;
        let script = "while read word; do echo \"<$word>\"; done; echo $COLOUR $PWD >&2; exit 7";
        let mut first = start(["sh", "-c", script]);
        first.env.insert("COLOUR".to_owned(), "blue".to_owned());
        first.cwd = Some("/etc".to_owned());
        let mut call = service.call(Request::Start(first)).await.unwrap();
        let Some(Response::Started(started)) = call.next().await.unwrap() else { panic!("not started first") };
        assert!(started.pid > Some(1), "{started:?}");
        call.stdin(b"one\n").await;
        call.see(b"<one>\n").await;
        call.stdin(b"two\n").await;
        call.see(b"<two>\n").await;
        call.send(Request::StdinEof(StdinEof {})).await;
        let (stdout, stderr, exit) = call.collect().await.unwrap();
        assert_eq!((&stdout[..], &stderr[..], exit.status), (&b""[..], &b"blue /etc\n"[..], Some(Ended::Code(7))));
        assert!(!exit.timed_out && exit.peak_rss_kib > Some(0), "{exit:?}");
    }
}

#[tokio::test]
async fn cat_gives_back_what_it_is_fed() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let mut call = service.run(["cat"]).await.unwrap();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|index| (index % 251) as u8).collect();
    let requests = call.requests.take().unwrap();
    let pieces: Vec<_> = sent.chunks(50_000).map(Bytes::copy_from_slice).collect();
    let feeding = tokio::spawn(async move {
        for piece in pieces {
            requests.send(ExecRequest { request: Some(Request::Stdin(piece)) }).await.unwrap();
        }
        // The end of the requests is the end of the input.
    });
    let (stdout, _, exit) = call.collect().await.unwrap();
    feeding.await.unwrap();
    assert!(stdout == sent, "{} of {} bytes", stdout.len(), sent.len());
    assert_eq!(exit.status, Some(Ended::Code(0)));
}

#[tokio::test]
async fn signals_and_sizes_reach_the_process() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let mut call = service.run(["sh", "-c", "echo up; exec sleep 1000"]).await.unwrap();
    call.see(b"up\n").await;
    call.send(Request::Signal(15)).await;
    assert_eq!(call.collect().await.unwrap().2.status, Some(Ended::Signal(15)));

    let script = "stty size; trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.05; done";
    let first = Start { tty: true, cols: 91, rows: 33, ..start(["sh", "-c", script]) };
    let mut call = service.call(Request::Start(first)).await.unwrap();
    call.see(b"33 91\r\nup\r\n").await;
    call.send(Request::Resize(Resize { cols: 100, rows: 40 })).await;
    let (stdout, _, exit) = call.collect().await.unwrap();
    assert_eq!((&stdout[..], exit.status), (&b"40 100\r\n"[..], Some(Ended::Code(0))));
}

#[tokio::test]
async fn a_timeout_is_an_exit() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let first = Start { timeout_ms: Some(300), ..start(["sleep", "1000"]) };
    let (.., exit) = service.call(Request::Start(first)).await.unwrap().collect().await.unwrap();
    assert_eq!((exit.timed_out, exit.status), (true, Some(Ended::Signal(9))));
}

#[tokio::test]
async fn what_is_wrong_is_a_status() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let refused = async |first: Request| service.call(first).await.err().expect("refused").code();
    assert_eq!(refused(Request::Start(start(["no-such-program"]))).await, Code::NotFound);
    assert_eq!(refused(Request::Start(start([]))).await, Code::InvalidArgument);
    assert_eq!(refused(Request::Start(start(["/etc/passwd"]))).await, Code::FailedPrecondition);
    let nowhere = Start { cwd: Some("/nowhere".to_owned()), ..start(["true"]) };
    assert_eq!(refused(Request::Start(nowhere)).await, Code::InvalidArgument);
    let large = Start { cols: 70_000, rows: 1, ..start(["true"]) };
    assert_eq!(refused(Request::Start(large)).await, Code::InvalidArgument);
    assert_eq!(refused(Request::Signal(1)).await, Code::InvalidArgument);

    // Wrong requests on the way end the call, and the process with it.
    for (request, code) in [
        (Request::Start(start(["true"])), Code::InvalidArgument),
        (Request::Signal(0), Code::InvalidArgument),
        (Request::Signal(300), Code::InvalidArgument),
    ] {
        let call = service.run(["sleep", "1000"]).await.unwrap();
        call.send(request).await;
        assert_eq!(call.collect().await.unwrap_err().code(), code);
    }
    let call = service.run(["sleep", "1000"]).await.unwrap();
    call.send(Request::StdinEof(StdinEof {})).await;
    call.stdin(b"more").await;
    assert_eq!(call.collect().await.unwrap_err().code(), Code::FailedPrecondition);
    until(&vm, "pidof sleep || echo gone", "gone\n").await;

    let call = service.run(["sleep", "1000"]).await.unwrap();
    vm.shutdown().await.unwrap();
    assert_eq!(call.collect().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(refused(Request::Start(start(["true"]))).await, Code::Unavailable);
}

#[tokio::test]
async fn a_dropped_call_ends_its_process() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let mut call = service.run(["sh", "-c", "echo up; exec sleep 1000"]).await.unwrap();
    call.see(b"up\n").await;
    until(&vm, "pidof sleep > /dev/null && echo runs", "runs\n").await;
    drop(call);
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_its_own_process_only() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    // Far more than all the buffers on the way.
    let script = "head -c 16777216 /dev/zero; echo written > /tmp/written";
    let idle = service.run(["sh", "-c", script]).await.unwrap();
    let (stdout, ..) = service.run(["echo", "meanwhile"]).await.unwrap().collect().await.unwrap();
    assert_eq!(stdout, b"meanwhile\n");
    until(&vm, "cat /tmp/written 2> /dev/null || echo waits", "waits\n").await;
    let (stdout, _, exit) = idle.collect().await.unwrap();
    assert_eq!((stdout.len(), exit.status), (16 << 20, Some(Ended::Code(0))));
    until(&vm, "cat /tmp/written", "written\n").await;
}
