//! A program that nobody here wrote, doing more than a hundred different things: busybox runs one shell
//! script in the guest and on this machine, and has to print the same.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::os::unix::fs::symlink;
use std::process::Command;

use guest::BUSYBOX;
use guest::boot;
use guest::host;
use guest::show;
use tokio::io::AsyncWriteExt;

const SCRIPT: &str = include_str!("support/busybox.sh");

/// The script's output on this machine, by a processor of silicon.
fn expected() -> String {
    let folder = tempfile::tempdir().unwrap();
    let [bin, work] = ["bin", "work"].map(|name| folder.path().join(name));
    std::fs::create_dir(&bin).unwrap();
    std::fs::create_dir(&work).unwrap();
    for applet in guest::applets() {
        symlink(BUSYBOX, bin.join(applet)).unwrap();
    }
    // Commands are found nowhere but in `bin`.
    host(Command::new(BUSYBOX).args(["sh", "-c", SCRIPT]).current_dir(&work).env_clear().env("PATH", &bin))
}

#[tokio::test]
async fn a_script_of_a_hundred_commands_prints_what_it_prints_here() {
    let commands = SCRIPT.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count();
    assert!(commands > 100, "{commands}");
    let vm = boot().await;
    let script = "mkdir /scratch && cd /scratch && . /dev/stdin";
    let mut child = guest::shell(&vm, script).spawn().await.unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feeding = tokio::spawn(async move { stdin.write_all(SCRIPT.as_bytes()).await });
    let out = child.wait_with_output().await.unwrap();
    feeding.await.unwrap().unwrap();
    assert!(out.success() && !out.timed_out && out.stderr.is_empty(), "{}", show(&out));

    let here = tokio::task::spawn_blocking(expected).await.unwrap();
    let there = String::from_utf8(out.stdout).unwrap();
    for (line, (here, there)) in here.lines().zip(there.lines()).enumerate() {
        assert_eq!(there, here, "line {} of the output", line + 1);
    }
    assert_eq!(there.lines().count(), here.lines().count());
    // And it is right, not only the same: what the standard says of "abc".
    assert!(there.contains("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  -\n"));
}
