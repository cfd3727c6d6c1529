//! Terminals in a real guest: a controlling terminal, job control, sizes, end-of-file.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::os::unix::process::ExitStatusExt;

use guest::Terminal;
use guest::boot;
use guest::sh;
use guest::until;

/// An interactive shell that waits for its first command.
async fn shell(vm: &kiln::Vm) -> Terminal {
    let mut terminal = Terminal::open(vm.exec_builder().argv(["sh", "-i"]).env("PS1", "ready> ")).await;
    terminal.expect("ready> ").await;
    terminal
}

#[tokio::test]
async fn the_terminal_is_the_controlling_one_and_leads_a_session() {
    let vm = boot().await;
    let mut terminal = shell(&vm).await;
    terminal.keys("tty; echo by-name > /dev/tty; ps -o pid,sid,pgid,tty,comm | grep ' sh$'\n").await;
    terminal.expect("/dev/pts/").await;
    terminal.expect("by-name").await;
    let id = terminal.child.id().expect("the agent tells");
    terminal.expect(&format!("{id}")).await;
    terminal.keys("[ $$ = $(awk '{print $6}' /proc/$$/stat) ] && echo lea'ds'\n").await;
    terminal.expect("leads").await;
    terminal.keys("exit 5\n").await;
    assert_eq!(terminal.child.wait().await.expect("ends").code(), Some(5));
}

#[tokio::test]
async fn control_c_ends_the_foreground_job_and_not_the_shell() {
    let vm = boot().await;
    let mut terminal = shell(&vm).await;
    terminal.keys("echo beg'un'; sleep 1000\n").await;
    terminal.expect("begun").await;
    until(&vm, "pidof sleep > /dev/null && echo runs", "runs\n").await;
    terminal.keys("\u{3}").await;
    terminal.expect("ready> ").await;
    terminal.keys("echo status $?\n").await;
    terminal.expect("status 130").await;
    assert_eq!(sh(&vm, "pidof sleep || echo gone").await, "gone\n");
}

#[tokio::test]
async fn control_z_stops_a_job_that_can_be_brought_back() {
    let vm = boot().await;
    let mut terminal = shell(&vm).await;
    terminal.keys("echo beg'un'; cat\n").await;
    terminal.expect("begun").await;
    until(&vm, "pidof cat > /dev/null && echo runs", "runs\n").await;
    terminal.keys("\u{1a}").await;
    terminal.expect("Stopped").await;
    terminal.keys("echo in bet'ween'\n").await;
    terminal.expect("in between").await;
    terminal.expect("ready> ").await;
    terminal.keys("fg\n").await;
    // The shell names the job that it continues.
    terminal.expect("fg").await;
    terminal.expect("cat").await;
    terminal.keys("over here\n").await;
    // Once by the terminal's echo, once by cat.
    terminal.expect("over here").await;
    terminal.expect("over here").await;
    terminal.keys("\u{4}").await;
    terminal.expect("ready> ").await;
    terminal.keys("exit\n").await;
    assert!(terminal.child.wait().await.expect("ends").success());
}

#[tokio::test]
async fn a_new_size_is_told_to_the_foreground_job() {
    let vm = boot().await;
    let script = "trap 'stty size' WINCH; echo up; while :; do sleep 0.01; done";
    let mut terminal = Terminal::open(vm.exec_builder().argv(["sh", "-c", script])).await;
    terminal.expect("up").await;
    terminal.child.resize(132, 43).await.expect("running");
    terminal.expect("43 132").await;
    terminal.child.signaller().resize(20, 10).await.expect("running");
    terminal.expect("10 20").await;
    terminal.child.kill().await.expect("killed");
    assert_eq!(terminal.child.wait().await.expect("ended").signal(), Some(9));
}

#[tokio::test]
async fn the_end_of_input_is_an_end_of_file_on_the_terminal() {
    let vm = boot().await;
    let mut child = vm.exec_builder().argv(["cat"]).tty(true).spawn().await.expect("starts");
    assert!(child.wait().await.expect("ends").success());
}

#[tokio::test]
async fn hanging_up_ends_the_whole_session() {
    let vm = boot().await;
    let mut terminal = shell(&vm).await;
    terminal.keys("sleep 1000 &\nsleep 1001\n").await;
    until(&vm, "pidof sleep | wc -w", "2\n").await;
    drop(terminal);
    until(&vm, "pidof sleep || echo gone", "gone\n").await;
}

#[tokio::test]
async fn terminals_do_not_mix_and_are_given_back() {
    let vm = boot().await;
    let mut terminals = Vec::new();
    for index in 0..20 {
        let exec = vm.exec_builder().argv(["sh", "-c", "read word; echo \"<$word>\"; read end"]);
        terminals.push((index, Terminal::open(exec).await));
    }
    for (index, terminal) in &mut terminals {
        terminal.keys(&format!("word{index}\n")).await;
    }
    for (index, terminal) in &mut terminals {
        terminal.expect(&format!("<word{index}>")).await;
    }
    drop(terminals);
    // "ptmx" alone is left.
    until(&vm, "ls /dev/pts | wc -l", "1\n").await;
}
