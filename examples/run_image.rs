//! Runs one command in an image: `cargo run --example run_image -- IMAGE COMMAND [ARGUMENT...]`.
//!
//! An image that starts with `/` is an OCI layout folder or an archive, anything else is pulled from its registry. The
//! command's output and exit code become this program's.
#![allow(clippy::print_stderr, reason = "an example talks to its terminal")]

use std::error::Error;
use std::process::ExitCode;

use kiln::Image;
use kiln::VmConfig;
use tokio::io::AsyncWriteExt;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(reference), command) = (args.next(), args.collect::<Vec<_>>()) else {
        eprintln!("usage: run_image IMAGE COMMAND [ARGUMENT...]");
        return Ok(ExitCode::from(2));
    };

    let image =
        if reference.starts_with('/') { Image::from_path(&reference).await? } else { Image::pull(&reference).await? };
    let vm = image.start(VmConfig::new()).await?;

    let mut child = vm.exec(command).await?;
    drop(child.stdin.take());
    let mut stdout = child.stdout.take().ok_or("no standard output")?;
    let mut stderr = child.stderr.take().ok_or("no standard error")?;
    let (mut our_stdout, mut our_stderr) = (tokio::io::stdout(), tokio::io::stderr());
    // Both at once: a command that fills one while nobody reads it would wait for ever.
    tokio::try_join!(tokio::io::copy(&mut stdout, &mut our_stdout), tokio::io::copy(&mut stderr, &mut our_stderr))?;
    tokio::try_join!(our_stdout.flush(), our_stderr.flush())?;
    let status = child.wait().await?;

    vm.shutdown().await?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
