//! `examples/parallel.rs` in a real guest.

#[path = "../examples/parallel.rs"]
#[allow(dead_code, reason = "its `main` is not run here")]
mod example;
#[path = "support/guest.rs"]
mod guest;
mod image_support;

use example::run_all;
use guest::boot;
use guest::sh;
use guest::until;
use kiln::ExecBuilder;

#[tokio::test]
async fn a_hundred_at_once_all_answer() {
    let vm = boot().await;
    let folder = tempfile::tempdir().unwrap();
    let socket = vm.exec_socket(folder.path().join("exec.sock")).await.unwrap();
    for exec in [vm.exec_builder(), ExecBuilder::new(socket.path())] {
        let lines = (0..100).map(|number| format!("echo $(({number} * {number}))")).collect();
        let summary = run_all(&exec, lines, None).await;
        assert!(summary.failures.is_empty(), "{summary:?}");
        let expected: Vec<_> = (0..100).map(|number| (number, format!("{}\n", number * number))).collect();
        assert_eq!(summary.answers, expected);
    }
}

#[tokio::test]
async fn failures_are_reported_beside_the_answers() {
    let vm = boot().await;
    let lines = ["echo fine", "echo broken >&2; exit 3", "kill -TERM $$", "echo good"].map(str::to_owned).to_vec();
    let summary = run_all(&vm.exec_builder(), lines.clone(), None).await;
    assert_eq!(summary.answers, [(0, "fine\n".to_owned()), (3, "good\n".to_owned())]);
    let [(1, exited), (2, signalled)] = &summary.failures[..] else { panic!("{summary:?}") };
    assert!(exited.contains("exit status: 3") && exited.ends_with("broken"), "{exited}");
    assert!(signalled.contains("signal: 15"), "{signalled}");
    vm.shutdown().await.unwrap();
    let summary = run_all(&vm.exec_builder(), lines, None).await;
    assert_eq!((summary.answers.len(), summary.failures.len()), (0, 4), "{summary:?}");
}

#[tokio::test]
async fn no_more_run_at_once_than_the_limit_allows() {
    let vm = boot().await;
    sh(&vm, "mkdir /tmp/running").await;
    // Each tells how many there are while it is one of them.
    let line = "touch /tmp/running/$$; sleep 0.1; ls /tmp/running | wc -l; rm /tmp/running/$$";
    let summary = run_all(&vm.exec_builder(), vec![line.to_owned(); 20], Some(3)).await;
    assert!(summary.failures.is_empty() && summary.answers.len() == 20, "{summary:?}");
    let most = summary.answers.iter().map(|(_, answer)| answer.trim().parse::<u32>().unwrap()).max();
    assert!(most > Some(1) && most <= Some(3), "{summary:?}");
}

#[tokio::test]
async fn dropping_the_run_ends_its_commands() {
    let vm = boot().await;
    {
        let exec = vm.exec_builder();
        let run = run_all(&exec, vec!["exec sleep 1000".to_owned(); 10], None);
        let all_run = until(&vm, "pidof sleep | wc -w", "10\n");
        tokio::select! { summary = run => panic!("{summary:?}"), () = all_run => {} }
    }
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
}
