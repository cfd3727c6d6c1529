//! A running microVM: start it, run commands in it, stop it.
//!
//! ```text
//!   Image + VmConfig --start--> (bake, once) --> restore --> Vm --exec--> ExecChild
//!   GuestRoot + VmConfig --start--> boot ------------------> |  --snapshot--> folder --restore--> Vm
//!                                                            |  --fork--> Vms
//!                                         driver task owns the Machine
//! ```
//! A VM knows no registries and no layers: its root filesystem arrives as files. [`Image::start`] joins the two.
//!
//! [`Image::start`]: crate::image::Image::start

pub mod assets;
mod bake;
mod config;
mod driver;
mod error;
mod files;
mod fork;
mod image_start;
mod memory;
mod pause;
mod remote;
mod restore;
mod snapshot;
mod start;
mod template;
mod workload;

pub use assets::Assets;
pub use bake::{Baked, WarmupResult};
pub use config::{Agent, GuestRoot, Kernel, VmConfig};
pub use error::{ShutdownError, StartError, VmEnd};
pub use fork::ForkError;
pub use memory::ReclaimError;
pub(crate) use remote::Remote;
pub use snapshot::KeepError;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use crate::exec::AgentInfo;
use crate::exec::ExecBuilder;
use crate::exec::ExecChild;
use crate::exec::ExecError;
use crate::exec::ExecSocket;
use crate::exec::Link;
use crate::snapshot::Snapshot;
use crate::transport::Connector;
use crate::vmm::Machine;
use crate::vmm::console::Console;
use driver::DriverHandle;
use start::Sources;
use template::Template;

/// Lines of console output that an error carries.
const CONSOLE_LINES: usize = 30;
/// A processor notices that it shall stop within microseconds; this is for a host that hangs.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A running VM.
///
/// Dropping it stops the guest and does not wait for that: its memory is given back moments later.
/// [`Vm::shutdown`] waits. What the guest wrote over its image is in its memory and goes with it.
#[derive(Debug)]
pub struct Vm {
    driver: DriverHandle,
    agent: Link,
    console: Console,
    template: Arc<Template>,
    /// What a difference is taken to: the snapshot that it was restored from, or the last one taken of it.
    parent: Mutex<Option<Snapshot>>,
}

impl Vm {
    /// Boots `root` as `config` says and waits until its agent answers. Nothing is baked: see
    /// [`Image::start`](crate::image::Image::start) for that.
    ///
    /// # Errors
    /// [`StartError`], at the latest when the boot's time is up.
    ///
    /// # Cancel safety
    /// Dropping the future stops what has been started.
    pub async fn start(root: GuestRoot, config: VmConfig) -> Result<Self, StartError> {
        let guest = start::guest_config(&root, &config);
        start::boot(config, guest, move |config| {
            let sources = Sources::open(config)?;
            let provenance = start::provenance(&root, &sources)?;
            Ok((Arc::new(Template::open(&root, config, provenance)?), sources))
        })
        .await
    }

    /// A VM over a machine whose agent has answered.
    fn over(machine: Machine, template: Arc<Template>, info: AgentInfo) -> Self {
        let console = machine.console().clone();
        let agent = Link::new(Arc::new(machine.connector().clone())).knowing(info);
        Self { driver: driver::spawn(machine), agent, console, template, parent: Mutex::default() }
    }

    /// Runs `argv` in the guest, with its input and outputs to be taken from the child.
    ///
    /// # Errors
    /// [`ExecError`] when it could not be started.
    ///
    /// # Cancel safety
    /// Cancelled, the process was started or not; if it was, it is killed.
    pub async fn exec<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Result<ExecChild, ExecError> {
        self.exec_builder().argv(argv).spawn().await
    }

    /// Prepares a command to run in the guest.
    pub fn exec_builder(&self) -> ExecBuilder {
        ExecBuilder::for_link(self.agent.clone())
    }

    /// Serves the guest's agent on a Unix socket at `path`, mode 0600, for programs beside this one: until the returned value is dropped, or
    /// in vain once the guest has ended. [`ExecBuilder::new`] takes such a path.
    ///
    /// # Errors
    /// `AddrInUse` when something is at `path`; otherwise why the socket cannot be made there.
    ///
    /// # Cancel safety
    /// As [`ExecSocket::bind`].
    pub async fn exec_socket(&self, path: impl Into<PathBuf>) -> io::Result<ExecSocket> {
        ExecSocket::bind(path, self.connector()).await
    }

    /// Opens streams to the guest's vsock ports.
    #[must_use]
    pub fn connector(&self) -> Arc<dyn Connector> {
        self.agent.shared_connector()
    }

    /// What the guest's kernel and agent wrote to the serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Stops the guest, as if its power was cut, and waits until it has. Of no effect when it has ended.
    ///
    /// # Errors
    /// [`ShutdownError`] when its processor does not stop; that is a defect in the engine.
    ///
    /// # Cancel safety
    /// Cancel safe: the guest stops all the same.
    pub async fn shutdown(&self) -> Result<(), ShutdownError> {
        self.driver.stop();
        match tokio::time::timeout(STOP_TIMEOUT, self.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(ShutdownError { after: STOP_TIMEOUT }),
        }
    }

    /// Waits for the guest's end, whatever it may be. The same answer each time.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn wait(&self) -> VmEnd {
        let mut end = self.driver.end.clone();
        match end.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(end)) => end.clone(),
            // The driver's runtime was shut down around it, and the machine with it.
            _ => VmEnd::Stopped,
        }
    }

    /// Sees and causes this VM's end without keeping it alive.
    pub(crate) fn remote(&self) -> Remote {
        Remote::new(&self.driver)
    }
}
