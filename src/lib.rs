//! Run any OCI image as a microVM, from async Rust.
//!
//! An image from a registry or from disk becomes a read-only root filesystem; a Linux kernel boots it in a virtual
//! machine of its own; commands run in it with `AsyncRead` outputs and `AsyncWrite` input. On a machine without
//! virtualization the guest runs on kiln's own software x86-64 processor ([`hv::soft`]).
//!
//! ```no_run
//! # async fn f() -> Result<(), kiln::Error> {
//! use kiln::{Image, VmConfig};
//!
//! let image = Image::pull("docker.io/library/alpine:3.20").await?;
//! let vm = image.start(VmConfig::new()).await?;
//! let out = vm.exec_builder().argv(["sh", "-c", "echo hi; exit 7"]).output().await?;
//! assert_eq!(out.stdout, b"hi\n");
//! assert_eq!(out.status.code(), Some(7));
//! # Ok(()) }
//! ```
//!
//! # Modules, from the bottom up
//!
//! | module | what it is |
//! |---|---|
//! | [`units`] | checked newtypes: sizes, guest addresses, ids |
//! | [`block`] | where a disk's bytes come from |
//! | [`mem`] | guest RAM |
//! | [`hv`] | the seam to the engines that run guest processors, and the software engine |
//! | [`engine`] | which engine runs a guest, and why not another |
//! | [`vmm`] | the machine: bus, devices, boot |
//! | [`snapshot`] | a paused machine as a folder, and machines that go on from it |
//! | [`image`] | OCI images: registry, layout folder, archive, store |
//! | [`rootfs`] | layers to a filesystem image |
//! | [`transport`] | byte streams into the guest |
//! | [`exec`] | commands in the guest, in the manner of `tokio::process` |
//! | [`files`] | files and trees in the guest |
//! | [`tcp`] | TCP ports of the guest |
//! | [`workload`] | the image's own command in the guest |
//! | [`vm`] | a VM's life |
//! | [`pool`] | VMs of one image that are ready before they are needed |
//! | [`mod@doctor`] | what this host can do for guests, what is in the way, and what helps |
//!
//! An unoptimised build of the software processor is some thirty times slower; in a program that uses kiln put
//! `[profile.dev.package.kiln] opt-level = 3` into its `Cargo.toml`.

/// The README's example, compiled as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod block;
mod blocking;
pub mod doctor;
pub mod engine;
mod error;
pub mod exec;
pub mod files;
pub mod hv;
pub mod image;
pub mod mem;
pub mod pool;
pub mod rootfs;
pub mod snapshot;
pub mod tcp;
pub mod transport;
pub mod units;
pub mod vm;
pub mod vmm;
pub mod workload;

pub use doctor::doctor;
pub use engine::Engine;
pub use error::Error;
pub use exec::{ExecBuilder, ExecChild, ExecError, ExecEvent, ExecEvents, ExecExit, ExecOutcome, ExecSignaller};
pub use exec::{ExecSocket, ExecStderr, ExecStdin, ExecStdout};
pub use files::{FileError, GuestFileReader, GuestFileWriter, GuestFiles};
pub use image::{Image, ImportError, LayoutError, OciImageBuilder, PullError, PullPolicy};
pub use pool::{AcquireError, Pool, PoolBuilder, PoolError, PoolStats, PooledVm};
pub use rootfs::RootfsError;
pub use snapshot::{Snapshot, SnapshotError};
pub use tcp::{GuestTcpStream, TcpForwarder};
pub use vm::{Baked, ForkError, KeepError, ReclaimError, ShutdownError, StartError, Vm, VmConfig};
pub use workload::{Workload, WorkloadBuilder, WorkloadError, WorkloadLog, WorkloadLogs};
