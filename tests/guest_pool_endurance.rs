//! Many users of a pool who come and go as they like. Alone in its binary, because it measures the whole process.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs;
use std::time::Duration;
use std::time::Instant;

use guest::DEADLINE;
use guest::busybox_image;
use kiln::Image;
use kiln::Pool;
use kiln::units::Bytes;
use serde_json::json;
use tokio::task::JoinSet;

const USERS: u64 = 64;
const ROUNDS: u64 = 10;

/// What a pool may leave behind, in KiB: the allocator keeps some of what was freed. One guest is 131072.
const MEMORY_BOUND: u64 = 24 << 10;

/// What this process holds: open files, threads, resident memory in KiB.
#[derive(Debug)]
struct Held {
    files: usize,
    threads: usize,
    memory: u64,
}

impl Held {
    fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        Self {
            files: fs::read_dir("/proc/self/fd").unwrap().count(),
            threads: fs::read_dir("/proc/self/task").unwrap().count(),
            memory: memory.trim().trim_end_matches(" kB").parse().unwrap(),
        }
    }

    fn is_back_at(&self, before: &Self) -> bool {
        self.files <= before.files && self.threads <= before.threads && self.memory <= before.memory + MEMORY_BOUND
    }
}

/// Numbers that look random and are the same each time (SplitMix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

async fn open(image: &Image) -> Pool {
    let config = guest::config().memory(Bytes::mib(128));
    image.pool().config(config).min(1).max(4).acquire_timeout(DEADLINE).build().await.unwrap()
}

/// One user: waits for a VM, does something with it or nothing, and gives it back one way or another.
async fn user(pool: Pool, mut dice: Dice) {
    let vm = pool.acquire().await.unwrap();
    match dice.below(4) {
        0 => {}
        1 => vm.discard(),
        2 => drop(vm.exec(["sleep", "1000"]).await.unwrap()),
        _ => {
            let out = vm.exec_builder().argv(["echo", "hi"]).timeout(DEADLINE).output().await.unwrap();
            assert_eq!(out.stdout, b"hi\n");
        }
    }
}

/// All users at once, most of whom lose patience at some time.
async fn round(pool: &Pool, number: u64) {
    let mut users = JoinSet::new();
    for index in 0..USERS {
        let mut dice = Dice(number * USERS + index);
        // Four of five leave, some of them before they had a turn.
        let patience = (dice.below(5) > 0).then(|| Duration::from_millis(dice.below(1500)));
        let pool = pool.clone();
        users.spawn(async move {
            let user = user(pool, dice);
            match patience {
                // Dropped wherever it is.
                Some(patience) => drop(tokio::time::timeout(patience, user).await),
                None => user.await,
            }
        });
    }
    while let Some(user) = users.join_next().await {
        user.unwrap();
    }
}

/// A pool's life from beginning to end.
async fn life(image: &Image, rounds: u64) {
    let pool = open(image).await;
    for number in 0..rounds {
        round(&pool, number).await;
    }
    let settled = |pool: &Pool| {
        let stats = pool.stats();
        stats.idle >= 1 && (stats.starting, stats.in_use, stats.stopping, stats.waiting) == (0, 0, 0, 0)
    };
    let began = Instant::now();
    while !settled(&pool) {
        assert!(began.elapsed() < DEADLINE, "{:?}", pool.stats());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let stats = pool.stats();
    assert!(stats.handed_out >= rounds * USERS / 10, "{stats:?}");
    assert_eq!(stats.started, stats.idle as u64 + stats.discarded, "{stats:?}");
    assert_eq!((stats.crashed, stats.failed_starts, stats.timed_out, stats.expired), (0, 0, 0, 0), "{stats:?}");
    pool.shutdown().await;
    let stats = pool.stats();
    assert_eq!((stats.idle, stats.starting, stats.in_use, stats.stopping), (0, 0, 0, 0), "{stats:?}");
}

#[tokio::test]
async fn users_who_come_and_go_leave_nothing_behind() {
    let (_place, image) = busybox_image(json!({})).await;
    // What a first pool leaves is the process's own: the allocator's arenas and threads that block. A second one finds
    // all of that there.
    life(&image, ROUNDS).await;
    let before = Held::now();
    life(&image, ROUNDS).await;
    let began = Instant::now();
    loop {
        let after = Held::now();
        if after.is_back_at(&before) {
            break;
        }
        assert!(began.elapsed() < DEADLINE, "{before:?} became {after:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
