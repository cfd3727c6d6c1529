//! `examples/axum_sse.rs` with a real guest behind it, asked as an HTTP client asks.

#[path = "../examples/axum_sse.rs"]
#[allow(dead_code, reason = "its `main` is not run here")]
mod example;
#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::net::SocketAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use guest::DEADLINE;
use guest::boot;
use guest::until;
use kiln::ExecBuilder;
use serde_json::Value;
use serde_json::json;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

/// The example's service on a port of its own.
struct Service {
    address: SocketAddr,
    _server: AbortOnDropHandle<()>,
}

impl Service {
    async fn start(exec: ExecBuilder) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = async { axum::serve(listener, example::router(exec)).await.unwrap() };
        Self { address, _server: AbortOnDropHandle::new(tokio::spawn(serving)) }
    }

    async fn exec(&self, body: &Value) -> Answer {
        self.post(&body.to_string()).await
    }

    /// As HTTP/1.0, so that the body comes without chunks and ends with the connection.
    async fn post(&self, body: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = "POST /exec HTTP/1.0\r\ncontent-type: application/json\r\n";
        let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Answer { stream: BufReader::new(stream), status: 0, content_type: String::new() };
        let first = answer.line().await.unwrap();
        answer.status = first.split(' ').nth(1).unwrap().parse().unwrap();
        while let Some(header) = answer.line().await.filter(|line| !line.is_empty()) {
            if let Some(value) = header.strip_prefix("content-type: ") {
                answer.content_type = value.to_owned();
            }
        }
        answer
    }
}

struct Answer {
    stream: BufReader<TcpStream>,
    status: u16,
    content_type: String,
}

impl Answer {
    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = tokio::time::timeout(DEADLINE, self.stream.read_line(&mut line)).await.expect("an answer in time");
        (read.unwrap() > 0).then(|| line.trim_end().to_owned())
    }

    /// The next event's name and data; `None` at the end of the stream.
    async fn event(&mut self) -> Option<(String, String)> {
        let (mut name, mut data) = (None, String::new());
        loop {
            let line = self.line().await?;
            match line.split_once(": ") {
                Some(("event", value)) => name = Some(value.to_owned()),
                Some(("data", value)) => data = value.to_owned(),
                _ if line.is_empty() && name.is_some() => return Some((name?, data)),
                // A comment that keeps the connection alive.
                _ => {}
            }
        }
    }

    /// What both outputs came to, and the last event; there is none after it.
    async fn collect(mut self) -> (Vec<u8>, Vec<u8>, (String, Value)) {
        assert_eq!((self.status, &self.content_type[..]), (200, "text/event-stream"));
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let (name, data) = self.event().await.expect("a last event");
            match &name[..] {
                "stdout" => stdout.extend(STANDARD.decode(data).unwrap()),
                "stderr" => stderr.extend(STANDARD.decode(data).unwrap()),
                _ => {
                    assert_eq!(self.event().await, None, "after {name}");
                    return (stdout, stderr, (name, serde_json::from_str(&data).unwrap()));
                }
            }
        }
    }

    async fn text(mut self) -> String {
        let mut text = String::new();
        self.stream.read_to_string(&mut text).await.unwrap();
        text
    }
}

#[tokio::test]
async fn outputs_come_as_events_and_the_exit_comes_last() {
    let vm = boot().await;
    let folder = tempfile::tempdir().unwrap();
    let socket = vm.exec_socket(folder.path().join("exec.sock")).await.unwrap();
    for exec in [vm.exec_builder(), ExecBuilder::new(socket.path())] {
        let service = Service::start(exec).await;
        let script = "echo one; echo two >&2; read word; echo $word; exit 7";
        let command = json!({ "argv": ["sh", "-c", script], "stdin": "three\nunread" });
        let (stdout, stderr, (last, exit)) = service.exec(&command).await.collect().await;
        assert_eq!((&stdout[..], &stderr[..]), (&b"one\nthree\n"[..], &b"two\n"[..]));
        assert_eq!((&last[..], &exit["code"], &exit["signal"]), ("exit", &json!(7), &Value::Null));
        assert_eq!(exit["timed_out"], false);
        assert!(exit["duration_ms"].as_u64().is_some() && exit["peak_rss_kib"].as_u64() > Some(0), "{exit}");
    }
}

#[tokio::test]
async fn any_byte_arrives_and_input_ends() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let (stdout, ..) = service.exec(&json!({ "argv": ["printf", "\\377\\000\\r\\n"] })).await.collect().await;
    assert_eq!(stdout, b"\xff\0\r\n");
    // Without input, `cat` is at its end at once; with more than any buffer holds, it gets all of it.
    let (stdout, ..) = service.exec(&json!({ "argv": ["cat"] })).await.collect().await;
    assert_eq!(stdout, b"");
    let input = "0123456789abcde\n".repeat(60_000);
    let (stdout, ..) = service.exec(&json!({ "argv": ["cat"], "stdin": input })).await.collect().await;
    assert!(stdout == input.as_bytes(), "{} of {} bytes", stdout.len(), input.len());
}

#[tokio::test]
async fn a_timeout_is_an_exit() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let command = json!({ "argv": ["sleep", "1000"], "timeout_ms": 300 });
    let (_, _, (last, exit)) = service.exec(&command).await.collect().await;
    assert_eq!((&last[..], &exit["signal"], &exit["timed_out"]), ("exit", &json!(9), &json!(true)));
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_process() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let mut answer = service.exec(&json!({ "argv": ["sh", "-c", "echo up; exec sleep 1000"] })).await;
    // The event is here while the process runs.
    assert_eq!(answer.event().await, Some(("stdout".to_owned(), STANDARD.encode("up\n"))));
    until(&vm, "pidof sleep > /dev/null && echo runs", "runs\n").await;
    drop(answer);
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
}

#[tokio::test]
async fn a_guest_that_is_lost_is_an_error_event() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    let mut answer = service.exec(&json!({ "argv": ["sh", "-c", "echo up; exec sleep 1000"] })).await;
    assert_eq!(answer.event().await.unwrap().0, "stdout");
    vm.shutdown().await.unwrap();
    let (_, _, (last, error)) = answer.collect().await;
    assert_eq!(last, "error");
    assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
    assert_eq!(service.exec(&json!({ "argv": ["true"] })).await.status, 502);
}

#[tokio::test]
async fn what_cannot_be_run_is_refused_before_the_stream() {
    let vm = boot().await;
    let service = Service::start(vm.exec_builder()).await;
    for body in ["", "{", "[]", "{}", r#"{"argv": "true"}"#, r#"{"argv": []}"#, r#"{"argv": ["true"], "timeout": 1}"#] {
        assert_eq!(service.post(body).await.status, 400, "{body}");
    }
    let answer = service.exec(&json!({ "argv": ["no-such-program"] })).await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.text().await, "program not found: no-such-program");
    assert_eq!(service.exec(&json!({ "argv": ["/etc/passwd"] })).await.status, 422);
    assert_eq!(service.exec(&json!({ "argv": ["true"] })).await.status, 200);
}
