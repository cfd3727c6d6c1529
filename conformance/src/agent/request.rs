//! REQUEST: what the process is given.

use kiln_wire::frame::Kind;
use kiln_wire::request::Request;

use super::Subject;
use super::subject::ROOT;
use super::subject::argv;
use super::subject::staged;
use crate::case::Case;
use crate::case::Finding;
use crate::case::ensure;
use crate::case::same;

pub(super) const CASES: &[Case<Subject>] = &[
    Case::new("A11", "the arguments arrive byte for byte, argv[0] as it was sent", arguments),
    Case::new("A12", "env is merged over the environment", environment),
    Case::new("A13", "PATH and HOME are always set", defaults),
    Case::new("A14", "cwd is the working directory, a relative one starts at the default", cwd),
    Case::new("A15", "a program without a slash is looked for in the PATH of the request", path_search),
    Case::new("A16", "unknown fields of a REQUEST are ignored", unknown_fields),
    Case::new("A17", "stage_files are written before anything runs, with their modes", stage_files),
    Case::new("A18", "a staged file replaces an older one by renaming, and leaves nothing beside it", stage_atomically),
    Case::new("A19", "nothing runs when a file cannot be staged", stage_failure),
    Case::new("A20", "a chain runs in order, on the same standard streams", chain),
    Case::new("A21", "a chain stops at the first that fails, whose code is that of EXIT", chain_stops),
    Case::new("A22", "no shell is involved in a chain", chain_without_shell),
    Case::new("A23", "each command leads a process group of its own", group),
    Case::new("A24", "user uid:gid needs no entry, and brings no other group", user_numbers).requires(&[ROOT]),
    Case::new("A25", "user name and uid bring the user's own group", user_name).requires(&[ROOT]),
    Case::new("A26", "user name:group brings that group only", user_and_group).requires(&[ROOT]),
];

fn arguments(agent: &Subject) -> Result<(), Finding> {
    let odd = ["", " a  b ", "'\"\\$HOME*", "new\nline", "\u{e4}\u{20ac}\u{1f600}", "-n"];
    let mut request = argv(&["sh", "-c", "printf '%s|' \"$@\"", "zero"]);
    request.argv.extend(odd.map(str::to_owned));
    agent.run(&request)?.prints(odd.map(|arg| format!("{arg}|")).concat())?;
    agent.run(&argv(&["sh", "-c", "printf %s \"$0\""]))?.prints("sh")
}

fn environment(agent: &Subject) -> Result<(), Finding> {
    let mut request = argv(&["sh", "-c", "printf %s \"$NEW:$HOME:${PATH:+kept}\""]);
    request.env = [("NEW", "a = b\n"), ("HOME", "/replaced")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    agent.run(&request)?.prints("a = b\n:/replaced:kept")
}

fn defaults(agent: &Subject) -> Result<(), Finding> {
    agent.run(&argv(&["sh", "-c", "env | grep -c -e '^PATH=/' -e '^HOME=/'"]))?.prints("2\n")
}

fn cwd(agent: &Subject) -> Result<(), Finding> {
    let pwd = |cwd: Option<String>| {
        let printed = agent.run(&Request { cwd, ..argv(&["sh", "-c", "pwd -P"]) })?;
        printed.exits(0)?;
        Ok::<_, Finding>(String::from_utf8_lossy(&printed.stdout()).trim_end().to_owned())
    };
    agent.sh("mkdir cwd")?.exits(0)?;
    let folder = pwd(Some(agent.path("cwd")))?;
    ensure(folder.ends_with("/cwd"), || format!("absolute: in {folder:?}"))?;
    let default = pwd(None)?;
    let up = "../".repeat(default.matches('/').count());
    let relative = pwd(Some(format!("{up}{}", folder.trim_start_matches('/'))))?;
    ensure(relative == folder, || format!("relative to {default:?}: in {relative:?}, expected {folder:?}"))
}

fn path_search(agent: &Subject) -> Result<(), Finding> {
    agent.sh("mkdir bin && printf '#!/bin/sh\\necho found' > bin/kiln-only-here && chmod 755 bin/kiln-only-here")?;
    let mut request = argv(&["kiln-only-here"]);
    request.env.insert("PATH".to_owned(), format!("/no/such/folder:{}", agent.path("bin")));
    agent.run(&request)?.prints("found\n")
}

fn unknown_fields(agent: &Subject) -> Result<(), Finding> {
    agent.run_json(r#"{"argv":["echo","hi"],"future":{"deep":[1,null]},"tty":false}"#)?.prints("hi\n")
}

fn stage_files(agent: &Subject) -> Result<(), Finding> {
    let mut request = agent.shell("cat staged; ./staged-program; ls -l staged private | cut -c 1-10");
    request.stage_files = vec![
        staged(agent.path("staged"), b"content\n", None),
        staged(agent.path("private"), b"", Some(0o600)),
        staged(agent.path("staged-program"), b"#!/bin/sh\necho program\n", Some(0o755)),
    ];
    agent.run(&request)?.prints("content\nprogram\n-rw-------\n-rw-r--r--\n")
}

fn stage_atomically(agent: &Subject) -> Result<(), Finding> {
    // Another link to the old file shows whether it was written to.
    agent.sh("mkdir atomic && echo old > atomic/file && ln atomic/file atomic/link")?.exits(0)?;
    let mut request = agent.shell("cat atomic/file atomic/link; ls -A atomic");
    request.stage_files = vec![staged(agent.path("atomic/file"), b"new\n", None)];
    agent.run(&request)?.prints("new\nold\nfile\nlink\n")
}

fn stage_failure(agent: &Subject) -> Result<(), Finding> {
    let mut request = agent.shell("echo ran > unstaged");
    request.stage_files = vec![staged(agent.path("no/such/folder/file"), b"", None)];
    agent.run(&request)?.failure()?;
    ensure(!agent.is_there("unstaged")?, || "it ran".to_owned())
}

fn chained(request: Request, chain: &[&[&str]]) -> Request {
    Request { chain: chain.iter().map(|words| argv(words).argv).collect(), ..request }
}

fn chain(agent: &Subject) -> Result<(), Finding> {
    let script = "read -r line; echo first \"$line\"; echo aside >&2";
    let mut session = agent.start(&chained(argv(&["sh", "-c", script]), &[&["cat"], &["echo", "last"]]))?;
    session.send(Kind::Stdin, &b"a\nb\nc\n"[..])?;
    session.end_of_input()?;
    let seen = session.rest()?;
    seen.prints("first a\nb\nc\nlast\n")?;
    same("stderr", &seen.stderr(), "aside\n")
}

fn chain_stops(agent: &Subject) -> Result<(), Finding> {
    let failing = ["sh", "-c", "echo 2; exit 9"];
    for (first, rest, printed, code) in [
        (&["echo", "1"][..], &[&failing[..], &["echo", "3"]][..], "1\n2\n", 9),
        (&failing[..], &[&["echo", "3"][..]][..], "2\n", 9),
        (&["sh", "-c", "kill -KILL $$"][..], &[&["echo", "3"][..]][..], "", 137),
    ] {
        let seen = agent.run(&chained(argv(first), rest))?;
        seen.exits(code)?;
        same("stdout", &seen.stdout(), printed)?;
    }
    Ok(())
}

fn chain_without_shell(agent: &Subject) -> Result<(), Finding> {
    agent.run(&chained(argv(&["echo", "*"]), &[&["echo", "$HOME", ";", "&&"]]))?.prints("*\n$HOME ; &&\n")
}

fn group(agent: &Subject) -> Result<(), Finding> {
    // Succeeds only where a group has the shell's own id.
    let leads = ["sh", "-c", "kill -0 -$$ && echo leads"];
    agent.run(&chained(argv(&leads), &[&leads]))?.prints("leads\nleads\n")
}

const IDS: [&str; 3] = ["sh", "-c", "id -u; id -g; id -G"];

fn ids(agent: &Subject, user: &str, expected: &str) -> Result<(), Finding> {
    let seen = agent.run(&Request { user: Some(user.to_owned()), cwd: Some("/".to_owned()), ..argv(&IDS) })?;
    seen.prints(expected).map_err(|finding| Finding::new(format!("user {user:?}: {finding}")))
}

fn user_numbers(agent: &Subject) -> Result<(), Finding> {
    ids(agent, "54321:65432", "54321\n65432\n65432\n")
}

/// Name, uid and gid of a user other than root, or else of root.
fn somebody(agent: &Subject) -> Result<(String, String, String), Finding> {
    let passwd = agent.sh("cat /etc/passwd")?.stdout();
    let passwd = String::from_utf8_lossy(&passwd).into_owned();
    let users = passwd.lines().rev().filter_map(|line| match line.split(':').collect::<Vec<_>>()[..] {
        [name, _, uid, gid, ..] => Some((name.to_owned(), uid.to_owned(), gid.to_owned())),
        _ => None,
    });
    let mut users: Vec<_> = users.collect();
    users.sort_by_key(|(_, uid, _)| uid == "0");
    users.into_iter().next().ok_or_else(|| Finding::new("the image has no users in /etc/passwd"))
}

fn user_name(agent: &Subject) -> Result<(), Finding> {
    let (name, uid, gid) = somebody(agent)?;
    for user in [&name, &uid] {
        let request =
            Request { user: Some(user.clone()), cwd: Some("/".to_owned()), ..argv(&["sh", "-c", "id -u; id -g"]) };
        let seen = agent.run(&request)?;
        seen.prints(format!("{uid}\n{gid}\n")).map_err(|finding| Finding::new(format!("user {user:?}: {finding}")))?;
    }
    Ok(())
}

fn user_and_group(agent: &Subject) -> Result<(), Finding> {
    let (name, uid, _) = somebody(agent)?;
    let groups = agent.sh("cat /etc/group")?.stdout();
    let groups = String::from_utf8_lossy(&groups).into_owned();
    let last = groups.lines().last().and_then(|line| {
        let mut fields = line.split(':');
        Some((fields.next()?, fields.nth(1)?))
    });
    let (group, gid) = last.ok_or_else(|| Finding::new("the image has no groups in /etc/group"))?;
    ids(agent, &format!("{name}:{group}"), &format!("{uid}\n{gid}\n{gid}\n"))
}
