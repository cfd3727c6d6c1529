//! `examples/pool.rs` in real guests.

#[path = "../examples/pool.rs"]
#[allow(dead_code, reason = "its `main` is not run here")]
mod example;
#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::future::pending;
use std::time::Duration;

use example::Options;
use example::Summary;
use example::run;
use futures::StreamExt;
use guest::DEADLINE;
use guest::busybox_image;
use guest::config;
use image_support::Place;
use kiln::Pool;
use kiln::units::Bytes;
use serde_json::json;
use tokio::io::AsyncBufReadExt;
use tokio::io::BufReader;

async fn pool(max: usize) -> (Place, Pool) {
    let (place, image) = busybox_image(json!({})).await;
    let pool = image.pool().config(config().memory(Bytes::mib(128))).max(max).build().await.unwrap();
    (place, pool)
}

#[tokio::test]
async fn each_snippet_has_a_vm_of_its_own_and_its_end_is_told() {
    let (_place, pool) = pool(3).await;
    let mut snippets = vec!["echo broken >&2; exit 3", "while :; do :; done", "kill -TERM $$", "printf 'no newline'"];
    // Each would find what another left.
    snippets.extend(["ls /tmp; echo x > /tmp/x"; 6]);
    let snippets = futures::stream::iter(snippets).map(str::to_owned);
    let mut out = Vec::new();
    let summary = run(&pool, snippets, 3, Duration::from_secs(2), pending(), &mut out).await.unwrap();
    let out = String::from_utf8(out).unwrap();
    assert_eq!(summary, Summary { succeeded: 7, failed: 3, interrupted: false }, "{out}");
    // Without the times that they took, and in their order.
    let mut blocks: Vec<String> = Vec::new();
    for line in out.lines() {
        match (line.strip_prefix('['), blocks.last_mut()) {
            (Some(_), _) => blocks.push(line.rsplit_once(" (").expect("a time").0.to_owned()),
            (None, Some(block)) => *block += &format!("\n{line}"),
            (None, None) => panic!("{out}"),
        }
    }
    blocks.sort_unstable();
    let mut expected = vec![
        "[0] echo broken >&2; exit 3: exit status: 3\nbroken".to_owned(),
        "[1] while :; do :; done: not done in time".to_owned(),
        "[2] kill -TERM $$: signal: 15 (SIGTERM)".to_owned(),
        "[3] printf 'no newline': exit status: 0\nno newline".to_owned(),
    ];
    expected.extend((4..10).map(|index| format!("[{index}] ls /tmp; echo x > /tmp/x: exit status: 0")));
    assert_eq!(blocks, expected);
    assert_eq!(pool.stats().handed_out, 10);
}

#[tokio::test]
async fn results_come_while_others_run_and_an_interrupt_ends_them_all() {
    let (_place, pool) = pool(2).await;
    let snippets = ["sleep 1000", "echo done", "sleep 1000", "sleep 1000"].map(str::to_owned);
    let (seen, out) = tokio::io::duplex(1 << 10);
    let interrupted = tokio::sync::Notify::new();
    let long = Duration::from_secs(1000);
    let running = run(&pool, futures::stream::iter(snippets), 2, long, interrupted.notified(), out);
    let watching = async {
        let mut lines = BufReader::new(seen).lines();
        assert!(lines.next_line().await.unwrap().unwrap().starts_with("[1] echo done: exit status: 0"));
        assert_eq!(lines.next_line().await.unwrap().unwrap(), "done");
        interrupted.notify_one();
    };
    let both = async { tokio::join!(running, watching).0 };
    let summary = tokio::time::timeout(DEADLINE, both).await.expect("it is interrupted").unwrap();
    assert_eq!(summary, Summary { succeeded: 1, failed: 0, interrupted: true });
    assert_eq!((pool.stats().in_use, pool.stats().waiting), (0, 0));
    tokio::time::timeout(DEADLINE, pool.shutdown()).await.expect("nobody has a VM");
}

#[tokio::test]
async fn a_snippet_without_a_vm_is_told_and_the_others_go_on() {
    let (_place, pool) = pool(1).await;
    pool.shutdown().await;
    let snippets = futures::stream::iter(["true", "false"]).map(str::to_owned);
    let mut out = Vec::new();
    let summary = run(&pool, snippets, 1, DEADLINE, pending(), &mut out).await.unwrap();
    assert_eq!(summary, Summary { succeeded: 0, failed: 2, interrupted: false });
    let out = String::from_utf8(out).unwrap();
    assert!(out.starts_with("[0] true: no VM: the pool is closed ("), "{out}");
}

#[test]
fn arguments() {
    let parse = |line: &str| Options::parse(line.split(' ').map(str::to_owned));
    let options = |max, seconds, snippets: &[&str]| Options {
        max,
        timeout: Duration::from_secs(seconds),
        image: "alpine".to_owned(),
        snippets: snippets.iter().map(|snippet| (*snippet).to_owned()).collect(),
    };
    assert_eq!(parse("alpine"), Some(options(4, 10, &[])));
    assert_eq!(parse("--max 9 --timeout 3 alpine ls --max"), Some(options(9, 3, &["ls", "--max"])));
    for wrong in
        ["", "--max", "--max 0 alpine", "--max 3", "--timeout -1 alpine", "--timeout x alpine", "--other alpine"]
    {
        assert_eq!(parse(wrong).filter(|options| !options.image.is_empty()), None, "{wrong}");
    }
}
