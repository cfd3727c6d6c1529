//! What the host makes of the end of a process.

use kiln_wire::control::feature;
use kiln_wire::exit::Exit;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Kind;
use kiln_wire::started::Started;

use super::play::Subject;
use super::play::exit;
use super::play::frame;
use crate::case::Case;
use crate::case::Finding;
use crate::case::same;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("H15", "EXIT of 4 bytes ends with the process's code", exit_4),
    Case::new("H16", "EXIT of 12 bytes ends with the process's code", exit_12),
    Case::new("H17", "EXIT 128+n is the code of a process that signal n ended", by_signal),
    Case::new("H18", "EXIT 127 without text is accepted", exit_127),
    Case::new("H19", "an ERROR of each head is a failure, and its text is passed on", heads),
    Case::new("H20", "an ERROR of any other text is a failure, UTF-8 or not", plain_error),
    Case::new("H21", "what was printed before an ERROR comes out", output_before_error),
    Case::new("H22", "EXIT is the end, whatever follows it", after_exit),
    Case::new("H23", "EXIT is the end, though neither the agent nor the input has ended", exit_alone),
    Case::new("H24", "STARTED is understood by a host that asked for it, and not needed", started),
];

fn exit_4(host: &Subject) -> Result<(), Finding> {
    for code in [0, 1, 7, 255] {
        host.told(&[exit(code)])?.ends(i32::try_from(code)?)?;
    }
    Ok(())
}

fn exit_12(host: &Subject) -> Result<(), Finding> {
    for peak_rss_kib in [0, 4096, u64::MAX] {
        let payload = Exit { code: 7, peak_rss_kib: Some(peak_rss_kib) }.encode();
        host.told(&[frame(Kind::Exit, payload)])?.ends(7)?;
    }
    Ok(())
}

fn by_signal(host: &Subject) -> Result<(), Finding> {
    for code in [129, 137, 143] {
        host.told(&[exit(code)])?.ends(i32::try_from(code)?)?;
    }
    Ok(())
}

fn exit_127(host: &Subject) -> Result<(), Finding> {
    host.told(&[exit(127)])?.ends(127)
}

fn heads(host: &Subject) -> Result<(), Finding> {
    let detail = || "the very detail".to_owned();
    for failure in [
        Failure::NotFound(detail()),
        Failure::NotExecutable(detail()),
        Failure::BadCwd(detail()),
        Failure::UnknownUser(detail()),
        Failure::BadRequest(detail()),
        Failure::System { errno: 28, detail: detail() },
    ] {
        let text = failure.to_string();
        let outcome = host.told(&[frame(Kind::Error, text.clone().into_bytes())])?;
        outcome.fails_saying("the very detail").map_err(|finding| Finding::new(format!("{text}: {finding}")))?;
    }
    Ok(())
}

fn plain_error(host: &Subject) -> Result<(), Finding> {
    host.told(&[frame(Kind::Error, &b"out of luck"[..])])?.fails_saying("out of luck")?;
    host.told(&[frame(Kind::Error, &b"strange: luck"[..])])?.fails_saying("strange: luck")?;
    host.told(&[frame(Kind::Error, &b"lu\xffck"[..])])?.fails_saying("ck")?;
    host.told(&[frame(Kind::Error, &b""[..])])?.fails()
}

fn output_before_error(host: &Subject) -> Result<(), Finding> {
    let outcome = host.told(&[frame(Kind::Stdout, &b"printed"[..]), frame(Kind::Error, &b"and then"[..])])?;
    outcome.fails_saying("and then")?;
    same("stdout", &outcome.stdout, "printed")
}

fn after_exit(host: &Subject) -> Result<(), Finding> {
    let mut bytes = crate::session::encoded(&[
        frame(Kind::Stdout, &b"before"[..]),
        exit(3),
        frame(Kind::Stdout, &b"after"[..]),
        frame(Kind::Error, &b"after"[..]),
        exit(4),
    ])?;
    bytes.extend_from_slice(&[0xff; 9]);
    let outcome = host.told_bytes(&bytes)?;
    outcome.ends(3)?;
    same("stdout", &outcome.stdout, "before")
}

fn exit_alone(host: &Subject) -> Result<(), Finding> {
    // The program's input stays open, and so does our end.
    let (mut host, mut session, _) = host.requested(&["program"])?;
    let input = host.stdin.take();
    session.send_all(&[frame(Kind::Stdout, &b"done"[..]), exit(5)])?;
    let outcome = host.outcome()?;
    drop((input, session));
    outcome.ends(5)?;
    same("stdout", &outcome.stdout, "done")
}

fn started(host: &Subject) -> Result<(), Finding> {
    let (host, mut session, request) = host.requested_of(&[feature::STARTED], &["program"])?;
    if request.started {
        session.send(Kind::Started, Started { pid: 4242 }.encode())?;
    }
    session.send_all(&[frame(Kind::Stdout, &b"hi"[..]), exit(0)])?;
    host.outcome()?.prints("hi")
}
