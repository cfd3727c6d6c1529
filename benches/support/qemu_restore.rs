//! QEMU that goes on from its own migration file: the same kernel, root image and agent, to the first byte of an exec.
//!
//! What QEMU is given, so that it is as fast as it can be here:
//!
//! - the machine type made for direct boots, `microvm`, without ACPI, clock chip and option ROMs, and with no device that
//!   is not used; PIT and PIC stay, because the kernel calibrates its clocks with them;
//! - a guest whose caches were dropped before it was saved, so that the file is small, and 128 MiB of memory;
//! - a file that it is handed open (`fd:`), without a process that copies it;
//! - the trick of templates ([`Memory::Mapped`]): the memory in a file of its own that is mapped copy-on-write, and not in
//!   the migration file at all. That is the fastest that this QEMU has, and few use it;
//! - a relay in the guest that has its connection to the agent already.
//!
//! The kernel has no driver for a second serial port or virtio-serial, and this host need not have vhost-vsock: the way in
//! is virtio-net and QEMU's user network. QEMU loses what is connected before the guest runs (for the 6 s of its
//! network's retransmission), so that its control socket is asked first; that takes less than 1 ms.

use std::fs;
use std::fs::File;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::net::Ipv4Addr;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;
use kiln::ExecBuilder;
use kiln::exec::AgentInfo;
use kiln::transport::Connector;
use kiln::transport::GuestStream;
use serde_json::Value;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpStream;

/// The relay's port in the guest.
const GUEST_PORT: u16 = 1028;

/// Longer than the slowest boot on a loaded machine; after that the guest is lost.
const DEADLINE: Duration = Duration::from_secs(60);

/// Between two looks at QEMU while it starts.
const POLL: Duration = Duration::from_micros(200);

/// The root as the agent's `boot.rs` makes it when it is PID 1, and then the agent as an ordinary process.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /lower /rw /newroot /dev
$b mount -t devtmpfs devtmpfs /dev 2>/dev/null
$b mount -t erofs -o ro /dev/vda /lower
$b mount -t tmpfs -o size=64m,mode=0755 tmpfs /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /newroot
cd /newroot
$b mkdir -p proc sys dev run etc tmp
$b mount --move /dev dev
$b mount -t proc proc proc
$b mount -t sysfs sysfs sys
$b mkdir -p dev/pts dev/shm
$b mount -t devpts -o mode=0620,gid=5,ptmxmode=0666 devpts dev/pts
$b mount -t tmpfs tmpfs dev/shm
$b cp /relay /kiln-agent run/
$b rm /relay /kiln-agent
$b ip link set lo up
$b ip addr add 10.0.2.15/24 dev eth0
$b ip link set eth0 up
$b ip route add default via 10.0.2.2
$b mount --move . /
exec $b chroot . /bin/busybox sh -c '
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
/run/kiln-agent --unix /run/agent.sock &
until [ -S /run/agent.sock ]; do :; done
sync
echo 3 > /proc/sys/vm/drop_caches
/run/relay 1028 /run/agent.sock
'
"#;

/// Where the guest's memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// In the migration file, which is read at every restore: what `migrate` does unless told otherwise.
    Migrated,
    /// In a file that is mapped copy-on-write.
    Mapped,
}

/// A guest saved by QEMU.
#[derive(Debug)]
pub(crate) struct Saved {
    folder: TempDir,
    memory: Memory,
    kernel: PathBuf,
    root: PathBuf,
    /// What saving it took.
    cost: SaveCost,
}

/// What it took QEMU to save a guest, by its own clock. It does not wait for the disk.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SaveCost {
    /// From the command until the file is written.
    pub(crate) whole: Duration,
    /// How long the guest stood still meanwhile.
    pub(crate) pause: Duration,
}

/// A running QEMU with the guest; killed on drop.
#[derive(Debug)]
pub(crate) struct Guest {
    process: Child,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Saved {
    /// Boots once from the disk image `root`, and saves the guest when the agent and the relay are ready.
    pub(crate) fn make(kernel: &Path, agent: &Path, root: &Path, memory: Memory) -> Self {
        let folder = tempfile::tempdir_in(super::image::scratch()).expect("temporary folders can be made");
        let cost = SaveCost::default();
        let mut saved = Self { folder, memory, kernel: kernel.to_owned(), root: root.to_owned(), cost };
        saved.pack_initramfs(agent);
        let mut command = saved.command(false, free_port());
        let mut guest = Guest { process: spawn(command.arg("-serial").arg("stdio").stdout(Stdio::piped())) };
        wait_for(guest.process.stdout.take().expect("requested as a pipe"), "relay-ready");
        // The relay waits for its connection then, and the kernel has nothing left to do.
        thread::sleep(Duration::from_millis(500));
        let mut control = Control::open(&saved.file("control"));
        saved.share_memory(&mut control);
        control.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 }));
        // Not stopped first: a guest that is saved running is restored running.
        let uri = format!("exec:cat > '{}'", saved.file("migration").display());
        control.execute("migrate", json!({ "uri": uri }));
        let deadline = Instant::now() + DEADLINE;
        let answer = loop {
            let answer = control.execute("query-migrate", json!({}));
            if answer["status"] == "completed" {
                break answer;
            }
            assert!(Instant::now() < deadline, "QEMU's migration takes too long");
            thread::sleep(Duration::from_millis(10));
        };
        let time = |name: &str| Duration::from_millis(answer[name].as_u64().expect("QEMU says how long it took"));
        saved.cost = SaveCost { whole: time("total-time"), pause: time("downtime") };
        saved
    }

    /// What saving took.
    pub(crate) fn cost(&self) -> SaveCost {
        self.cost
    }

    /// Restores the guest and runs `/bin/echo x` by its agent. The time counts from starting the process to the
    /// first byte of the output.
    pub(crate) async fn restore(&self, agent: AgentInfo) -> (Guest, Duration) {
        let _ = fs::remove_file(self.file("control"));
        let file = File::open(self.file("migration")).expect("the guest was saved");
        let port = free_port();
        let mut command = self.command(true, port);
        let incoming = if self.memory == Memory::Mapped { "defer" } else { "fd:0" };
        command.args(["-serial", "null", "-incoming", incoming]).stdin(file);
        let started = Instant::now();
        let guest = Guest { process: spawn(&mut command) };
        let mut control = Control::open(&self.file("control"));
        if self.memory == Memory::Mapped {
            self.share_memory(&mut control);
            control.execute("migrate-incoming", json!({ "uri": "fd:0" }));
        }
        while control.execute("query-status", json!({}))["running"] != true {
            assert!(started.elapsed() < DEADLINE, "QEMU does not restore its guest");
            thread::sleep(POLL);
        }
        let exec = ExecBuilder::over(Arc::new(TcpConnector { port })).agent(agent);
        super::first_byte(exec).await;
        (guest, started.elapsed())
    }

    /// The size of what a restore reads; a mapped memory is not read.
    pub(crate) fn size(&self) -> u64 {
        fs::metadata(self.file("migration")).expect("the guest was saved").len()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What both sides of a migration need; the memory of a restored guest is its own.
    fn command(&self, restored: bool, port: u16) -> Command {
        let path = |prefix: &str, path: &Path, suffix: &str| format!("{prefix}{}{suffix}", path.display());
        let mut machine = "microvm,acpi=off,rtc=off,x-option-roms=off".to_owned();
        let mut command = Command::new("qemu-system-x86_64");
        if self.memory == Memory::Mapped {
            machine.push_str(",memory-backend=memory");
            let share = if restored { ",share=off" } else { ",share=on" };
            let object = "memory-backend-file,id=memory,size=128M,mem-path=";
            command.arg("-object").arg(path(object, &self.file("memory"), share));
        }
        command
            .args(["-machine", &machine, "-accel", "tcg", "-smp", "1", "-m", "128"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(self.file("initramfs"))
            .args(["-append", "console=ttyS0 quiet reboot=t panic=-1 noreplace-smp"])
            .arg("-drive")
            .arg(path("if=none,id=root,format=raw,readonly=on,file=", &self.root, ""))
            .args(["-device", "virtio-blk-device,drive=root"])
            .arg("-netdev")
            .arg(format!("user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{GUEST_PORT}"))
            .args(["-device", "virtio-net-device,netdev=net"])
            .arg("-qmp")
            .arg(path("unix:", &self.file("control"), ",server=on,wait=off"));
        command
    }

    fn share_memory(&self, control: &mut Control) {
        if self.memory == Memory::Mapped {
            let capability = json!({ "capability": "x-ignore-shared", "state": true });
            control.execute("migrate-set-capabilities", json!({ "capabilities": [capability] }));
        }
    }

    fn pack_initramfs(&self, agent: &Path) {
        let root = self.file("initramfs.d");
        fs::create_dir_all(root.join("bin")).expect("the folder is ours");
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("the package busybox-static is installed");
        fs::copy(agent, root.join("kiln-agent")).expect("the agent is built");
        compile_relay(&root.join("relay"));
        fs::write(root.join("init"), INIT).expect("the folder is ours");
        fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).expect("the file is ours");
        let pack = "find . | cpio --quiet --create --format=newc > ../initramfs";
        let status = Command::new("sh").args(["-c", pack]).current_dir(&root).status().expect("a shell starts");
        assert!(status.success(), "the package cpio is installed");
    }
}

fn spawn(command: &mut Command) -> Child {
    command.spawn().expect("the package qemu-system-x86 is installed")
}

fn compile_relay(target: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/support/relay.rs");
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
    rustc.args(["-C", "panic=abort", "--target", "x86_64-unknown-linux-gnu", "-o"]);
    assert!(rustc.arg(target).arg(source).status().expect("rustc starts").success(), "the relay compiles");
}

/// Reads on a thread of its own, which ends with QEMU, so that waiting can have a deadline.
fn wait_for(output: impl Read + Send + 'static, text: &'static str) {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line.contains(text) {
                let _ = sender.send(());
            }
        }
    });
    receiver.recv_timeout(DEADLINE).expect("QEMU's guest boots");
}

/// A port that was free a moment ago, which is all that QEMU can be told.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// QEMU's control socket (QMP).
#[derive(Debug)]
struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    /// Connects as soon as QEMU listens.
    fn open(path: &Path) -> Self {
        let deadline = Instant::now() + DEADLINE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => panic!("QEMU's control socket: {error}"),
                Err(_) => thread::sleep(POLL),
            }
        };
        stream.set_read_timeout(Some(DEADLINE)).expect("not zero");
        let mut control = Self { stream: BufReader::new(stream) };
        control.read();
        control.execute("qmp_capabilities", json!({}));
        control
    }

    /// What the command returns; it must succeed.
    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes()).expect("QEMU runs");
        loop {
            let mut answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("QEMU runs");
        serde_json::from_str(&line).expect("QEMU speaks JSON")
    }
}

/// To the relay, whatever the port: it knows one agent.
#[derive(Debug)]
struct TcpConnector {
    port: u16,
}

impl Connector for TcpConnector {
    fn connect(&self, _port: u32) -> BoxFuture<'_, io::Result<Box<dyn GuestStream>>> {
        async {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn GuestStream>)
        }
        .boxed()
    }
}
