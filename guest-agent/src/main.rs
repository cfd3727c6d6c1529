//! kiln's in-guest agent: PID 1 of the microVM, and server of the exec protocol (`docs/exec-protocol.md`).
//!
//! - As PID 1 of an initramfs it builds the image's root ([`boot`]), then serves vsock port 1028 until the machine ends.
//! - It starts itself again to pack or unpack a folder ([`helper`]), so that the server never waits for that.
//! - `kiln-agent --unix PATH` serves the same sessions on a Unix socket as an ordinary process, until SIGTERM.
//!
//! One thread, no runtime, no lock: see [`server`]. All `unsafe` is in [`sys`].
#![cfg_attr(not(test), no_main)]
#![allow(clippy::print_stderr, reason = "the console is where the agent reports")]

mod backlog;
mod boot;
mod clock;
mod control;
mod files;
mod helper;
mod kin;
mod launch;
mod log;
mod outbox;
mod poll;
mod process;
mod refusal;
mod relay;
mod renew;
mod server;
mod session;
mod sys;
mod tcp;
mod uploads;
mod users;
mod workdir;
mod workload;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use kiln_wire::AGENT_PORT;
use kiln_wire::boot::GuestConfig;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::system::RebootCommand;

use crate::boot::BootError;
use crate::launch::DEFAULT_PATH;
use crate::launch::Defaults;
use crate::server::Server;
use crate::sys::net;
use crate::sys::signal;

/// Open files of the agent: four for each session, and some.
const OPEN_FILES: u64 = 16384;

/// The test harness replaces it; without it nothing would use the program.
#[cfg(test)]
fn main() {
    std::process::exit(run());
}

/// What the agent does when it is started; the exit status when it comes back.
pub(crate) fn run() -> i32 {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(flag), Some(path), None) if flag == "--unix" => match serve_unix(path) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("kiln-agent: {error}");
                1
            }
        },
        (Some(flag), Some(path), None) if flag == helper::PACK => helper::pack(Path::new(&path)),
        (Some(flag), Some(path), None) if flag == helper::UNPACK => helper::unpack(Path::new(&path)),
        _ if std::process::id() == 1 => serve_guest(),
        _ => {
            eprintln!("usage: kiln-agent --unix PATH    (or as PID 1 of a guest)");
            2
        }
    }
}

fn serve_unix(path: OsString) -> io::Result<()> {
    let path = Path::new(&path);
    // A socket that nobody answers is left over; one that answers is in use, and binding then fails.
    if std::os::unix::net::UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    // The default backlog of 128 would refuse a burst of hosts.
    rustix::net::listen(&listener, 1024)?;
    let text = |value: OsString| value.into_string().ok();
    let env = std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?))).collect();
    let workdir = std::env::current_dir()?.to_string_lossy().into_owned();
    let defaults = Defaults { env, workdir, user: None, open_files: raise_open_files(), ignored: signal::ignored() };
    let served = Server::new(listener.into(), defaults, false)?.run();
    let _ = fs::remove_file(path);
    served
}

/// PID 1 must not return: the kernel panics when it does.
fn serve_guest() -> ! {
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("kiln-agent: {panic}");
        end_machine();
    }));
    let error = match boot_and_serve() {
        Ok(()) => "the server stopped".to_owned(),
        Err(error) => error.to_string(),
    };
    eprintln!("kiln-agent: {error}");
    end_machine()
}

fn boot_and_serve() -> Result<(), Box<dyn std::error::Error>> {
    let text = |error: BootError| error.to_string();
    boot::open_console().map_err(text)?;
    let config = boot::read_config().map_err(text)?;
    boot::enter_root(&config).map_err(text)?;
    for complaint in boot::settle_in(&config) {
        eprintln!("kiln-agent: {complaint}");
    }
    let listener =
        net::listen_vsock(AGENT_PORT).map_err(|error| format!("listening on vsock port {AGENT_PORT}: {error}"))?;
    Ok(Server::new(listener, guest_defaults(config), true)?.run()?)
}

fn guest_defaults(config: GuestConfig) -> Defaults {
    let mut env = BTreeMap::from([("PATH".to_owned(), DEFAULT_PATH.to_owned())]);
    env.extend(config.env);
    let workdir = if config.workdir.is_empty() { "/".to_owned() } else { config.workdir };
    // Without one it is root, with the home and the other groups that the image's files give it, as with Docker.
    let user = Some(config.user.filter(|user| !user.is_empty()).unwrap_or_else(|| users::ROOT.to_owned()));
    // The kernel starts PID 1 with none ignored.
    Defaults { env, workdir, user, open_files: raise_open_files(), ignored: Vec::new() }
}

/// Raises the agent's limit of open files as far as it may, and returns the one that its processes are to have.
fn raise_open_files() -> Option<(u64, u64)> {
    let old = rustix::process::getrlimit(Resource::Nofile);
    let (soft, hard) = (old.current.unwrap_or(u64::MAX), old.maximum.unwrap_or(u64::MAX));
    if soft >= OPEN_FILES {
        return None;
    }
    let limit = |hard: u64| Rlimit { current: Some(hard.min(OPEN_FILES)), maximum: Some(hard) };
    let privileged = rustix::process::setrlimit(Resource::Nofile, limit(hard.max(OPEN_FILES)));
    privileged.or_else(|_| rustix::process::setrlimit(Resource::Nofile, limit(hard))).ok()?;
    Some((soft, hard))
}

/// Ends the machine: with `reboot=t` on the command line a restart is a triple fault, which every engine reports as the end.
fn end_machine() -> ! {
    rustix::fs::sync();
    let _ = rustix::system::reboot(RebootCommand::Restart);
    loop {
        // Not allowed to end the machine (a container, say): PID 1 still must not return.
        std::thread::sleep(Duration::from_secs(3600));
    }
}
