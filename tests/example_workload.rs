//! `examples/workload.rs` in a real guest.

#[path = "../examples/workload.rs"]
#[allow(dead_code, reason = "its `main` is not run here")]
mod example;
#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::future::pending;
use std::future::ready;

use example::code;
use example::run;
use guest::boot_with;
use guest::config;
use serde_json::json;
use tokio::io::AsyncReadExt;

#[tokio::test]
async fn it_prints_what_the_command_prints_and_passes_its_code_on() {
    let command = json!({ "Entrypoint": ["sh", "-c"], "Cmd": ["echo out; echo err >&2; exit 7"] });
    let vm = boot_with(command, config()).await;
    let workload = vm.workload().start().await.unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let exit = run(&workload, pending(), &mut out, &mut err).await.unwrap();
    assert_eq!((code(&exit), &out[..], &err[..]), (7, &b"out\n"[..], &b"err\n"[..]));

    let workload = vm.workload().argv(["sleep", "1000"]).start().await.unwrap();
    let exit = run(&workload, ready(()), &mut out, &mut err).await.unwrap();
    assert_eq!(code(&exit), 128 + 15);
}

#[tokio::test]
async fn an_interrupt_stops_it_with_the_images_signal_and_its_last_words_are_printed() {
    let script = "trap 'echo bye; exit 5' QUIT; echo up; while :; do sleep 0.01; done";
    let vm = boot_with(json!({ "Cmd": ["sh", "-c", script], "StopSignal": "QUIT" }), config()).await;
    let workload = vm.workload().start().await.unwrap();
    let (mut seen, out) = tokio::io::duplex(1 << 10);
    let (mut shown, interrupted) = ([0; 3], tokio::sync::Notify::new());
    let running = run(&workload, interrupted.notified(), out, tokio::io::sink());
    let watching = async {
        seen.read_exact(&mut shown).await.unwrap();
        interrupted.notify_one();
        let mut rest = String::new();
        seen.read_to_string(&mut rest).await.unwrap();
        rest
    };
    let (exit, rest) = tokio::join!(running, watching);
    assert_eq!((code(&exit.unwrap()), &shown, &rest[..]), (5, b"up\n", "bye\n"));
}
