//! `cargo xtask demo`: the first thing a newcomer runs. From a bare Debian to commands in a microVM.
//!
//! Every answer is checked, not only shown: the demo fails when the guest answers wrongly.

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use kiln::Baked;
use kiln::Image;
use kiln::Vm;
use kiln::VmConfig;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use crate::agent;
use crate::busybox_image;
use crate::kernel;
use crate::packages;
use crate::progress;
use crate::progress::Running;

const AT_ONCE: usize = 20;

/// Runs the demo on the image that `name` is the reference or the path of, or on one made of the
/// distribution's busybox.
pub(crate) fn run(name: Option<&str>) -> Result<()> {
    let mut phases = Phases::start();
    phases.done("guest kernel", &kernel::ensure(None)?.display().to_string());
    phases.done("guest agent", &agent::ensure()?.display().to_string());
    let source = Source::of(name)?;
    tokio::runtime::Runtime::new()?.block_on(guest(&source, &mut phases))?;
    phases.total();
    Ok(())
}

/// Where the image comes from.
enum Source<'a> {
    Path(&'a Path),
    Registry(&'a str),
    Busybox(PathBuf),
}

impl<'a> Source<'a> {
    /// Tells folders from references, and prepares what reading the image needs.
    fn of(name: Option<&'a str>) -> Result<Self> {
        match name {
            None => busybox_image::ensure().map(Self::Busybox),
            // No reference starts like a path.
            Some(path) if path.starts_with(['/', '.']) || Path::new(path).exists() => Ok(Self::Path(Path::new(path))),
            Some(reference) => {
                packages::ensure("talking to registries", &["ca-certificates"])?;
                Ok(Self::Registry(reference))
            }
        }
    }

    async fn image(&self) -> Result<Image> {
        let path = match self {
            Self::Registry(reference) => {
                let _running = Running::start(format!("pulling {reference}"));
                return Image::pull(reference).await.with_context(|| format!("cannot pull {reference}"));
            }
            Self::Path(path) => path,
            Self::Busybox(folder) => folder.as_path(),
        };
        Image::from_path(path).await.with_context(|| format!("cannot read {}", path.display()))
    }
}

async fn guest(source: &Source<'_>, phases: &mut Phases) -> Result<()> {
    let image = source.image().await?;
    phases.done("image", &image.digest().to_string());
    let baked = bake(&image).await?;
    phases.done("bake", "a Linux guest booted on the software processor and kept, unless it was before");
    let vm = baked.start().await.context("the guest did not start")?;
    phases.done("restore", "a guest from that, its agent answers");
    phases.done("uname -a", &uname(&vm).await?);
    phases.done("cat", &cat(&vm).await?);
    phases.done("exit code", &exit_code(&vm).await?);
    phases.done("stderr", &stderr_apart(&vm).await?);
    phases.done(&format!("{AT_ONCE} at once"), &many(&vm).await?);
    vm.shutdown().await.context("the guest did not stop")?;
    phases.done("shutdown", "orderly");
    Ok(())
}

/// The first time this writes the root filesystem too, which takes a while for a large image.
async fn bake(image: &Image) -> Result<Baked> {
    let _running = Running::start("baking");
    image.bake(VmConfig::new()).await.context("the image could not be baked")
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

/// Tells what was done and how long it took, a line a phase as it ends.
struct Phases {
    started: Instant,
    since: Instant,
}

impl Phases {
    fn start() -> Self {
        let now = Instant::now();
        Self { started: now, since: now }
    }

    /// Ends the running phase and starts the next.
    fn done(&mut self, name: &str, result: &str) {
        let now = Instant::now();
        print(name, now - self.since, result);
        self.since = now;
    }

    fn total(&self) {
        print("total", self.started.elapsed(), "");
    }
}

fn print(name: &str, time: Duration, result: &str) {
    let time = match time.as_secs_f64() {
        long @ 10.0.. => format!("{long:.1} s "),
        short => format!("{:.1} ms", short * 1e3),
    };
    progress::say(format!("{name:<14}{time:>11}   {result}").trim_end());
}
