//! Dropping the runtime with a VM and a child, in any order. One test, since the threads that it counts are those of the whole process.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::time::Duration;
use std::time::Instant;

use guest::DEADLINE;
use guest::boot;
use guest::drop_at_once;
use kiln::Vm;
use tokio::io::AsyncReadExt;
use tokio::runtime::Runtime;

/// The threads of this process that run guests.
fn vcpu_threads() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").expect("Linux").flatten();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
    names.filter(|name| name.starts_with("vcpu")).count()
}

/// In a runtime of its own, which `order` then drops with the rest.
fn with_runtime(order: fn(Runtime, Vm, kiln::ExecChild)) {
    let runtime = Runtime::new().expect("a runtime");
    let (vm, child) = runtime.block_on(async {
        let vm = boot().await;
        let mut child = vm.exec(["sh", "-c", "echo up; cat"]).await.expect("starts");
        child.stdout.as_mut().expect("piped").read_exact(&mut [0; 3]).await.expect("up");
        (vm, child)
    });
    order(runtime, vm, child);
}

#[test]
fn the_runtime_goes_first_second_or_last() {
    let orders: [fn(Runtime, Vm, kiln::ExecChild); 6] = [
        |runtime, vm, child| (drop_at_once(runtime), drop_at_once(vm), drop_at_once(child)).0,
        |runtime, vm, child| (drop_at_once(runtime), drop_at_once(child), drop_at_once(vm)).0,
        |runtime, vm, child| (drop_at_once(vm), drop_at_once(runtime), drop_at_once(child)).0,
        |runtime, vm, child| (drop_at_once(child), drop_at_once(runtime), drop_at_once(vm)).0,
        |runtime, vm, child| (drop_at_once(vm), drop_at_once(child), drop_at_once(runtime)).0,
        |runtime, vm, child| (drop_at_once(child), drop_at_once(vm), drop_at_once(runtime)).0,
    ];
    orders.into_iter().for_each(with_runtime);
    let began = Instant::now();
    while vcpu_threads() > 0 {
        assert!(began.elapsed() < DEADLINE, "guests are still running");
        std::thread::sleep(Duration::from_millis(5));
    }
}
