//! VMs of one image that are ready before they are needed.
//!
//! ```text
//!   Image + VmConfig --PoolBuilder--> Pool --acquire--> PooledVm --drop--> stopped, and a fresh one made
//! ```
//! A pool keeps [`min`](PoolBuilder::min) VMs, idle or in use, and makes more while users wait, up to
//! [`max`](PoolBuilder::max). VMs that are being stopped count until they have stopped, so `max` bounds the memory.
//! Users are served in the order of their coming. A VM that has ended, whatever ended it, is handed to nobody: the idle
//! ones are watched, and looked at once more when they are handed out. What a start fails with is told to the user who
//! has waited the longest; when nobody waits, the pool tries again after a rest, which doubles from 100 ms to 10 s.

mod backoff;
mod builder;
mod core;
mod driver;
mod error;
mod lease;
mod resource;
mod state;
mod stats;
#[cfg(test)]
mod tests;

pub use builder::PoolBuilder;
pub use error::{AcquireError, PoolError};
pub use stats::PoolStats;

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use crate::vm::Vm;
use core::Core;
use core::Refusal;
use lease::Lease;

/// VMs of one image; cheap to clone, and all clones are the same pool. [`Image::pool`](crate::Image::pool) makes one.
///
/// # Dropping
/// Dropping the last clone closes the pool and waits for nothing: idle VMs are stopped, those in use stay with their
/// users until they are dropped. [`shutdown`](Self::shutdown) waits.
///
/// # Examples
/// ```no_run
/// # async fn f(image: kiln::Image) -> Result<(), kiln::Error> {
/// let pool = image.pool().min(2).max(8).build().await?;
/// let vm = pool.acquire().await?;
/// let out = vm.exec_builder().argv(["uname", "-a"]).output().await?;
/// assert!(out.success());
/// drop(vm);
/// pool.shutdown().await;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Pool {
    core: Arc<Core<Vm>>,
    acquire_timeout: Duration,
}

impl Pool {
    /// Takes an idle VM, or waits for one: in the order of asking, for at most [`PoolBuilder::acquire_timeout`], in which
    /// a VM that has to be started starts too.
    ///
    /// # Errors
    /// [`AcquireError`]: a VM did not start, time was up, or the pool is closed.
    ///
    /// # Cancel safety
    /// Cancel safe: the place in the queue is given up, and a VM that was on its way goes to the next in the queue or
    /// back to the idle ones, as fresh as it was.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(pool: kiln::Pool) -> Result<(), kiln::Error> {
    /// match pool.acquire().await {
    ///     Ok(vm) => println!("{:?}", vm.exec(["true"]).await?.wait().await?),
    ///     Err(kiln::AcquireError::Timeout { after }) => println!("all are busy, for {after:?} already"),
    ///     Err(error) => return Err(error.into()),
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn acquire(&self) -> Result<PooledVm, AcquireError> {
        match self.core.acquire().await {
            Ok(lease) => Ok(PooledVm { lease }),
            Err(Refusal::Failed(error)) => Err(AcquireError::Start(error)),
            Err(Refusal::Timeout) => Err(AcquireError::Timeout { after: self.acquire_timeout }),
            Err(Refusal::Closed) => Err(AcquireError::Closed),
        }
    }

    /// Takes an idle VM if there is one that nobody waits for; it starts none. None from a pool that is closed.
    ///
    /// # Examples
    /// ```no_run
    /// # fn f(pool: kiln::Pool) {
    /// if let Some(vm) = pool.try_acquire() {
    ///     println!("{:?}", vm.console());
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn try_acquire(&self) -> Option<PooledVm> {
        self.core.try_acquire().map(|lease| PooledVm { lease })
    }

    /// The pool at this moment, and what it has done so far.
    ///
    /// # Examples
    /// ```no_run
    /// # fn f(pool: kiln::Pool) {
    /// let stats = pool.stats();
    /// println!("{} of {} VMs are idle", stats.idle, stats.idle + stats.in_use);
    /// # }
    /// ```
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.core.stats()
    }

    /// Closes the pool and waits until each of its VMs has stopped.
    ///
    /// Whoever waits or comes later gets [`AcquireError::Closed`]; starts under way are cancelled. VMs in use are stopped
    /// when they are given back, or after [`PoolBuilder::shutdown_grace`] with their users still at them. Detached ones
    /// are the pool's no more. Of no effect, but for the waiting, when the pool is closed already.
    ///
    /// # Cancel safety
    /// Cancel safe: the pool closes all the same.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(pool: kiln::Pool) {
    /// pool.shutdown().await;
    /// assert!(matches!(pool.acquire().await, Err(kiln::AcquireError::Closed)));
    /// # }
    /// ```
    pub async fn shutdown(&self) {
        self.core.shutdown().await;
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// A [`Vm`] of a pool, with one user.
///
/// # Dropping
/// Gives the VM back. That waits for nothing and needs no runtime, also outside of tokio and after the pool's runtime has
/// ended; then the VM is just dropped. What becomes of it is the choice of [`PoolBuilder::restore_on_release`].
///
/// # Examples
/// ```no_run
/// # async fn f(pool: kiln::Pool) -> Result<(), kiln::Error> {
/// let vm = pool.acquire().await?;
/// vm.write_file("/tmp/input", "2 + 3").await?;
/// let out = vm.exec_builder().argv(["sh", "-c", "echo $(($(cat /tmp/input)))"]).output().await?;
/// assert_eq!(out.stdout, b"5\n");
/// # Ok(()) }
/// ```
pub struct PooledVm {
    lease: Lease<Vm>,
}

impl PooledVm {
    /// Takes the VM out of the pool, which makes another in its place when `min` or its users want one.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(pool: kiln::Pool) -> Result<(), kiln::Error> {
    /// let vm: kiln::Vm = pool.acquire().await?.detach();
    /// pool.shutdown().await;
    /// vm.exec(["true"]).await?; // it does not concern this one
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn detach(self) -> Vm {
        self.lease.detach()
    }

    /// Gives the VM back to be stopped, whatever [`PoolBuilder::restore_on_release`] says. Waits for nothing.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(pool: kiln::Pool) -> Result<(), kiln::Error> {
    /// let vm = pool.acquire().await?;
    /// if vm.exec_builder().argv(["make", "clean"]).output().await.is_err() {
    ///     vm.discard(); // who knows what state it is in
    /// }
    /// # Ok(()) }
    /// ```
    pub fn discard(self) {
        self.lease.discard();
    }
}

impl Deref for PooledVm {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        self.lease.get()
    }
}

impl fmt::Debug for PooledVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PooledVm").field(self.lease.get()).finish()
    }
}
