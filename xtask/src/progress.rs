//! What the terminal shows while something takes long: bars and spinners there, plain lines in a log.

use std::sync::LazyLock;
use std::sync::mpsc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::MultiProgress;
use indicatif::ProgressBar;
use indicatif::ProgressStyle;

/// What is over sooner needs no progress.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a spinner moves.
const TICK: Duration = Duration::from_millis(100);

/// Every bar of this process, so that two at once do not draw over each other.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints a line above the bars.
pub(crate) fn note(text: &str) {
    BARS.suspend(|| eprintln!("{text}"));
}

/// Prints a line of the task's own output without disturbing the bars.
pub(crate) fn say(text: &str) {
    BARS.suspend(|| println!("{text}"));
}

/// A bar of `steps`, hidden where there is no terminal.
pub(crate) fn bar(steps: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is a constant");
    let bar = BARS.add(ProgressBar::new(steps).with_style(style));
    bar.enable_steady_tick(TICK);
    bar
}

/// Something that runs until this is dropped, shown once it has run for a second.
pub(crate) struct Running {
    over: Option<mpsc::Sender<()>>,
    shower: Option<JoinHandle<()>>,
}

impl Running {
    /// `what` says what is being done, for example `building the guest agent`.
    pub(crate) fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let (over, is_over) = mpsc::channel();
        let shower = thread::spawn(move || show(&what, &is_over));
        Self { over: Some(over), shower: Some(shower) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.over = None;
        // A thread that panicked has said so, and it showed progress only.
        let _ = self.shower.take().map(JoinHandle::join);
    }
}

fn show(what: &str, is_over: &mpsc::Receiver<()>) {
    if is_over.recv_timeout(PATIENCE) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}").expect("the template is a constant");
    let spinner = BARS.add(ProgressBar::new_spinner().with_style(style).with_message(what.to_owned()));
    if spinner.is_hidden() {
        note(what);
    }
    spinner.enable_steady_tick(TICK);
    // The sender never sends; it goes away.
    let _ = is_over.recv();
    spinner.finish_and_clear();
}
