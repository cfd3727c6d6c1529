//! STARTED: the process runs.

use kiln_wire::control::feature;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;
use kiln_wire::started::Started;

use super::Subject;
use super::subject::argv;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::session::Session;
use crate::session::describe;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A97", "STARTED is not sent to a host that did not ask", unasked),
    Case::new("A98", "STARTED comes before any other frame, as soon as the process runs", first)
        .requires(&[feature::STARTED]),
    Case::new("A99", "STARTED has the pid of the process", pid).requires(&[feature::STARTED]),
    Case::new("A100", "STARTED comes once, chain or not", once).requires(&[feature::STARTED]),
    Case::new("A101", "STARTED does not come when the process does not start", never).requires(&[feature::STARTED]),
];

fn asking(request: Request) -> Request {
    Request { started: true, ..request }
}

fn unasked(agent: &Subject) -> Result<(), Finding> {
    let seen = agent.run(&argv(&["echo", "hi"]))?;
    seen.prints("hi\n")?;
    ensure(!seen.frames.iter().any(|frame| frame.kind == Kind::Started), || "STARTED".to_owned())
}

fn started(session: &mut Session) -> Result<Started, Finding> {
    match session.next()? {
        Some(Frame { kind: Kind::Started, payload }) => Ok(Started::decode(&payload)?),
        other => Err(Finding::new(format!("{} in place of STARTED", describe(other.as_ref())))),
    }
}

fn first(agent: &Subject) -> Result<(), Finding> {
    // Says nothing until it is fed, so that STARTED waits for nothing else.
    let mut session = agent.start(&asking(argv(&["cat"])))?;
    started(&mut session)?;
    session.send(Kind::Stdin, &b"fed"[..])?;
    session.end_of_input()?;
    session.rest()?.prints("fed")
}

fn pid(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&asking(argv(&["sh", "-c", "echo $$"])))?;
    let Started { pid } = started(&mut session)?;
    session.rest()?.prints(format!("{pid}\n"))
}

fn once(agent: &Subject) -> Result<(), Finding> {
    let chain = vec![argv(&["echo", "2"]).argv, argv(&["echo", "3"]).argv];
    let seen = agent.run(&asking(Request { chain, ..argv(&["echo", "1"]) }))?;
    seen.prints("1\n2\n3\n")?;
    let times = seen.frames.iter().filter(|frame| frame.kind == Kind::Started).count();
    ensure(times == 1, || format!("STARTED {times} times"))
}

fn never(agent: &Subject) -> Result<(), Finding> {
    let seen = agent.run(&asking(Request { cwd: Some("/no/such/folder".to_owned()), ..argv(&["true"]) }))?;
    seen.failure()?;
    ensure(seen.frames.len() == 1, || format!("{} before ERROR", describe(seen.frames.first())))
}
