//! `cargo xtask demo`: the first thing a newcomer runs. From a bare Debian to commands in a microVM.
//!
//! Every answer is checked, not only shown: the demo fails when the guest answers wrongly.

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use kiln::Image;
use kiln::Vm;
use kiln::VmConfig;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use crate::agent;
use crate::busybox_image;
use crate::kernel;

const AT_ONCE: usize = 20;

/// Runs the demo on the image that `reference` names, or on one made of the distribution's busybox.
pub(crate) fn run(reference: Option<&str>) -> Result<()> {
    let mut phases = Phases::default();
    kernel::ensure(None)?;
    phases.done("guest kernel", "built or found in the cache");
    agent::ensure()?;
    phases.done("guest agent", "built or found in the cache");
    tokio::runtime::Runtime::new()?.block_on(guest(reference, &mut phases))?;
    phases.print();
    Ok(())
}

async fn guest(reference: Option<&str>, phases: &mut Phases) -> Result<()> {
    let image = image(reference).await?;
    phases.done("image", image.digest().to_string());
    let vm = image.start(VmConfig::new()).await.context("the guest did not start")?;
    phases.done("boot to agent", "a Linux kernel on the software processor");
    phases.done("uname -a", uname(&vm).await?);
    phases.done("cat", cat(&vm).await?);
    phases.done("exit code", exit_code(&vm).await?);
    phases.done("stderr", stderr_apart(&vm).await?);
    phases.done(format!("{AT_ONCE} at once"), many(&vm).await?);
    vm.shutdown().await.context("the guest did not stop")?;
    phases.done("shutdown", "orderly");
    Ok(())
}

async fn image(reference: Option<&str>) -> Result<Image> {
    if let Some(reference) = reference {
        return Image::pull(reference).await.with_context(|| format!("cannot pull {reference}"));
    }
    let layout = busybox_image::ensure()?;
    Image::from_oci_layout(&layout).await.with_context(|| format!("cannot read {}", layout.display()))
}

async fn uname(vm: &Vm) -> Result<String> {
    let out = vm.exec_builder().argv(["uname", "-a"]).output().await?;
    ensure!(out.success() && out.stdout.starts_with(b"Linux "), "uname: {out:?}");
    Ok(String::from_utf8_lossy(&out.stdout).trim_end().to_owned())
}

async fn cat(vm: &Vm) -> Result<String> {
    let sent: Vec<u8> = (0..256 * 1024_u32).map(|index| (index % 251) as u8).collect();
    let mut child = vm.exec(["cat"]).await?;
    let mut stdin = child.stdin.take().context("standard input was taken")?;
    let mut stdout = child.stdout.take().context("standard output was taken")?;
    let mut received = Vec::new();
    let write = async {
        stdin.write_all(&sent).await?;
        stdin.shutdown().await
    };
    tokio::try_join!(write, stdout.read_to_end(&mut received))?;
    let status = child.wait().await?;
    ensure!(status.success() && received == sent, "cat: {status}, {} of {} bytes", received.len(), sent.len());
    Ok(format!("{} KiB in through stdin and back, unchanged", sent.len() / 1024))
}

async fn exit_code(vm: &Vm) -> Result<String> {
    let out = vm.exec_builder().argv(["sh", "-c", "exit 7"]).output().await?;
    ensure!(out.status.code() == Some(7), "exit 7: {out:?}");
    Ok(out.status.to_string())
}

async fn stderr_apart(vm: &Vm) -> Result<String> {
    let out = vm.exec_builder().argv(["sh", "-c", "echo out; echo err >&2"]).output().await?;
    ensure!(out.success() && out.stdout == b"out\n" && out.stderr == b"err\n", "stderr: {out:?}");
    Ok("stdout \"out\", stderr \"err\"".to_owned())
}

async fn many(vm: &Vm) -> Result<String> {
    let mut running = JoinSet::new();
    for index in 0..AT_ONCE {
        let exec = vm.exec_builder().argv(["echo".to_owned(), index.to_string()]);
        running.spawn(async move { (index, exec.output().await) });
    }
    while let Some(finished) = running.join_next().await {
        let (index, out) = finished?;
        let out = out?;
        ensure!(out.success() && out.stdout == format!("{index}\n").as_bytes(), "echo {index}: {out:?}");
    }
    Ok("each by tokio::spawn, each with its own answer".to_owned())
}

/// What was done and how long it took.
struct Phases {
    done: Vec<(String, Duration, String)>,
    since: Instant,
}

impl Default for Phases {
    fn default() -> Self {
        Self { done: Vec::new(), since: Instant::now() }
    }
}

impl Phases {
    /// Ends the running phase and starts the next.
    fn done(&mut self, name: impl Into<String>, result: impl Into<String>) {
        let now = Instant::now();
        self.done.push((name.into(), now - self.since, result.into()));
        self.since = now;
    }

    fn print(&self) {
        let total = self.done.iter().map(|(_, time, _)| *time).sum::<Duration>();
        for (name, time, result) in &self.done {
            println!("{name:<16}{:>10.1} ms   {result}", time.as_secs_f64() * 1e3);
        }
        println!("{:<16}{:>10.1} ms", "total", total.as_secs_f64() * 1e3);
    }
}
