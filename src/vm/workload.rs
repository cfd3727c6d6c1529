//! A VM's workload: what [`crate::workload`] offers, with the command of the VM's own image.

use super::Vm;
use crate::workload::WorkloadBuilder;

/// What the image says about its own command.
#[derive(Clone, Debug)]
pub(super) struct ImageCommand {
    /// ENTRYPOINT and CMD.
    pub(super) argv: Vec<String>,
    /// STOPSIGNAL.
    pub(super) stop_signal: Option<u8>,
}

impl Vm {
    /// Prepares the image's own command, ENTRYPOINT and CMD, to run as the guest's workload: with its ENV, WORKDIR, USER and STOPSIGNAL.
    ///
    /// Unlike a command of [`exec_builder`](Self::exec_builder) it belongs to the guest and not to a connection: it goes on when
    /// its handle is dropped, and its logs can be read by many and from the beginning.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f() -> Result<(), kiln::Error> {
    /// let image = kiln::Image::pull("docker.io/library/nginx:1.29").await?;
    /// let vm = image.start(kiln::VmConfig::new()).await?;
    /// let nginx = vm.workload().start().await?;
    /// let web = vm.expose_tcp(8080, 80).await?;
    /// println!("http://{}/ until it ends: {}", web.local_addr(), nginx.wait().await?.status);
    /// # Ok(()) }
    /// ```
    pub fn workload(&self) -> WorkloadBuilder {
        let ImageCommand { argv, stop_signal } = self.template.command.clone();
        let workload = WorkloadBuilder::for_link(self.agent.clone()).argv(argv);
        match stop_signal {
            Some(number) => workload.stop_signal(number),
            None => workload,
        }
    }
}
