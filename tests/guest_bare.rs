//! An image with one static program and nothing else: no shell, no libc, no `/etc`, no folders.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs;
use std::os::unix::process::ExitStatusExt;

use guest::BUSYBOX;
use guest::config;
use guest::image_of;
use image_support::Entry;
use image_support::LayerBlob;
use image_support::Tar;
use kiln::ExecError;
use kiln::Vm;
use serde_json::json;

/// The program's name is the applet that it is.
async fn bare(applet: &str, settings: serde_json::Value) -> Vm {
    let busybox = fs::read(BUSYBOX).expect("busybox-static is installed");
    let program = Entry { name: applet.as_bytes(), mode: 0o755, content: &busybox, ..Entry::default() };
    let layer = LayerBlob::plain(Tar::new().entry(&program).finish());
    let (_place, image) = image_of(&layer, settings).await;
    image.start(config()).await.expect("boots")
}

#[tokio::test]
async fn the_program_runs_with_streams_signals_and_terminal() {
    let vm = bare("cat", json!({})).await;
    let out = vm.exec_builder().argv(["/cat", "/proc/self/cmdline"]).output().await.expect("runs");
    assert_eq!(out.stdout, b"/cat\0/proc/self/cmdline\0");
    let mut child = vm.exec(["/cat"]).await.expect("runs");
    assert!(child.id().is_some());
    child.signal(15).await.expect("running");
    assert_eq!(child.wait().await.expect("ends").signal(), Some(15));
    let mut child = vm.exec_builder().argv(["/cat"]).tty(true).spawn().await.expect("runs");
    assert!(child.wait().await.expect("ends").success());
}

#[tokio::test]
async fn numbers_need_no_passwd_and_names_are_unknown() {
    let vm = bare("id", json!({"User": "1234:5678"})).await;
    let id = |exec: kiln::ExecBuilder| async move {
        let out = exec.argv(["/id"]).output().await?;
        Ok::<_, ExecError>(String::from_utf8(out.stdout).expect("text"))
    };
    assert_eq!(id(vm.exec_builder()).await.expect("runs").trim(), "uid=1234 gid=5678 groups=5678");
    assert_eq!(id(vm.exec_builder().user("42")).await.expect("runs").trim(), "uid=42 gid=0 groups=0");
    let error = id(vm.exec_builder().user("root")).await.expect_err("there is no /etc/passwd");
    assert!(matches!(error, ExecError::UnknownUser { .. }), "{error:?}");
    let error = vm.exec(["sh"]).await.expect_err("there is no shell");
    assert!(matches!(error, ExecError::NotFound { .. }), "{error:?}");
}

#[tokio::test]
async fn files_and_trees_need_no_program_of_the_image() {
    let vm = bare("cat", json!({})).await;
    vm.write_file("/note", "hello").await.expect("written");
    assert_eq!(vm.read_file("/note").await.expect("read"), b"hello");
    let host = tempfile::tempdir().expect("a folder");
    fs::create_dir_all(host.path().join("in/deep")).expect("made");
    fs::write(host.path().join("in/deep/file"), "content").expect("written");
    vm.copy_in(host.path().join("in"), "/tree").await.expect("copied in");
    let out = vm.exec_builder().argv(["/cat", "/tree/deep/file"]).output().await.expect("runs");
    assert_eq!(out.stdout, b"content");
    vm.copy_out("/tree", host.path().join("out")).await.expect("copied out");
    assert_eq!(fs::read(host.path().join("out/deep/file")).expect("there"), b"content");
}
