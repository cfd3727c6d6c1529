//! `examples/shell.rs` as a program on a pseudo-terminal, with a real guest behind an exec socket.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;

use guest::DEADLINE;
use guest::boot;
use guest::until;
use kiln::ExecSocket;
use kiln::Vm;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use rustix::pty::OpenptFlags;
use rustix::pty::grantpt;
use rustix::pty::openpt;
use rustix::pty::ptsname;
use rustix::pty::unlockpt;
use rustix::termios::LocalModes;
use rustix::termios::Winsize;
use rustix::termios::tcgetattr;
use rustix::termios::tcsetwinsize;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::process::Child;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// The built example. Cargo builds examples along with all tests, but not with one that is asked for by name.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(|deps| deps.parent()).unwrap();
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    // For the whole workspace, as the tests are built: with other features it would all be compiled again.
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--workspace", "--profile", profile]);
    let status = cargo.args(["--example", "shell"]).arg("--target-dir").arg(folder.parent().unwrap()).status().unwrap();
    assert!(status.success(), "the example builds");
    folder.join("examples/shell")
}

/// A guest behind an exec socket.
struct Guest {
    vm: Vm,
    socket: ExecSocket,
    _folder: tempfile::TempDir,
}

impl Guest {
    async fn boot() -> Self {
        let vm = boot().await;
        let folder = tempfile::tempdir().unwrap();
        let socket = vm.exec_socket(folder.path().join("exec.sock")).await.unwrap();
        Self { vm, socket, _folder: folder }
    }
}

/// The example on a terminal, as its user sees it.
struct Session {
    program: Child,
    master: File,
    /// Kept open, so that the terminal outlives the program.
    terminal: File,
    before: String,
    screen: mpsc::UnboundedReceiver<Vec<u8>>,
    unread: Vec<u8>,
}

impl Session {
    fn start(guest: &Guest, command: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        // The test must not become the terminal's owner by opening it.
        let terminal = File::from(
            rustix::fs::open(
                &path,
                rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .unwrap(),
        );
        let master = File::from(master);
        set_size(&master, 91, 33);
        let before = modes(&terminal);
        let standard = || Stdio::from(terminal.try_clone().unwrap());
        // setsid gives it the terminal as its controlling one and then becomes the program, with the same id.
        let program = Command::new("setsid")
            .arg("--ctty")
            .arg(program())
            .arg("--socket")
            .arg(guest.socket.path())
            .args(command)
            .stdin(standard())
            .stdout(standard())
            .stderr(standard())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let screen = read_on_a_thread(master.try_clone().unwrap());
        Self { program, master, terminal, before, screen, unread: Vec::new() }
    }

    fn keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads to the end of the first `text`; what comes before it is passed over.
    async fn see(&mut self, text: &str) {
        let found = |unread: &[u8]| unread.windows(text.len()).position(|window| window == text.as_bytes());
        let reading = async {
            loop {
                if let Some(at) = found(&self.unread) {
                    self.unread.drain(..at + text.len());
                    return;
                }
                self.unread.extend(self.screen.recv().await.expect("the terminal is open"));
            }
        };
        if timeout(DEADLINE, reading).await.is_err() {
            panic!("no {text:?} on the screen: {:?}", String::from_utf8_lossy(&self.unread));
        }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.program.id().unwrap().cast_signed()).unwrap(), signal).unwrap();
    }

    /// Waits for the program's end, finds the terminal as it was, and returns the exit code.
    async fn ended(&mut self) -> Option<i32> {
        let status = timeout(DEADLINE, self.program.wait()).await.expect("the program ends").unwrap();
        assert_eq!(modes(&self.terminal), self.before, "the terminal is restored");
        status.code()
    }
}

/// All of the terminal's settings.
fn modes(terminal: &File) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}

fn set_size(master: &File, cols: u16, rows: u16) {
    let size = Winsize { ws_col: cols, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(master, size).unwrap();
}

/// So that waiting can have a deadline. The thread ends with the terminal.
fn read_on_a_thread(mut master: File) -> mpsc::UnboundedReceiver<Vec<u8>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = master.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

#[tokio::test]
async fn a_shell_answers_and_its_code_is_ours() {
    let guest = Guest::boot().await;
    let mut session = Session::start(&guest, &[]);
    session.see("# ").await;
    assert!(session.is_raw());
    session.keys("echo $((6*7))\r");
    session.see("42\r\n").await;
    session.keys("stty size\r");
    session.see("33 91\r\n").await;
    session.keys("exit 3\r");
    assert_eq!(session.ended().await, Some(3));
}

#[tokio::test]
async fn an_interrupt_meets_the_foreground_and_the_shell_lives() {
    let guest = Guest::boot().await;
    let mut session = Session::start(&guest, &[]);
    session.see("# ").await;
    session.keys("sleep 1000\r");
    until(&guest.vm, "pidof sleep > /dev/null && echo runs", "runs\n").await;
    session.keys("\x03");
    until(&guest.vm, "pidof sleep || echo gone", "gone\n").await;
    session.keys("echo alive-$((1+1))\r");
    session.see("alive-2\r\n").await;
    session.keys("\x04");
    session.ended().await;
}

#[tokio::test]
async fn a_change_of_size_reaches_the_guest() {
    let guest = Guest::boot().await;
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut session = Session::start(&guest, &["sh", "-c", script]);
    session.see("ready\r\n").await;
    // The kernel tells the program, as it does when a window is resized.
    set_size(&session.master, 100, 40);
    session.see("40 100\r\n").await;
    session.signal(Signal::INT);
    assert_eq!(session.ended().await, Some(128 + 2));
}

#[tokio::test]
async fn signals_to_the_program_restore_the_terminal_and_end_the_command() {
    let guest = Guest::boot().await;
    for (signal, number) in [(Signal::TERM, 15), (Signal::HUP, 1)] {
        let mut session = Session::start(&guest, &["sh", "-c", "echo up; exec sleep 1000"]);
        session.see("up\r\n").await;
        assert!(session.is_raw());
        session.signal(signal);
        assert_eq!(session.ended().await, Some(128 + number));
        until(&guest.vm, "pidof sleep || echo gone", "gone\n").await;
    }
}

#[tokio::test]
async fn a_stopped_terminal_does_not_keep_the_program() {
    let guest = Guest::boot().await;
    let mut session = Session::start(&guest, &["sh", "-c", "echo up; exec yes"]);
    session.see("up\r\n").await;
    // Nobody reads the screen: it fills up, and the program's write waits.
    session.screen.close();
    session.signal(Signal::TERM);
    assert_eq!(session.ended().await, Some(128 + 15));
    until(&guest.vm, "pidof yes || echo gone", "gone\n").await;
}

#[tokio::test]
async fn a_lost_guest_restores_the_terminal() {
    let guest = Guest::boot().await;
    let mut session = Session::start(&guest, &["sh", "-c", "echo up; exec sleep 1000"]);
    session.see("up\r\n").await;
    guest.vm.shutdown().await.unwrap();
    assert_eq!(session.ended().await, Some(1));
    session.see("lost\r\n").await;
}

#[tokio::test]
async fn without_a_terminal_there_are_three_pipes() {
    let guest = Guest::boot().await;
    let mut program = Command::new(program())
        .arg("--socket")
        .arg(guest.socket.path())
        .args(["sh", "-c", "test -t 0 || echo piped; echo aside >&2; cat; exit 4"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = program.stdin.take().unwrap();
    stdin.write_all(b"the rest").await.unwrap();
    drop(stdin);
    let (mut stdout, mut stderr) = (String::new(), String::new());
    let (mut from_stdout, mut from_stderr) = (program.stdout.take().unwrap(), program.stderr.take().unwrap());
    let reading = async {
        tokio::try_join!(from_stdout.read_to_string(&mut stdout), from_stderr.read_to_string(&mut stderr)).unwrap();
        program.wait().await.unwrap()
    };
    let status = timeout(DEADLINE, reading).await.expect("the program ends");
    assert_eq!((&stdout[..], &stderr[..], status.code()), ("piped\nthe rest", "aside\n", Some(4)));
}

#[tokio::test]
async fn a_program_that_is_not_there_is_said_on_an_untouched_terminal() {
    let guest = Guest::boot().await;
    let mut session = Session::start(&guest, &["no-such-program"]);
    session.see("program not found: no-such-program\r\n").await;
    assert_eq!(session.ended().await, Some(1));
}
