//! Memory that the guest has freed goes back to the host.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::Vm;
use crate::exec;
use crate::exec::Control;
use crate::exec::ExecError;
use crate::units::Bytes;
use crate::vmm::GiveBackError;

/// How long the agent may take to answer (10 s).
const ANSWER: Duration = Duration::from_secs(10);
/// How long the guest may take to give its memory back and to take it again: a gigabyte takes some two seconds.
const EXCHANGE: Duration = Duration::from_secs(60);
/// Where Linux says how much is free (proc_meminfo(5)).
const MEMINFO: &str = "/proc/meminfo";

/// Why a guest gave no memory back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReclaimError {
    /// The guest did not say how much it has free.
    #[error("asking the guest how much memory is free")]
    Agent(#[from] ExecError),
    /// It did not give it.
    #[error(transparent)]
    Balloon(#[from] GiveBackError),
}

impl Vm {
    /// Has the guest give memory back to the host that it has used and freed; it keeps all of it for later use. Returns
    /// how much that was. A snapshot that is taken next does not hold it.
    ///
    /// Snapshots, clones and pauses of the VM wait until it is done.
    ///
    /// # Errors
    /// [`ReclaimError`]; the guest has its memory then too, or will in a moment.
    ///
    /// # Cancel safety
    /// Cancelled, memory is given back or not, and is the guest's again.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// let given = vm.reclaim_memory().await?;
    /// println!("{} MiB given back", given.0 >> 20);
    /// # Ok(()) }
    /// ```
    pub async fn reclaim_memory(&self) -> Result<Bytes, ReclaimError> {
        let free = self.free_memory().await?;
        Ok(self.driver.give_memory_back(free, EXCHANGE).await?)
    }

    async fn free_memory(&self) -> Result<Bytes, ExecError> {
        let action = Control::ReadFile { path: MEMINFO.to_owned(), max_bytes: None };
        let ack = exec::control(self.agent.connector(), &action, ANSWER).await?;
        let text = ack.data_b64.and_then(|data| STANDARD.decode(data).ok()).unwrap_or_default();
        let strange = || ExecError::Protocol { detail: format!("{MEMINFO} does not say how much is free") };
        mem_free(&String::from_utf8_lossy(&text)).ok_or_else(strange)
    }
}

/// The line `MemFree: <n> kB`.
fn mem_free(meminfo: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_as_linux_writes_it() {
        let text = "MemTotal:         119340 kB\nMemFree:           91012 kB\nMemAvailable:      99 kB\n";
        assert_eq!(mem_free(text), Some(Bytes(91012 * 1024)));
        for strange in ["", "MemFree:", "MemFree: x kB", "MemFree: 1 MB", "MemFree: 99999999999999999999 kB"] {
            assert_eq!(mem_free(strange), None, "{strange}");
        }
    }
}
