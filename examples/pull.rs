//! Pulls an image, with a bar for each layer, and says what it is.
//!
//! ```sh
//! cargo run --example pull -- [OPTIONS] REFERENCE
//! ```
//! Options: `--policy always|missing|never`, `--platform linux/arm64`, `--mirror HOST`, `--plain-http`, `--ca FILE`,
//! `--store FOLDER`. Credentials are those of `docker login`.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;

use futures::Stream;
use futures::StreamExt;
use indicatif::HumanBytes;
use indicatif::MultiProgress;
use indicatif::ProgressBar;
use indicatif::ProgressDrawTarget;
use indicatif::ProgressStyle;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageStore;
use kiln::image::OciImageBuilder;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::image::PullPolicy;
use kiln::image::RegistryTransport;
use kiln::image::Tls;

const USAGE: &str = "usage: pull [--policy always|missing|never] [--platform OS/ARCH] [--mirror HOST] [--plain-http] \
                     [--ca FILE] [--store FOLDER] REFERENCE";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let builder = parse(std::env::args().skip(1)).await?;
    let (progress, events) = Progress::channel();
    let pull = pull(builder.progress(progress), events, ProgressDrawTarget::stderr());
    let image = tokio::select! {
        result = pull => result?,
        // Dropping the pull takes back what it has begun to write.
        interrupted = tokio::signal::ctrl_c() => return Err(interrupted.map_or_else(Into::into, |()| "interrupted".into())),
    };
    print!("{}", describe(&image));
    Ok(())
}

/// The pull that the arguments describe.
pub(crate) async fn parse(mut args: impl Iterator<Item = String>) -> Result<OciImageBuilder, Box<dyn Error>> {
    // The reference comes last, so what comes before it is kept until then.
    let mut options: Vec<Box<dyn FnOnce(OciImageBuilder) -> OciImageBuilder>> = Vec::new();
    while let Some(arg) = args.next() {
        if !arg.starts_with("--") {
            let builder = options.into_iter().fold(Image::builder(arg), |builder, option| option(builder));
            return if args.next().is_none() { Ok(builder) } else { Err(USAGE.into()) };
        }
        if arg == "--plain-http" {
            options.push(Box::new(|builder| builder.transport(RegistryTransport::PlainHttp)));
            continue;
        }
        let value = args.next().ok_or(USAGE)?;
        options.push(match arg.as_str() {
            "--policy" => {
                let policy = match value.as_str() {
                    "always" => PullPolicy::Always,
                    "missing" => PullPolicy::Missing,
                    "never" => PullPolicy::Never,
                    _ => return Err(USAGE.into()),
                };
                Box::new(move |builder| builder.policy(policy))
            }
            "--platform" => {
                let platform = value.parse()?;
                Box::new(move |builder| builder.platform(platform))
            }
            "--mirror" => Box::new(move |builder| builder.mirror(value)),
            "--ca" => {
                let tls = Tls::new().ca_certificate(tokio::fs::read(&value).await?);
                Box::new(move |builder| builder.transport(tls))
            }
            "--store" => {
                let store = ImageStore::open(PathBuf::from(value)).await?;
                Box::new(move |builder| builder.store(store))
            }
            _ => return Err(USAGE.into()),
        });
    }
    Err(USAGE.into())
}

/// Pulls while drawing. The events end with the pull, which owns their other end.
pub(crate) async fn pull(
    builder: OciImageBuilder,
    events: impl Stream<Item = ProgressEvent>,
    terminal: ProgressDrawTarget,
) -> Result<Image, Box<dyn Error>> {
    let (result, ()) = tokio::join!(builder.pull(), draw(events, terminal));
    result.map_err(|error| explained(&error).into())
}

async fn draw(events: impl Stream<Item = ProgressEvent>, terminal: ProgressDrawTarget) {
    let all = MultiProgress::with_draw_target(terminal);
    let style = ProgressStyle::with_template("{prefix} {bar:40} {bytes:>11} of {total_bytes:<11} {bytes_per_sec}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    let mut bars: HashMap<Digest, ProgressBar> = HashMap::new();
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            ProgressEvent::Resolving { reference } => {
                let _ = all.println(format!("resolving {reference}"));
            }
            ProgressEvent::Resolved { image, layers } => {
                let _ = all.println(format!("found {image}"));
                for (layer, size) in layers {
                    bars.entry(layer).or_insert_with(|| {
                        let bar = all.add(ProgressBar::new(size).with_style(style.clone()));
                        bar.set_prefix(layer.hex()[..12].to_owned());
                        bar
                    });
                }
            }
            ProgressEvent::Fetching { layer, done, total } => {
                if let Some(bar) = bars.get(&layer) {
                    bar.set_position(done);
                    if done == total {
                        bar.finish();
                    }
                }
            }
            _ => {}
        }
    }
    // After a failure some are not full: they stay as they are, above the message.
    bars.into_values().filter(|bar| !bar.is_finished()).for_each(|bar| bar.abandon());
}

pub(crate) fn describe(image: &Image) -> String {
    let size = image.layers().iter().map(|layer| layer.size()).sum();
    let command: Vec<_> = image.config().command().iter().map(|word| format!("{word:?}")).collect();
    format!(
        "digest    {}\nplatform  {}\ncommand   {}\nlayers    {}, {}\n",
        image.digest(),
        image.config().platform,
        command.join(" "),
        image.layers().len(),
        HumanBytes(size),
    )
}

/// The error and what caused it, in one line.
fn explained(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
