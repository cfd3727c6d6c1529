//! What the guest is for the programs in it: PID 1, mounts, the writable overlay, names; and its life
//! as the host sees it.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::time::Duration;
use std::time::Instant;

use guest::boot;
use guest::boot_with;
use guest::busybox_image;
use guest::config;
use guest::outcome;
use guest::sh;
use guest::shell;
use guest::show;
use guest::until;
use kiln::ExecError;
use kiln::units::Bytes;
use kiln::vm::VmEnd;
use serde_json::json;
use tokio::io::AsyncReadExt;

#[tokio::test]
async fn a_linux_kernel_with_the_agent_as_pid_1() {
    let vm = boot().await;
    assert!(sh(&vm, "uname -sm").await == "Linux x86_64\n");
    assert_eq!(sh(&vm, "cat /proc/1/comm; grep ^PPid /proc/1/status").await, "init\nPPid:\t0\n");
    let memory = sh(&vm, "awk '/^MemTotal/ {print $2}' /proc/meminfo").await;
    let kib: u64 = memory.trim().parse().unwrap();
    assert!((200 << 10..256 << 10).contains(&kib), "{kib} KiB of 256 MiB");
    assert_eq!(sh(&vm, "nproc").await, "1\n");
}

#[tokio::test]
async fn orphans_are_reaped() {
    let vm = boot().await;
    // Each of them loses its parent, and then ends.
    let orphans = "for i in $(seq 20); do (sleep 0.05 > /dev/null 2>&1 &); done; (exit 3); true";
    sh(&vm, orphans).await;
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
    // The reader's own children are not yet waited for when it looks, but it has none: a shell's built-ins.
    let zombies = "for f in /proc/[0-9]*/status; do while read -r key value rest; do \
                   [ $key = State: ] && [ $value = Z ] && echo $f; done < $f; done; true";
    assert_eq!(outcome(&vm, zombies).await.stdout, b"");
}

#[tokio::test]
async fn the_kernels_file_systems_are_mounted() {
    let vm = boot().await;
    let types = sh(
        &vm,
        "for d in / /proc /sys /dev /dev/pts /dev/shm; do \
                         awk -v d=$d '$2 == d {t = $3} END {print d, t}' /proc/mounts; done",
    )
    .await;
    assert_eq!(types, "/ overlay\n/proc proc\n/sys sysfs\n/dev devtmpfs\n/dev/pts devpts\n/dev/shm tmpfs\n");
    assert_eq!(sh(&vm, "echo lost > /dev/null; head -c 5 /dev/zero | od -An -tx1").await, " 00 00 00 00 00\n");
    assert_eq!(sh(&vm, "head -c 1000 /dev/urandom | wc -c; echo x > /dev/shm/x; cat /dev/shm/x").await, "1000\nx\n");
    assert_eq!(sh(&vm, "stat -c %a /tmp /dev/shm").await, "1777\n1777\n");
    assert_eq!(sh(&vm, "ls -d /sys/block/vda; cat /dev/fd/0 < /dev/null").await, "/sys/block/vda\n");
}

#[tokio::test]
async fn names_are_the_configured_ones() {
    let config = config().hostname("kiln-test").resolv_conf("nameserver 192.0.2.7\n");
    let vm = boot_with(json!({}), config).await;
    assert_eq!(sh(&vm, "hostname; cat /proc/sys/kernel/hostname").await, "kiln-test\nkiln-test\n");
    assert_eq!(sh(&vm, "cat /etc/resolv.conf").await, "nameserver 192.0.2.7\n");
    assert!(sh(&vm, "cat /etc/hosts").await.contains("kiln-test"));
    assert_eq!(sh(&vm, "ping -c 1 127.0.0.1 > /dev/null && echo loopback").await, "loopback\n");
}

#[tokio::test]
async fn the_overlay_is_writable_limited_and_gone_with_the_vm() {
    let (_place, image) = busybox_image(json!({})).await;
    let vm = image.start(config().overlay_size(Bytes::mib(8))).await.unwrap();
    let write = "echo new > /etc/new; echo more >> /etc/passwd; rm /bin/yes; mv /etc/group /etc/moved; mkdir -p /a/b; \
                 ln -s /etc/new /a/b/link; cat /a/b/link; tail -n 1 /etc/passwd; ls /bin/yes /etc/group 2>/dev/null | wc -l";
    assert_eq!(sh(&vm, write).await, "new\nmore\n0\n");
    let out = outcome(&vm, "dd if=/dev/zero of=/big bs=1M count=16").await;
    assert!(!out.success() && show(&out).contains("No space left on device"), "{}", show(&out));
    let written: u64 = sh(&vm, "stat -c %s /big").await.trim().parse().unwrap();
    assert!((6 << 20..=8 << 20).contains(&written), "{written} bytes of 8 MiB");
    // Full is not broken.
    assert_eq!(sh(&vm, "rm /big; echo again > /again; cat /again").await, "again\n");
    vm.shutdown().await.unwrap();

    let vm = image.start(config()).await.unwrap();
    let names = "tail -n 1 /etc/passwd | cut -d: -f1; ls -d /etc/new /a /again 2> /dev/null; ls /bin/yes /etc/group";
    assert_eq!(sh(&vm, names).await, "guest\n/bin/yes\n/etc/group\n");
}

#[tokio::test]
async fn two_vms_know_nothing_of_each_other() {
    let (_place, image) = busybox_image(json!({})).await;
    let (one, two) =
        tokio::try_join!(image.start(config().hostname("one")), image.start(config().hostname("two"))).unwrap();
    tokio::join!(sh(&one, "echo 1 > /mine"), sh(&two, "echo 2 > /mine"));
    let (first, second) = tokio::join!(sh(&one, "hostname; cat /mine"), sh(&two, "hostname; cat /mine"));
    assert_eq!((first.as_str(), second.as_str()), ("one\n1\n", "two\n2\n"));
    one.shutdown().await.unwrap();
    assert!(matches!(one.wait().await, VmEnd::Stopped));
    assert_eq!(sh(&two, "cat /mine").await, "2\n");
}

#[tokio::test]
async fn dropping_a_vm_with_a_busy_guest_does_not_wait_and_ends_its_commands() {
    let vm = boot().await;
    let mut child = vm.exec(["sh", "-c", "echo up; while :; do :; done"]).await.unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).await.unwrap();
    let began = Instant::now();
    drop(vm);
    assert!(began.elapsed() < Duration::from_millis(100), "the drop took {:?}", began.elapsed());
    let end = tokio::time::timeout(Duration::from_secs(10), child.wait()).await.expect("the command's end is told");
    assert!(matches!(end, Err(ExecError::AgentGone(_))), "{end:?}");
}

#[tokio::test]
async fn a_vm_shut_down_says_so_and_takes_no_commands() {
    let vm = boot().await;
    let running = shell(&vm, "sleep 1000").spawn().await.unwrap();
    vm.shutdown().await.unwrap();
    vm.shutdown().await.unwrap();
    assert!(matches!(vm.wait().await, VmEnd::Stopped));
    let end = tokio::time::timeout(Duration::from_secs(10), running.wait_with_output()).await.unwrap();
    assert!(matches!(end, Err(ExecError::AgentGone(_))), "{end:?}");
    let refused = tokio::time::timeout(Duration::from_secs(10), vm.exec(["true"])).await.unwrap();
    assert!(matches!(refused, Err(ExecError::Connect(_) | ExecError::AgentGone(_))), "{refused:?}");
}

#[tokio::test]
async fn a_guest_that_reboots_has_ended() {
    let vm = boot().await;
    let out = shell(&vm, "exec reboot -f").output().await;
    assert!(matches!(out, Err(ExecError::AgentGone(_))), "{out:?}");
    let end = tokio::time::timeout(Duration::from_secs(10), vm.wait()).await.unwrap();
    assert!(matches!(end, VmEnd::Shutdown), "{end:?}");
}
