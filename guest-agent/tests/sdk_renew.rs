//! An agent that is not the first process of a guest leaves the machine that it runs on alone.

mod support;

use kiln::ExecError;
use kiln::exec::Renewal;
use kiln::exec::UnixConnector;
use kiln::exec::renew;
use support::Agent;
use support::PATIENCE;

/// Linux's number for an operation that is not permitted.
const EPERM: i32 = 1;

#[tokio::test]
async fn an_ordinary_process_sets_no_clock_and_no_names() {
    let agent = Agent::start().await;
    let names = || (std::fs::read("/etc/hostname").ok(), std::fs::read("/etc/machine-id").ok());
    let before = names();
    let renewal = Renewal::new(None).hostname("somebody-else").machine_id("00112233445566778899aabbccddeeff");
    let error = renew(&UnixConnector::new(agent.socket()), renewal, PATIENCE).await.expect_err("it is no guest");
    assert!(matches!(error, ExecError::System { errno: EPERM, .. }), "{error:?}");
    assert_eq!(names(), before);
    assert_ne!(rustix::system::uname().nodename().to_bytes(), b"somebody-else");
}
