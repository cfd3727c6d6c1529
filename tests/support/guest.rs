//! What the guest tests share: images with the distribution's `busybox`, real VMs on the engine
//! under test, and running shell lines in them. Kernel and agent are the cached ones that `cargo xtask` builds.
#![allow(dead_code, unreachable_pub, reason = "each test binary includes this file and uses its part")]

#[path = "engine.rs"]
mod engine;

use std::fs;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use kiln::ExecBuilder;
use kiln::ExecChild;
use kiln::ExecOutcome;
use kiln::ExecStdin;
use kiln::ExecStdout;
use kiln::Image;
use kiln::Vm;
use kiln::VmConfig;
use serde_json::Value;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

use crate::image_support::Entry;
use crate::image_support::LayerBlob;
use crate::image_support::Layout;
use crate::image_support::Place;
use crate::image_support::Tar;
use crate::image_support::run;

pub use engine::engine;

/// Of Debian's `busybox-static`.
pub const BUSYBOX: &str = "/bin/busybox";

/// No command of these tests takes anywhere near as long, also on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The settings of every test's VM.
pub fn config() -> VmConfig {
    VmConfig::new().engine(engine())
}

/// The names under which the host's busybox answers.
pub fn applets() -> Vec<String> {
    run(BUSYBOX, &["--list"]).lines().map(str::to_owned).collect()
}

/// A layer with busybox, its applets in `/bin`, and two users.
pub fn busybox_layer() -> LayerBlob {
    let busybox = fs::read(BUSYBOX).unwrap_or_else(|error| panic!("{BUSYBOX} is needed by this test: {error}"));
    let program = Entry { name: b"bin/busybox", mode: 0o755, content: &busybox, ..Entry::default() };
    let passwd = "root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1001:guest:/home/guest:/bin/sh\n";
    let mut tar = Tar::new().folder("bin/").entry(&program).folder("etc/").folder("home/").folder("root/");
    tar = tar
        .file("etc/passwd", passwd.as_bytes())
        .file("etc/group", b"root:x:0:\nguest:x:1001:\ncrew:x:2002:root,guest\n");
    for applet in applets().iter().filter(|applet| *applet != "busybox") {
        tar = tar.symlink(&format!("bin/{applet}"), BUSYBOX);
    }
    LayerBlob::plain(tar.finish())
}

/// The busybox image with `settings` as its OCI configuration's `config`.
pub async fn busybox_image(settings: Value) -> (Place, Image) {
    image_of(&busybox_layer(), settings).await
}

/// An image of one layer with `settings` as its OCI configuration's `config`.
pub async fn image_of(layer: &LayerBlob, settings: Value) -> (Place, Image) {
    let layout = Layout::new();
    let blob = layout.blob(layer.media_type, &layer.blob);
    let oci = json!({
        "architecture": "amd64", "os": "linux", "config": settings,
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id.to_string()] },
    });
    let manifest = layout.manifest_of(&oci, &[blob]);
    let layout = layout.tag("latest", manifest);
    let place = Place::new().await;
    let image = place.store.import_oci_layout(layout.folder.path(), None).await.unwrap();
    (place, image)
}

/// Boots the busybox image.
pub async fn boot() -> Vm {
    boot_with(json!({}), config()).await
}

/// Boots the busybox image with an OCI configuration and settings of the VM.
pub async fn boot_with(settings: Value, config: VmConfig) -> Vm {
    let (_place, image) = busybox_image(settings).await;
    image.start(config).await.unwrap_or_else(|error| panic!("{error:?}"))
}

/// A terminal in the guest: what a person would type, and what shows.
pub struct Terminal {
    /// The process on it.
    pub child: ExecChild,
    stdin: ExecStdin,
    stdout: ExecStdout,
    /// What showed and was not asked for yet.
    shown: String,
}

impl Terminal {
    /// Starts `argv` on a terminal of 80 columns and 24 rows.
    pub async fn open(exec: ExecBuilder) -> Self {
        let mut child = exec.tty(true).winsize(80, 24).spawn().await.expect("starts");
        let (stdin, stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        Self { child, stdin, stdout, shown: String::new() }
    }

    /// Types `keys`.
    pub async fn keys(&mut self, keys: &str) {
        self.stdin.write_all(keys.as_bytes()).await.expect("the terminal is there");
    }

    /// Waits until `text` shows, and forgets everything up to it.
    pub async fn expect(&mut self, text: &str) {
        let began = Instant::now();
        let mut piece = [0; 1024];
        loop {
            if let Some(at) = self.shown.find(text) {
                self.shown.drain(..at + text.len());
                return;
            }
            let left = DEADLINE.saturating_sub(began.elapsed());
            let read = tokio::time::timeout(left, self.stdout.read(&mut piece)).await;
            match read {
                Ok(Ok(read @ 1..)) => self.shown.push_str(&String::from_utf8_lossy(&piece[..read])),
                other => panic!("{text:?} did not show: {other:?} after {:?}", self.shown),
            }
        }
    }
}

/// A shell line to be run in the guest.
pub fn shell(vm: &Vm, line: &str) -> ExecBuilder {
    vm.exec_builder().argv(["sh", "-c", line]).timeout(DEADLINE)
}

/// Runs a shell line, whatever its end.
pub async fn outcome(vm: &Vm, line: &str) -> ExecOutcome {
    let outcome = shell(vm, line).output().await.unwrap_or_else(|error| panic!("{line}: {error:?}"));
    assert!(!outcome.timed_out, "{line}: {outcome:?}");
    outcome
}

/// Runs a shell line that must succeed without complaint, and returns what it printed.
pub async fn sh(vm: &Vm, line: &str) -> String {
    let outcome = outcome(vm, line).await;
    assert!(outcome.success() && outcome.stderr.is_empty(), "{line}: {}", show(&outcome));
    String::from_utf8(outcome.stdout).expect("these tests print text")
}

/// Asks until the guest answers `expected`: for what happens in its own time after a call returned.
pub async fn until(vm: &Vm, line: &str, expected: &str) {
    let began = Instant::now();
    loop {
        let out = outcome(vm, line).await;
        if out.stdout == expected.as_bytes() {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{line}: {}", show(&out));
    }
}

/// No drop may take this long on the busiest machine.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Drops `value`, which must not wait.
pub fn drop_at_once<T>(value: T) {
    let began = Instant::now();
    drop(value);
    assert!(began.elapsed() < AT_ONCE, "the drop took {:?}", began.elapsed());
}

/// An outcome for a failed assertion.
pub fn show(outcome: &ExecOutcome) -> String {
    let [stdout, stderr] = [&outcome.stdout, &outcome.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{}\nstdout:\n{stdout}\nstderr:\n{stderr}", outcome.status)
}

/// Runs a program of the host's that a test compares with, and returns what it printed.
pub fn host(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).expect("these tests print text")
}
