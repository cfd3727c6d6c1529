//! CONTROL actions: one question, one answer. Those that open a stream are [`crate::session`]'s.

use std::fs;

use kiln_wire::PROTOCOL;
use kiln_wire::control::Control;
use kiln_wire::control::ControlAck;
use kiln_wire::control::feature;
use kiln_wire::request::Request;

use crate::clock;
use crate::files;
use crate::refusal::Refusal;
use crate::renew::Renewal;
use crate::server::Shared;
use crate::uploads::Chunk;
use crate::workload;

/// Does what `action` asks.
pub(crate) fn act(action: Control, shared: &mut Shared) -> Result<ControlAck, Refusal> {
    match action {
        Control::Probe => return Ok(probe()),
        Control::Signal { signum, run } => return shared.workload.signal(signum, run),
        Control::WorkloadStart { argv, env, cwd, user } => {
            return workload::start(&Request { argv, env, cwd, user, ..Request::default() }, shared);
        }
        Control::WriteFile { path, data_b64, mode } => files::write(&path, &data_b64, mode)?,
        Control::ReadFile { path, max_bytes } => {
            return Ok(ControlAck { data_b64: Some(files::read(&path, max_bytes)?), ..ControlAck::done() });
        }
        Control::WriteFileChunk { path, offset, data_b64, last, token, mode } => {
            shared.uploads.add(Chunk { path, token, offset, data_b64, last, mode })?;
        }
        Control::ReadFileChunk { path, offset, len, max_bytes } => {
            let (data_b64, total_len) = files::read_chunk(&path, offset, len, max_bytes)?;
            let (data_b64, total_len) = (Some(data_b64), Some(total_len));
            return Ok(ControlAck { data_b64, total_len, ..ControlAck::done() });
        }
        Control::SyncTime { host_unix_ns } => {
            clock::set(host_unix_ns, None).map_err(|error| Refusal::system("setting the clock", &error))?;
        }
        Control::Renew { host_unix_ns, tsc, entropy_b64, hostname, machine_id } => {
            Renewal { host_unix_ns, tsc, entropy_b64, hostname, machine_id }.make(shared.owns_machine)?;
            return Ok(probe());
        }
        Control::Sync => rustix::fs::sync(),
        Control::DropVfsCaches => {
            let path = "/proc/sys/vm/drop_caches";
            fs::write(path, "3").map_err(|error| Refusal::system(path, &error))?;
        }
        _ => return Err(Refusal::new("unknown CONTROL action")),
    }
    Ok(ControlAck::done())
}

fn probe() -> ControlAck {
    let features = [feature::STARTED, feature::STREAMS, feature::WORKLOAD, feature::RENEW].map(str::to_owned).to_vec();
    ControlAck { protocol: Some(PROTOCOL), features, ..ControlAck::done() }
}
