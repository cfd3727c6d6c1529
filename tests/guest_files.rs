//! Files and trees of a real guest: whole, streamed, copied.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;
use std::time::SystemTime;

use guest::boot;
use guest::boot_with;
use guest::config;
use guest::sh;
use guest::until;
use kiln::FileError;
use kiln::units::Bytes;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

/// Bytes in which a piece that is lost, doubled or moved shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len / 4 + 1).flat_map(|index| (index as u32).to_le_bytes()).take(len).collect()
}

#[tokio::test]
async fn whole_files_of_every_size_go_in_and_come_back() {
    let vm = boot_with(json!({}), config().overlay_size(Bytes::mib(96))).await;
    for size in [0, 1, 4096, 256 << 10, (256 << 10) + 1, 20 << 20] {
        let content = pattern(size);
        vm.write_file("/tmp/file", &content).await.expect("written");
        assert_eq!(sh(&vm, "stat -c '%s %a %U' /tmp/file").await, format!("{size} 644 root\n"));
        assert!(vm.read_file("/tmp/file").await.expect("read") == content, "{size} bytes differ");
    }
    assert_eq!(sh(&vm, "ls -A /tmp").await, "file\n", "no debris");
    vm.files().write_mode("/tmp/tool", "#!/bin/sh\necho it runs\n", 0o755).await.expect("written");
    assert_eq!(sh(&vm, "/tmp/tool").await, "it runs\n");
}

#[tokio::test]
async fn what_cannot_be_read_or_written_has_a_kind() {
    let vm = boot().await;
    let kind = |error: FileError| {
        assert!(matches!(error, FileError::Guest { .. }), "{error:?}");
        error.kind()
    };
    assert_eq!(kind(vm.read_file("/none").await.unwrap_err()), io::ErrorKind::NotFound);
    assert_eq!(kind(vm.write_file("/none/file", "x").await.unwrap_err()), io::ErrorKind::NotFound);
    assert_eq!(kind(vm.open_write("/none/file").await.map(drop).unwrap_err()), io::ErrorKind::NotFound);
    assert_eq!(kind(vm.copy_out("/none", "/tmp/none").await.unwrap_err()), io::ErrorKind::NotFound);
    assert_eq!(kind(vm.write_file("/proc/version", "x").await.unwrap_err()), io::ErrorKind::NotFound);
    vm.read_file("/etc").await.expect_err("a folder");
    sh(&vm, "mkfifo /tmp/fifo").await;
    vm.read_file("/tmp/fifo").await.expect_err("a fifo, which nobody writes to");
    vm.write_file("/tmp", "x").await.expect_err("a folder is in the way");
    let limited = vm.files().read_at_most("/bin/busybox", 1000).await.unwrap_err();
    assert!(matches!(limited, FileError::TooLarge { limit: 1000, .. }), "{limited:?}");
    // A file without end, whose size is said to be 0.
    sh(&vm, "dd if=/dev/zero of=/tmp/long bs=1M count=3 2> /dev/null").await;
    let limited = vm.files().read_at_most("/tmp/long", 3 << 20).await.expect("just fits");
    assert_eq!(limited.len(), 3 << 20);
}

#[tokio::test]
async fn streams_of_any_size_do_not_hold_up_others() {
    const SIZE: usize = 48 << 20;
    let vm = boot_with(json!({}), config().memory(Bytes::mib(384)).overlay_size(Bytes::mib(128))).await;
    let content = pattern(SIZE);
    let mut writer = vm.open_write("/tmp/large").await.expect("opened");
    for (index, piece) in content.chunks(4 << 20).enumerate() {
        writer.write_all(piece).await.expect("written");
        assert_eq!(sh(&vm, "ls /tmp/large 2> /dev/null; echo between").await, "between\n", "piece {index}");
    }
    writer.shutdown().await.expect("complete");
    assert_eq!(sh(&vm, "stat -c %s /tmp/large").await, format!("{SIZE}\n"));
    let mut reader = vm.open_read("/tmp/large").await.expect("opened");
    assert_eq!(reader.size(), SIZE as u64);
    let (mut piece, mut at, mut asked) = (vec![0; 256 << 10], 0, 0);
    loop {
        let read = reader.read(&mut piece).await.expect("read");
        if read == 0 {
            break;
        }
        assert!(piece[..read] == content[at..at + read], "the bytes from {at} differ");
        at += read;
        if at / (8 << 20) > asked {
            asked += 1;
            assert_eq!(sh(&vm, "echo between").await, "between\n");
        }
    }
    assert_eq!(at, SIZE);
}

#[tokio::test]
async fn a_file_that_is_given_up_leaves_nothing() {
    let vm = boot().await;
    vm.write_file("/tmp/file", "old").await.expect("written");
    let mut writer = vm.open_write("/tmp/file").await.expect("opened");
    writer.write_all(&pattern(1 << 20)).await.expect("written");
    until(&vm, "ls -A /tmp | wc -l", "2\n").await;
    drop(writer);
    until(&vm, "ls -A /tmp | wc -l", "1\n").await;
    assert_eq!(vm.read_file("/tmp/file").await.expect("read"), b"old");
    // Dropped at each await.
    for polls in 0..12 {
        let write = vm.write_file("/tmp/file", pattern(1 << 20));
        tokio::pin!(write);
        for _ in 0..polls {
            if futures::poll!(&mut write).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    until(&vm, "ls -A /tmp", "file\n").await;
    let size = sh(&vm, "stat -c %s /tmp/file").await;
    assert!(["3\n".to_owned(), format!("{}\n", 1 << 20)].contains(&size), "{size}");
}

/// A tree with what trees have.
fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("sub/deep")).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    fs::write(root.join("plain"), "plain").unwrap();
    fs::write(root.join("sub/big"), pattern(3 << 20)).unwrap();
    fs::write(root.join("sub/script"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(root.join("sub/script"), Permissions::from_mode(0o750)).unwrap();
    fs::hard_link(root.join("plain"), root.join("sub/deep/same")).unwrap();
    symlink("../plain", root.join("sub/link")).unwrap();
    symlink("/nowhere", root.join("dangling")).unwrap();
    let long = format!("sub/{}", "n".repeat(200));
    fs::write(root.join(long), "long").unwrap();
    let past = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    for name in ["plain", "sub/script"] {
        fs::File::options().append(true).open(root.join(name)).unwrap().set_modified(past).unwrap();
    }
    fs::set_permissions(root.join("empty"), Permissions::from_mode(0o500)).unwrap();
    fs::File::open(root.join("sub/deep")).unwrap().set_modified(past).unwrap();
}

/// Everything about a tree that a copy keeps.
fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().chain([]) {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let (mode, time) = (found.mode(), format!("{}.{:09}", found.mtime(), found.mtime_nsec()));
            if found.is_dir() {
                folders.push(path);
                lines.push(format!("{name} {mode:o} {time}"));
            } else if found.is_symlink() {
                lines.push(format!("{name} -> {}", fs::read_link(&path).unwrap().display()));
            } else {
                let same = found.nlink();
                lines.push(format!("{name} {mode:o} {time} x{same} {} bytes", fs::read(&path).unwrap().len()));
            }
        }
    }
    lines.sort();
    lines
}

#[tokio::test]
async fn a_tree_goes_in_and_comes_back_the_same() {
    let vm = boot().await;
    let host = tempfile::tempdir().unwrap();
    make_tree(&host.path().join("tree"));
    vm.copy_in(host.path().join("tree"), "/srv/tree").await.expect("copied in");
    let inside = "cd /srv/tree; stat -c '%a %U:%G %h' plain sub/script sub/deep/same empty; readlink sub/link; readlink dangling; \
                  sub/script; cmp plain sub/deep/same; stat -c %Y plain";
    let expected =
        "644 root:root 2\n750 root:root 1\n644 root:root 2\n500 root:root 2\n../plain\n/nowhere\nran\n1234567890\n";
    assert_eq!(sh(&vm, inside).await, expected);
    let copied = vm.copy_out("/srv/tree", host.path().join("back")).await.expect("copied out");
    assert_eq!(describe(&host.path().join("back")), describe(&host.path().join("tree")));
    assert_eq!(copied.skipped, 0);
    assert!(fs::read(host.path().join("back/sub/big")).unwrap() == pattern(3 << 20));
}

#[tokio::test]
async fn single_files_and_existing_folders() {
    let vm = boot().await;
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("file"), "one").unwrap();
    vm.copy_in(host.path().join("file"), "/tmp/renamed").await.expect("copied");
    vm.copy_in(host.path().join("file"), "/tmp/sub/").await.expect("copied");
    assert_eq!(sh(&vm, "cat /tmp/renamed /tmp/sub/file").await, "oneone");
    vm.copy_out("/tmp/renamed", host.path().join("again")).await.expect("copied");
    assert_eq!(fs::read(host.path().join("again")).unwrap(), b"one");
    // Into a folder that is there: merged, and what both have replaced.
    fs::create_dir(host.path().join("more")).unwrap();
    fs::write(host.path().join("more/renamed"), "two").unwrap();
    vm.copy_in(host.path().join("more"), "/tmp").await.expect("copied");
    assert_eq!(sh(&vm, "cat /tmp/renamed /tmp/sub/file").await, "twoone");
    let missing = vm.copy_in(host.path().join("none"), "/tmp/none").await.expect_err("not there");
    assert!(matches!(missing, FileError::Pack { .. }) && missing.kind() == io::ErrorKind::NotFound, "{missing:?}");
}

#[tokio::test]
async fn a_hostile_guest_writes_nowhere_else() {
    let vm = boot().await;
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("precious"), "precious").unwrap();
    symlink(host.path().join("precious"), host.path().join("way-out")).unwrap();
    sh(
        &vm,
        "mkdir /tmp/tree; cd /tmp/tree; mknod device c 1 3; mkfifo fifo; echo evil > way-out; cp /bin/busybox suid; chmod 4755 suid; \
         ln -s /etc etc",
    )
    .await;
    let copied = vm.copy_out("/tmp/tree", host.path()).await.expect("copied");
    assert_eq!(copied.skipped, 2, "a device and a fifo");
    assert_eq!(fs::read(host.path().join("precious")).unwrap(), b"precious", "the link was replaced, not followed");
    assert_eq!(fs::read(host.path().join("way-out")).unwrap(), b"evil\n");
    assert_eq!(fs::metadata(host.path().join("suid")).unwrap().mode() & 0o7777, 0o755);
    let mut options = kiln::files::UnpackOptions::host();
    options.max_bytes = 1000;
    let limited = vm.files().copy_out_with("/tmp/tree", host.path().join("small"), options).await;
    let limited = limited.expect_err("busybox is larger");
    assert_eq!(limited.kind(), io::ErrorKind::QuotaExceeded, "{limited:?}");
}

#[tokio::test]
async fn the_whole_root_comes_out_without_what_the_kernel_makes_up() {
    let vm = boot().await;
    sh(&vm, "mkdir -p /srv/own; echo mine > /srv/own/file").await;
    let host = tempfile::tempdir().unwrap();
    vm.copy_out("/", host.path()).await.expect("copied");
    assert_eq!(fs::read(host.path().join("srv/own/file")).unwrap(), b"mine\n");
    assert!(fs::read(host.path().join("bin/busybox")).unwrap() == fs::read(guest::BUSYBOX).unwrap());
    for made_up in ["proc", "sys"] {
        assert_eq!(fs::read_dir(host.path().join(made_up)).unwrap().count(), 0, "{made_up}");
    }
}

#[tokio::test]
async fn a_copy_that_is_given_up_ends_in_the_guest_too() {
    let vm = boot().await;
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("large"), pattern(16 << 20)).unwrap();
    let helpers = "ps -o args | grep -c '[-]-unpack\\|[-]-pack'; true";
    for polls in [1, 3, 10, 30] {
        let copy = vm.copy_in(host.path(), "/tmp/tree");
        tokio::pin!(copy);
        for _ in 0..polls {
            if futures::poll!(&mut copy).is_ready() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    until(&vm, helpers, "0\n").await;
    vm.copy_in(host.path(), "/tmp/tree").await.expect("copied");
    assert_eq!(sh(&vm, "wc -c < /tmp/tree/large").await, format!("{}\n", 16 << 20));
}

#[tokio::test]
async fn a_guest_that_dies_ends_every_transfer() {
    let vm = boot().await;
    sh(&vm, "dd if=/dev/zero of=/tmp/file bs=1M count=32 2> /dev/null").await;
    let mut reader = vm.open_read("/tmp/file").await.expect("opened");
    let mut writer = vm.open_write("/tmp/other").await.expect("opened");
    reader.read_exact(&mut [0; 1000]).await.expect("read");
    writer.write_all(b"some").await.expect("written");
    vm.shutdown().await.expect("stopped");
    let ended = tokio::time::timeout(guest::DEADLINE, async {
        reader.read_to_end(&mut Vec::new()).await.expect_err("cut off");
        writer.shutdown().await.expect_err("not complete");
    });
    ended.await.expect("no hang");
    let error = vm.read_file("/tmp/file").await.expect_err("gone");
    assert!(matches!(
        error,
        FileError::Guest { source: kiln::ExecError::Connect(_) | kiln::ExecError::AgentGone(_), .. }
    ));
}
