//! Pools of real guests.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::time::Duration;
use std::time::Instant;

use guest::DEADLINE;
use guest::busybox_image;
use guest::sh;
use guest::shell;
use kiln::AcquireError;
use kiln::Image;
use kiln::Pool;
use kiln::PoolBuilder;
use kiln::PoolError;
use kiln::PoolStats;
use kiln::StartError;
use kiln::VmConfig;
use kiln::units::Bytes;
use kiln::vm::Kernel;
use serde_json::json;

/// Long for a user who is asked to go, short for a test in which nobody goes.
const GRACE: Duration = Duration::from_millis(200);

fn config() -> VmConfig {
    guest::config().memory(Bytes::mib(128))
}

fn pool(image: &Image) -> PoolBuilder {
    image.pool().config(config()).acquire_timeout(DEADLINE)
}

/// Waits until the pool is as `expected` says: its driver works in its own time.
async fn until(pool: &Pool, expected: impl Fn(PoolStats) -> bool) {
    let began = Instant::now();
    while !expected(pool.stats()) {
        assert!(began.elapsed() < DEADLINE, "{:?}", pool.stats());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_user_finds_nothing_of_the_one_before() {
    let (_place, image) = busybox_image(json!({})).await;
    let pool = pool(&image).min(2).max(2).build().await.unwrap();
    assert_eq!((pool.stats().idle, pool.stats().started), (2, 2));
    for _ in 0..3 {
        let vm = pool.acquire().await.unwrap();
        assert_eq!(sh(&vm, "ls /tmp; echo secret > /tmp/mine; cat /tmp/mine").await, "secret\n");
    }
    until(&pool, |stats| stats.idle == 2).await;
    assert_eq!((pool.stats().handed_out, pool.stats().discarded, pool.stats().crashed), (3, 3, 0));
    pool.shutdown().await;
    assert!(matches!(pool.acquire().await, Err(AcquireError::Closed)));
}

#[tokio::test]
async fn without_restoring_a_user_finds_what_the_one_before_left() {
    let (_place, image) = busybox_image(json!({})).await;
    let pool = pool(&image).min(1).max(1).restore_on_release(false).shutdown_grace(GRACE).build().await.unwrap();
    let vm = pool.acquire().await.unwrap();
    sh(&vm, "echo here > /tmp/mine; setsid sleep 1000 > /dev/null 2>&1 &").await;
    drop(vm);
    let vm = pool.acquire().await.unwrap();
    assert_eq!(sh(&vm, "cat /tmp/mine; pidof sleep | wc -w").await, "here\n1\n");
    vm.discard();
    let vm = pool.acquire().await.unwrap();
    assert_eq!(sh(&vm, "ls /tmp").await, "");
    let own = vm.detach();
    let vm = pool.acquire().await.unwrap();
    pool.shutdown().await;
    assert!(vm.exec(["true"]).await.is_err(), "its time was up");
    assert_eq!(sh(&own, "echo mine").await, "mine\n");
    assert_eq!(pool.stats().started, 3);
}

#[tokio::test]
async fn a_guest_that_crashed_is_replaced_and_not_handed_out() {
    let (_place, image) = busybox_image(json!({})).await;
    let pool = pool(&image).min(1).max(1).restore_on_release(false).build().await.unwrap();
    // With its user.
    let vm = pool.acquire().await.unwrap();
    let _ = shell(&vm, "reboot -f").output().await;
    tokio::time::timeout(DEADLINE, vm.wait()).await.expect("it reboots, which is its end");
    drop(vm);
    let vm = pool.acquire().await.unwrap();
    assert_eq!((sh(&vm, "echo up").await.as_str(), pool.stats().crashed), ("up\n", 1));
    // While it is idle.
    sh(&vm, "(sleep 0.3; reboot -f) > /dev/null 2>&1 &").await;
    drop(vm);
    assert_eq!(pool.stats().idle, 1);
    until(&pool, |stats| stats.crashed == 2 && stats.idle == 1).await;
    let vm = pool.try_acquire().expect("it is idle");
    assert_eq!(sh(&vm, "echo up").await, "up\n");
    // Stopped by its user.
    vm.shutdown().await.unwrap();
    drop(vm);
    let vm = pool.acquire().await.unwrap();
    assert_eq!((sh(&vm, "echo up").await.as_str(), pool.stats().crashed), ("up\n", 3));
}

#[tokio::test]
async fn two_pools_of_one_image_have_nothing_in_common() {
    let (_place, image) = busybox_image(json!({})).await;
    let pools = tokio::join!(
        pool(&image).max(2).config(config().hostname("one")).build(),
        pool(&image).max(2).config(config().hostname("two")).build(),
    );
    let (one, two) = (pools.0.unwrap(), pools.1.unwrap());
    let (first, second) = (one.acquire().await.unwrap(), two.acquire().await.unwrap());
    assert_eq!(sh(&first, "hostname; touch /tmp/mine").await, "one\n");
    assert_eq!(sh(&second, "hostname; ls /tmp").await, "two\n");
    drop(first);
    one.shutdown().await;
    assert_eq!(sh(&second, "hostname").await, "two\n");
    assert!(two.acquire().await.is_ok());
}

#[tokio::test]
async fn rules_and_starts_that_cannot_be_are_errors() {
    let (_place, image) = busybox_image(json!({})).await;
    for (min, max) in [(0, 0), (3, 2)] {
        let error = pool(&image).min(min).max(max).build().await.unwrap_err();
        assert!(matches!(error, PoolError::Limits { .. }), "{error:?}");
    }
    let broken = config().kernel(Kernel::Path("/nowhere/vmlinux".into()));
    let error = pool(&image).min(0).config(broken).build().await.unwrap_err();
    assert!(matches!(error, PoolError::Start(StartError::KernelMissing { .. })), "{error:?}");
    // What only a start finds out.
    let nobody = config().machine_id("nobody");
    let error = pool(&image).config(nobody.clone()).build().await.unwrap_err();
    assert!(matches!(error, PoolError::Start(StartError::Config(_))), "{error:?}");
    let pool = pool(&image).min(0).config(nobody).build().await.unwrap();
    for _ in 0..3 {
        let error = pool.acquire().await.unwrap_err();
        assert!(matches!(error, AcquireError::Start(StartError::Config(_))), "{error:?}");
    }
    assert_eq!((pool.stats().failed_starts, pool.stats().starting), (3, 0));
}

#[test]
fn a_guest_is_given_back_when_its_runtime_is_gone() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (pool, vm) = runtime.block_on(async {
        let (_place, image) = busybox_image(json!({})).await;
        let pool = pool(&image).build().await.unwrap();
        let vm = pool.acquire().await.unwrap();
        (pool, vm)
    });
    guest::drop_at_once(runtime);
    guest::drop_at_once(vm);
    assert!(pool.try_acquire().is_none());
    guest::drop_at_once(pool);
}
