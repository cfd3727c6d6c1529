//! The agent byte by byte: CONTROL, chains, staged files, and peers that do not keep to the protocol.

mod support;

use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::BytesMut;
use kiln::exec::Control;
use kiln::exec::ExecError;
use kiln::exec::control;
use kiln::exec::probe;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::FrameParser;
use kiln_wire::frame::Kind;
use support::Agent;
use support::PATIENCE;

/// Sends `frames` and returns everything that comes back until the agent closes.
fn session(agent: &Agent, frames: &[Frame]) -> Vec<Frame> {
    let mut bytes = BytesMut::new();
    for frame in frames {
        frame.encode(&mut bytes).expect("small");
    }
    raw_session(agent, &bytes)
}

fn raw_session(agent: &Agent, bytes: &[u8]) -> Vec<Frame> {
    let mut stream = UnixStream::connect(agent.socket()).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("valid");
    stream.write_all(bytes).expect("the agent reads");
    let mut received = Vec::new();
    match stream.read_to_end(&mut received) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    let mut received = BytesMut::from(received.as_slice());
    let mut parser = FrameParser::whole();
    let mut parsed = Vec::new();
    while let Some(frame) = parser.parse(&mut received).expect("well-formed") {
        parsed.push(frame);
    }
    parser.finish(&received).expect("whole frames");
    parsed
}

fn request(json: &str) -> Frame {
    Frame::new(Kind::Request, json.as_bytes().to_vec())
}

fn output(frames: &[Frame]) -> Vec<u8> {
    frames.iter().filter(|frame| frame.kind == Kind::Stdout).flat_map(|frame| frame.payload.to_vec()).collect()
}

fn exit_code(frames: &[Frame]) -> Option<u32> {
    let last = frames.last().filter(|frame| frame.kind == Kind::Exit)?;
    Some(Exit::decode(&last.payload).expect("valid").code)
}

#[tokio::test]
async fn probe_tells_the_protocol() {
    let agent = Agent::start().await;
    assert_eq!(probe(&*agent.connector(), PATIENCE).await.expect("answers").protocol, kiln_wire::PROTOCOL);
    let acks = session(&agent, &[Frame::new(Kind::Control, &b"{\"action\":\"probe\"}"[..])]);
    assert_eq!(
        acks,
        [Frame::new(
            Kind::Control,
            &br#"{"ok":true,"protocol":5,"features":["started","streams","workload","renew"]}"#[..]
        )]
    );
}

#[tokio::test]
async fn an_unknown_action_is_refused_in_the_agreed_words() {
    let agent = Agent::start().await;
    let acks = session(&agent, &[Frame::new(Kind::Control, &b"{\"action\":\"dance\"}"[..])]);
    assert_eq!(acks, [Frame::new(Kind::Control, &b"{\"ok\":false,\"error\":\"unknown CONTROL action\"}"[..])]);
    let error = control(&*agent.connector(), &Control::Signal { signum: 15, run: None }, PATIENCE)
        .await
        .expect_err("no workload");
    assert!(matches!(error, ExecError::System { errno: 3, .. }), "{error:?}");
}

#[tokio::test]
async fn files_are_written_and_read_back() {
    let agent = Agent::start().await;
    let path = agent.folder().join("file").to_string_lossy().into_owned();
    let write = Control::WriteFile { path: path.clone(), data_b64: "aGVsbG8=".to_owned(), mode: Some(0o600) };
    control(&*agent.connector(), &write, PATIENCE).await.expect("written");
    assert_eq!(std::fs::read(&path).expect("there"), b"hello");
    let read = Control::ReadFile { path: path.clone(), max_bytes: None };
    let ack = control(&*agent.connector(), &read, PATIENCE).await.expect("read");
    assert_eq!(ack.data_b64.as_deref(), Some("aGVsbG8="));
    let read = Control::ReadFile { path, max_bytes: Some(4) };
    control(&*agent.connector(), &read, PATIENCE).await.expect_err("five bytes are more than four");
    let read = Control::ReadFile { path: "/dev/zero".to_owned(), max_bytes: None };
    control(&*agent.connector(), &read, PATIENCE).await.expect_err("not a regular file");
}

/// What a workload leaves in the place of a file must not stop the agent, which serves everyone on one thread.
#[tokio::test]
async fn a_fifo_is_refused_and_not_waited_for() {
    let agent = Agent::start().await;
    assert!(agent.exec(["mkfifo", "fifo"]).output().await.expect("ends").success());
    let read = Control::ReadFile { path: agent.folder().join("fifo").to_string_lossy().into_owned(), max_bytes: None };
    let error = control(&*agent.connector(), &read, Duration::from_secs(10)).await.expect_err("not a regular file");
    assert!(matches!(error, ExecError::Refused { .. }), "{error:?}");
}

#[tokio::test]
async fn a_chain_stops_at_the_first_failure() {
    let agent = Agent::start().await;
    let chain = r#"{"argv":["echo","1"],"chain":[["echo","2"],["sh","-c","echo 3; exit 9"],["echo","4"]]}"#;
    let frames = session(&agent, &[request(chain)]);
    assert_eq!(output(&frames), b"1\n2\n3\n");
    assert_eq!(exit_code(&frames), Some(9));
    let chain = r#"{"argv":["cat"],"chain":[["echo","after"]]}"#;
    let input = [request(chain), Frame::new(Kind::Stdin, &b"in\n"[..]), Frame::new(Kind::Stdin, &b""[..])];
    let frames = session(&agent, &input);
    assert_eq!(output(&frames), b"in\nafter\n");
    assert_eq!(exit_code(&frames), Some(0));
    let frames = session(&agent, &[request(r#"{"argv":["true"],"chain":[["no-such-program"]]}"#)]);
    assert_eq!(Failure::decode(&frames[0].payload), Failure::NotFound("no-such-program".to_owned()));
}

#[tokio::test]
async fn files_are_staged_before_anything_runs() {
    let agent = Agent::start().await;
    let json = r#"{"argv":["./staged"],"stage_files":[{"path":"staged","data_b64":"IyEvYmluL3NoCmVjaG8gc3RhZ2VkCg==","mode":493}]}"#;
    let frames = session(&agent, &[request(json)]);
    assert_eq!(output(&frames), b"staged\n");
    assert_eq!(exit_code(&frames), Some(0));
}

#[tokio::test]
async fn input_sent_with_the_request_and_after_the_end_of_file_is_sorted_out() {
    let agent = Agent::start().await;
    let frames = session(
        &agent,
        &[
            request(r#"{"argv":["cat"]}"#),
            Frame::new(Kind::Stdin, &b"first "[..]),
            Frame::new(Kind::Unknown(0x77), &b"from the future"[..]),
            Frame::new(Kind::Stdin, &b"second"[..]),
            Frame::new(Kind::Stdin, &b""[..]),
            Frame::new(Kind::Stdin, &b"too late"[..]),
        ],
    );
    assert_eq!(output(&frames), b"first second");
    assert_eq!(exit_code(&frames), Some(0));
}

#[tokio::test]
async fn a_signal_after_the_end_of_file_still_counts() {
    let agent = Agent::start().await;
    let input = [
        request(r#"{"argv":["sleep","1000"]}"#),
        Frame::new(Kind::Stdin, &b""[..]),
        Frame::new(Kind::Signal, &[15][..]),
    ];
    assert_eq!(exit_code(&session(&agent, &input)), Some(143));
}

#[tokio::test]
async fn peers_that_break_the_rules_harm_only_themselves() {
    let agent = Agent::start().await;
    let bad_request = |frames: &[Frame]| {
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].kind, Kind::Error);
        assert!(matches!(Failure::decode(&frames[0].payload), Failure::BadRequest(_)), "{frames:?}");
    };
    bad_request(&session(&agent, &[Frame::new(Kind::Stdin, &b"no request"[..])]));
    bad_request(&session(&agent, &[request("not json")]));
    bad_request(&session(&agent, &[request(r#"{"argv":[]}"#)]));
    bad_request(&session(&agent, &[request(r#"{"argv":["true"],"chain":[[]]}"#)]));
    bad_request(&session(&agent, &[request(r#"{"argv":["true"],"env":{"A=B":"c"}}"#)]));
    let acks = session(&agent, &[Frame::new(Kind::Control, &b"not json"[..])]);
    assert!(String::from_utf8_lossy(&acks[0].payload).starts_with("{\"ok\":false"));
    // A length over the limit ends the session at the header.
    assert_eq!(raw_session(&agent, &[0xff, 0xff, 0xff, 0xff, 0xff]), []);
    // A frame that never comes whole is given up with its connection.
    drop(UnixStream::connect(agent.socket()).expect("connects").write_all(&[0xff, 0, 0, 1]));
    assert_eq!(exit_code(&session(&agent, &[request(r#"{"argv":["true"]}"#)])), Some(0));
}
