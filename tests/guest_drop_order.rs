//! Dropping a child, its handles, the VM and the runtime, in any order: nothing waits, panics or stays.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use guest::DEADLINE;
use guest::boot;
use guest::drop_at_once;
use guest::until;
use kiln::ExecError;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

#[tokio::test]
async fn handles_outlive_the_child_and_say_so() {
    let vm = boot().await;
    let mut child = vm.exec(["cat"]).await.expect("starts");
    let (mut stdin, mut stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
    let signaller = child.signaller();
    drop_at_once(child);
    stdout.read_to_end(&mut Vec::new()).await.expect_err("cut off, which is no end of file");
    let writing = async { while stdin.write_all(&[0; 4096]).await.is_ok() {} };
    tokio::time::timeout(DEADLINE, writing).await.expect("the writer notices");
    assert!(matches!(signaller.signal(15).await, Err(ExecError::Ended)));
    until(&vm, "pidof cat || echo gone", "gone\n").await;
}

#[tokio::test]
async fn a_child_outlives_its_vm_and_ends() {
    let vm = boot().await;
    let mut child = vm.exec(["sleep", "1000"]).await.expect("starts");
    let builder = vm.exec_builder().argv(["true"]);
    let files = vm.files();
    drop_at_once(vm);
    let ended = tokio::time::timeout(DEADLINE, child.wait()).await.expect("no hang");
    assert!(matches!(ended, Err(ExecError::AgentGone(_))), "{ended:?}");
    builder.output().await.expect_err("nobody there");
    files.read("/etc/passwd").await.expect_err("nobody there");
    drop_at_once(child);
}
