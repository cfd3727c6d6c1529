//! CONTROL actions: one question, one answer, no process.

use std::fs;
use std::io;

use kiln_wire::PROTOCOL;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use rustix::time::ClockId;
use rustix::time::Timespec;

use crate::files;

/// Does what `payload` asks; the answer says whether it was done.
pub(crate) fn serve(payload: &[u8]) -> ControlAck {
    match serde_json::from_slice(payload) {
        Ok(action) => act(action).unwrap_or_else(ControlAck::refused),
        Err(error) => ControlAck::refused(format!("malformed CONTROL: {error}")),
    }
}

fn act(action: Control) -> Result<ControlAck, String> {
    let text = |error: io::Error| error.to_string();
    match action {
        Control::Probe => return Ok(ControlAck { protocol: Some(PROTOCOL), ..ControlAck::done() }),
        Control::Signal { .. } => return Err("no workload is running".to_owned()),
        Control::WriteFile { path, data_b64, mode } => files::write(&path, &data_b64, mode)?,
        Control::ReadFile { path, max_bytes } => {
            return Ok(ControlAck { data_b64: Some(files::read(&path, max_bytes)?), ..ControlAck::done() });
        }
        Control::SyncTime { host_unix_ns } => set_clock(host_unix_ns).map_err(text)?,
        Control::Sync => rustix::fs::sync(),
        Control::DropVfsCaches => fs::write("/proc/sys/vm/drop_caches", "3").map_err(text)?,
        _ => return Err("unknown CONTROL action".to_owned()),
    }
    Ok(ControlAck::done())
}

fn set_clock(unix_ns: u64) -> io::Result<()> {
    let seconds = i64::try_from(unix_ns / 1_000_000_000).map_err(|_| io::ErrorKind::InvalidInput)?;
    let nanoseconds = i64::try_from(unix_ns % 1_000_000_000).map_err(|_| io::ErrorKind::InvalidInput)?;
    let now = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Ok(rustix::time::clock_settime(ClockId::Realtime, now)?)
}
