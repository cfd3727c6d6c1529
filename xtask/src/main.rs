//! `cargo xtask`: kiln's build and development tasks, and the only script language of this repository.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its terminal")]

mod agent;
mod bench;
mod busybox_image;
mod cache;
mod demo;
mod fuzz;
mod kernel;
mod packages;
mod process;
mod progress;
mod test;
mod workspace;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use clap::Subcommand;
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "kiln's build and development tasks")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot a microVM and run commands in it, with everything that takes.
    Demo {
        /// Any image with a shell, in place of one made of the distribution's busybox: a reference to pull, or
        /// the path of an OCI layout folder or of an archive.
        #[arg(long, value_name = "REF")]
        image: Option<String>,
    },
    /// Build the guest kernel, or find it in the cache.
    Kernel {
        /// An unpacked Linux 6.12 tree to use in place of Debian's linux-source-6.12 package.
        #[arg(long, value_name = "DIR")]
        source: Option<PathBuf>,
    },
    /// Build the static guest agent and install it into the cache.
    Agent,
    /// Make an OCI layout of the distribution's busybox, the image of the demo and the benchmarks.
    BusyboxImage,
    /// Install and build whatever the tests need, then run all of them.
    Test {
        /// The engine to run guests on, where a test is not about one of them. The suite that compares engines runs
        /// them all in any case.
        #[arg(long, value_name = "NAME")]
        engine: Option<test::Engine>,
    },
    /// Install what the benchmarks compare with, then run all of them.
    Bench {
        /// The benchmarks to run: boot, exec_rtt, exec_sessions, exec_throughput, soft_cpu.
        names: Vec<String>,
    },
    /// Fuzz what is parsed from strangers, with libFuzzer and the stable toolchain.
    Fuzz {
        /// The targets to run, all by default.
        targets: Vec<String>,
        /// How long each runs.
        #[arg(long, value_name = "N", default_value_t = 20)]
        seconds: u32,
    },
    /// Run what continuous integration runs.
    Ci,
}

fn main() -> Result<()> {
    // Silent unless RUST_LOG asks; the library itself only emits events.
    let filter = EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match Args::parse().task {
        Task::Demo { image } => demo::run(image.as_deref())?,
        Task::Kernel { source } => {
            let kernel = kernel::ensure(source.as_deref())?;
            println!("{}", kernel.display());
        }
        Task::Agent => {
            let agent = agent::ensure()?;
            println!("{}", agent.display());
        }
        Task::BusyboxImage => println!("{}", busybox_image::ensure()?.display()),
        Task::Test { engine } => test::run(engine)?,
        Task::Bench { names } => bench::run(&names)?,
        Task::Fuzz { targets, seconds } => fuzz::run(&targets, seconds)?,
        Task::Ci => process::run(&mut workspace::ci_script())?,
    }
    Ok(())
}
