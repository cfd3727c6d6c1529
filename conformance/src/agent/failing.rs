//! ERROR: why a process was not started, by the head of the text.

use kiln_wire::control::feature;
use kiln_wire::failure::Failure;
use kiln_wire::frame::Frame;
use kiln_wire::frame::Kind;
use kiln_wire::request::Request;

use super::Subject;
use super::subject::argv;
use super::subject::staged;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::case::same;
use crate::session::Transcript;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A27", "a program that does not exist is not found, or EXIT 127 without text", not_found),
    Case::new(
        "A28",
        "a program without permission, of no known kind or without its interpreter is not executable",
        not_executable,
    ),
    Case::new("A29", "a working directory that cannot be entered is a bad cwd", bad_cwd),
    Case::new("A30", "a user or group that the image has not is unknown", unknown_user),
    Case::new("A31", "a REQUEST that is not its JSON is a bad request", malformed),
    Case::new("A32", "an empty argv, or one in a chain, is a bad request", empty_argv),
    Case::new("A33", "a NUL byte in argv, env or cwd is a bad request", nul),
    Case::new("A34", "an invalid environment name is a bad request", bad_name),
    Case::new("A35", "an argument that is too long is a bad request", too_long),
    Case::new("A36", "a program of the chain that does not exist ends the chain, after what was printed", in_chain),
    Case::new("A37", "ERROR is the last frame, and the agent closes", last_frame),
    // No feature announces the head; it came with this one.
    Case::new("A38", "what the guest's system refuses is errno and its number", errno).requires(&[feature::STARTED]),
];

/// A finding unless the session is nothing but an ERROR that `wanted` accepts.
fn fails(seen: &Transcript, what: &str, wanted: fn(&Failure) -> bool) -> Result<(), Finding> {
    let failure = seen.failure().map_err(|finding| Finding::new(format!("{what}: {finding}")))?;
    ensure(wanted(&failure), || format!("{what}: ERROR {failure}"))?;
    ensure(seen.frames.len() == 1, || format!("{what}: {} frames before ERROR", seen.frames.len() - 1))
}

fn is_bad_request(failure: &Failure) -> bool {
    matches!(failure, Failure::BadRequest(_))
}

fn is_not_found(failure: &Failure) -> bool {
    matches!(failure, Failure::NotFound(_))
}

fn not_found(agent: &Subject) -> Result<(), Finding> {
    for program in ["kiln-no-such-program", "/no/such/program", "./no-such-program"] {
        let seen = agent.run(&argv(&[program]))?;
        match &seen.frames[..] {
            [Frame { kind: Kind::Exit, .. }] => seen.exits(127)?,
            _ => fails(&seen, program, is_not_found)?,
        }
    }
    Ok(())
}

fn not_executable(agent: &Subject) -> Result<(), Finding> {
    let refused: [(&str, &[u8], u32); 3] = [
        ("no-permission", b"#!/bin/sh\n", 0o644),
        ("no-program", b"\x7fELF, and then nothing", 0o755),
        ("no-interpreter", b"#!/no/such/interpreter\n", 0o755),
    ];
    for (name, content, mode) in refused {
        let path = agent.path(name);
        let request = Request { stage_files: vec![staged(path.clone(), content, Some(mode))], ..argv(&[&path]) };
        fails(&agent.run(&request)?, name, |failure| matches!(failure, Failure::NotExecutable(_)))?;
    }
    Ok(())
}

fn bad_cwd(agent: &Subject) -> Result<(), Finding> {
    for cwd in ["/no/such/folder", "/dev/null", "no/such/folder"] {
        let request = Request { cwd: Some(cwd.to_owned()), ..argv(&["true"]) };
        fails(&agent.run(&request)?, cwd, |failure| matches!(failure, Failure::BadCwd(_)))?;
    }
    Ok(())
}

fn unknown_user(agent: &Subject) -> Result<(), Finding> {
    for user in ["kiln-nobody", "root:kiln-nobody", "-1", ""] {
        let request = Request { user: Some(user.to_owned()), ..argv(&["true"]) };
        fails(&agent.run(&request)?, user, |failure| matches!(failure, Failure::UnknownUser(_)))?;
    }
    Ok(())
}

fn malformed(agent: &Subject) -> Result<(), Finding> {
    for json in ["", "not json", "[]", "{}", r#"{"argv":"true"}"#, r#"{"argv":["true"]"#] {
        fails(&agent.run_json(json)?, json, is_bad_request)?;
    }
    Ok(())
}

fn empty_argv(agent: &Subject) -> Result<(), Finding> {
    for json in [r#"{"argv":[]}"#, r#"{"argv":["echo","ran"],"chain":[[]]}"#] {
        fails(&agent.run_json(json)?, json, is_bad_request)?;
    }
    Ok(())
}

fn nul(agent: &Subject) -> Result<(), Finding> {
    for json in [
        r#"{"argv":["true","a\u0000b"]}"#,
        r#"{"argv":["true\u0000"]}"#,
        r#"{"argv":["true"],"env":{"A":"a\u0000b"}}"#,
        r#"{"argv":["true"],"cwd":"/\u0000"}"#,
    ] {
        fails(&agent.run_json(json)?, json, is_bad_request)?;
    }
    Ok(())
}

fn bad_name(agent: &Subject) -> Result<(), Finding> {
    for json in [r#"{"argv":["true"],"env":{"A=B":"c"}}"#, r#"{"argv":["true"],"env":{"":"c"}}"#] {
        fails(&agent.run_json(json)?, json, is_bad_request)?;
    }
    Ok(())
}

fn too_long(agent: &Subject) -> Result<(), Finding> {
    // Linux takes 128 KiB as one argument.
    let long = "x".repeat(1 << 20);
    fails(&agent.run(&argv(&["true", &long]))?, "1 MiB", is_bad_request)
}

fn in_chain(agent: &Subject) -> Result<(), Finding> {
    let seen = agent.run(&Request {
        chain: vec![vec!["kiln-no-such-program".to_owned()], vec!["echo".to_owned(), "ran".to_owned()]],
        ..argv(&["echo", "first"])
    })?;
    let failed = match seen.exit() {
        Ok(exit) => exit.code == 127,
        Err(_) => is_not_found(&seen.failure()?),
    };
    ensure(failed, || "neither not found nor 127".to_owned())?;
    same("stdout", &seen.stdout(), "first\n")
}

fn last_frame(agent: &Subject) -> Result<(), Finding> {
    let mut session = agent.start(&Request { cwd: Some("/no/such/folder".to_owned()), ..argv(&["true"]) })?;
    session.rest()?.failure()?;
    session.closed()
}

fn errno(agent: &Subject) -> Result<(), Finding> {
    let file = staged(agent.path("no/such/folder/file"), b"", None);
    let request = Request { stage_files: vec![file], ..argv(&["true"]) };
    fails(&agent.run(&request)?, "a missing folder", |failure| matches!(failure, Failure::System { errno: 2, .. }))
}
