//! From a machine that stands still to a VM: it goes on, and is told first what has changed since.

use std::sync::Arc;

use super::Vm;
use super::VmConfig;
use super::config::GuestRoot;
use super::error::StartError;
use super::start;
use super::template::Provenance;
use super::template::Template;
use crate::exec;
use crate::exec::AgentInfo;
use crate::exec::Renewal;
use crate::hv::soft::Soft;
use crate::image::Image;
use crate::image::run_blocking;
use crate::snapshot::Snapshot;
use crate::vmm::Frozen;
use crate::vmm::Machine;

/// Hexadecimal digits of a machine id (machine-id(5)).
const MACHINE_ID_DIGITS: usize = 32;

/// What tells a guest from others with the same memory.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    hostname: String,
    machine_id: String,
}

impl Identity {
    /// As `config` says, with a machine id that nobody has unless it names one.
    pub(super) fn of(config: &VmConfig, template: &Template) -> Result<Self, StartError> {
        let machine_id = config.machine_id.clone().map_or_else(random_machine_id, Ok)?;
        check_machine_id(&machine_id)?;
        Ok(Self { hostname: template.hostname.clone(), machine_id })
    }

    /// That of a clone: the name of its origin and a machine id that nobody has.
    pub(super) fn of_clone(template: &Template) -> Result<Self, StartError> {
        Ok(Self { hostname: template.hostname.clone(), machine_id: random_machine_id()? })
    }
}

/// Whether it is one (machine-id(5)).
pub(super) fn check_machine_id(id: &str) -> Result<(), StartError> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if id.len() == MACHINE_ID_DIGITS && id.bytes().all(is_digit) {
        return Ok(());
    }
    Err(StartError::Config("a machine id has 32 lowercase hexadecimal digits"))
}

/// 128 random bits, as systemd draws them.
fn random_machine_id() -> Result<String, StartError> {
    let mut id = [0; MACHINE_ID_DIGITS / 2];
    getrandom::fill(&mut id).map_err(|error| StartError::Host { what: "entropy", source: error.into() })?;
    Ok(hex::encode(id))
}

/// A VM from a snapshot.
///
/// # Cancel safety
/// Dropping the future stops what has been started.
pub(super) async fn snapshot(
    snapshot: &Snapshot,
    template: Arc<Template>,
    identity: &Identity,
) -> Result<Vm, StartError> {
    let machine = snapshot.restore(&*template.engine, &template.disks).await?;
    let vm = go_on(machine, template, identity).await?;
    vm.set_parent(Some(snapshot.clone()));
    Ok(vm)
}

/// A VM from a machine that was kept in memory.
///
/// # Cancel safety
/// Dropping the future stops what has been started.
pub(super) async fn frozen(frozen: &Frozen, template: Arc<Template>, identity: &Identity) -> Result<Vm, StartError> {
    let machine = frozen.restore(&*template.engine, &template.disks).await.map_err(StartError::Restore)?;
    go_on(machine, template, identity).await
}

async fn go_on(mut machine: Machine, template: Arc<Template>, identity: &Identity) -> Result<Vm, StartError> {
    machine.resume();
    let info = renew(&machine, &template, identity).await?;
    Ok(Vm::over(machine, template, info))
}

/// The one message that a restored guest gets before all others. Its answer says that the agent is alive.
async fn renew(machine: &Machine, template: &Template, identity: &Identity) -> Result<AgentInfo, StartError> {
    let renewal = Renewal::new(machine.guest_time()).hostname(&identity.hostname).machine_id(&identity.machine_id);
    let answer = exec::renew(machine.connector(), renewal, template.answer);
    start::unless_ended(machine, template.answer, answer).await
}

impl Vm {
    /// A guest that goes on from where `snapshot` was taken, with the host's time, entropy of its own, its own machine id
    /// and the configured name; returns when its agent has confirmed that. `root` must hold what the saved guest's had,
    /// which is checked: without [`GuestRoot::digest`] by reading all of it.
    ///
    /// Of `config` count the engine, name, machine id and the time until the agent must answer. All else is as it was saved.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running then.
    ///
    /// # Cancel safety
    /// Dropping the future stops what has been started.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(root: kiln::vm::GuestRoot) -> Result<(), Box<dyn std::error::Error>> {
    /// use kiln::{Vm, VmConfig, snapshot::Snapshot};
    /// let snapshot = Snapshot::open("snapshots/base".as_ref())?;
    /// let vm = Vm::restore(root, &snapshot, VmConfig::new()).await?;
    /// # Ok(()) }
    /// ```
    pub async fn restore(root: GuestRoot, from: &Snapshot, mut config: VmConfig) -> Result<Self, StartError> {
        let (found, snapshot_of) = (from.origin().clone(), from.clone());
        let (template, identity) = run_blocking(move || {
            let digest = start::root_digest(&root)?;
            snapshot_of.expect_root(&digest)?;
            let profile = &snapshot_of.state().cpu_profile;
            config.engine = config.engine.open(Some(profile), || Arc::new(Soft::new()))?.into();
            let template = Template::open(&root, &config, Provenance::known(found))?;
            let identity = Identity::of(&config, &template)?;
            Ok::<_, StartError>((template, identity))
        })
        .await?;
        snapshot(from, Arc::new(template), &identity).await
    }
}

impl Image {
    /// A guest of this image that goes on from where `snapshot` was taken; see [`Vm::restore`].
    ///
    /// # Errors
    /// [`StartError`]; [`StartError::Snapshot`] when the snapshot is of another image.
    ///
    /// # Cancel safety
    /// Dropping the future stops what has been started.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(image: kiln::Image) -> Result<(), Box<dyn std::error::Error>> {
    /// use kiln::{VmConfig, snapshot::Snapshot};
    /// let vm = image.start(VmConfig::new()).await?;
    /// vm.snapshot("snapshots/base").await?;
    /// let snapshot = Snapshot::open("snapshots/base".as_ref())?;
    /// let later = image.restore(&snapshot, VmConfig::new()).await?;
    /// # Ok(()) }
    /// ```
    pub async fn restore(&self, snapshot: &Snapshot, config: VmConfig) -> Result<Vm, StartError> {
        let root = self.root(&config).await?;
        Vm::restore(root, snapshot, self.with_engine(config, Some(snapshot.state().cpu_profile.clone())).await?).await
    }
}
