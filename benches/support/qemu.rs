//! QEMU as a user without virtualization runs it: its translator, the same kernel, busybox on the serial port.
//!
//! The guest's init is a shell that says when it is ready, then runs each line it reads and prints the status.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::ChildStdin;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use tempfile::TempDir;

/// Machine types to compare with: the one made for direct boots, and the default one.
pub(crate) const MACHINES: [&str; 2] = ["microvm", "pc"];

const READY: &[u8] = b"guest-ready";

const INIT: &str = "#!/bin/busybox sh
echo guest-ready
while read -r line; do $line; echo \"guest-status=$?\"; done
";

/// Longer than the slowest boot on a loaded machine; after that the guest is lost.
const DEADLINE: Duration = Duration::from_secs(60);

/// An initramfs of busybox and [`INIT`].
#[derive(Debug)]
pub(crate) struct Initramfs {
    dir: TempDir,
}

impl Initramfs {
    /// Packs the distribution's static busybox; `/dev/console` comes with every kernel's built-in initramfs.
    pub(crate) fn build() -> Self {
        let dir = tempfile::tempdir().expect("temporary folders can be made");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("bin")).expect("the folder is ours");
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("the package busybox-static is installed");
        symlink("busybox", root.join("bin/true")).expect("the folder is ours");
        fs::write(root.join("init"), INIT).expect("the folder is ours");
        fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).expect("the file is ours");
        let pack = "find . | cpio --quiet --create --format=newc > ../initramfs";
        let status = Command::new("sh").args(["-c", pack]).current_dir(&root).status().expect("a shell starts");
        assert!(status.success(), "the package cpio is installed");
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("initramfs")
    }
}

/// A running QEMU guest; killed on drop.
#[derive(Debug)]
pub(crate) struct Qemu {
    process: Child,
    stdin: ChildStdin,
    console: mpsc::Receiver<Vec<u8>>,
    unread: Vec<u8>,
}

impl Qemu {
    /// Boots to the shell; the time counts from starting the process.
    pub(crate) fn boot(machine: &str, kernel: &Path, initramfs: &Initramfs) -> (Self, Duration) {
        let started = Instant::now();
        let mut process = Command::new("qemu-system-x86_64")
            .args(["-machine", machine, "-accel", "tcg", "-smp", "1", "-m", "128"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs.path())
            .args(["-append", "console=ttyS0 quiet reboot=t panic=-1 noreplace-smp"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the package qemu-system-x86 is installed");
        let stdin = process.stdin.take().expect("requested as a pipe");
        let console = forward(process.stdout.take().expect("requested as a pipe"));
        let mut guest = Self { process, stdin, console, unread: Vec::new() };
        guest.wait_for(READY);
        (guest, started.elapsed())
    }

    /// Runs a command line that must succeed; the time is from typing it to reading its status.
    pub(crate) fn run(&mut self, line: &str) -> Duration {
        let started = Instant::now();
        self.stdin.write_all(format!("{line}\n").as_bytes()).expect("QEMU reads its serial port");
        self.wait_for(b"guest-status=0\r\n");
        started.elapsed()
    }

    fn wait_for(&mut self, text: &[u8]) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = self.unread.windows(text.len()).position(|window| window == text) {
                self.unread.drain(..at + text.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(bytes) => self.unread.extend(bytes),
                Err(error) => panic!("QEMU's guest: {error}; console: {}", String::from_utf8_lossy(&self.unread)),
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads on a thread of its own, so that waiting can have a deadline. It ends with QEMU.
fn forward(mut output: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = output.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
