//! Feeds this program's standard input to a shell in the guest and shows what it answers:
//! `cargo run --example exec_interactive -- IMAGE`. Ends with the input or with the shell, whose exit code it takes.
//!
//! An image that starts with `/` is an OCI layout folder, anything else is pulled from its registry.

use std::error::Error;

use kiln::Image;
use kiln::VmConfig;
use tokio::io::AsyncWriteExt;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1).ok_or("usage: exec_interactive IMAGE")?;
    let image = if name.starts_with('/') { Image::from_oci_layout(&name).await? } else { Image::pull(&name).await? };
    let vm = image.start(VmConfig::new()).await?;

    let mut shell = vm.exec(["sh"]).await?;
    let mut stdin = shell.stdin.take().ok_or("no standard input")?;
    let mut stdout = shell.stdout.take().ok_or("no standard output")?;
    let mut stderr = shell.stderr.take().ok_or("no standard error")?;
    // Beside the outputs: a shell that ends by itself reads no more of it.
    tokio::spawn(async move {
        tokio::io::copy(&mut tokio::io::stdin(), &mut stdin).await?;
        // The end of our input is the end of the shell's.
        stdin.shutdown().await
    });
    let (mut our_stdout, mut our_stderr) = (tokio::io::stdout(), tokio::io::stderr());
    tokio::try_join!(tokio::io::copy(&mut stdout, &mut our_stdout), tokio::io::copy(&mut stderr, &mut our_stderr))?;
    tokio::try_join!(our_stdout.flush(), our_stderr.flush())?;
    let status = shell.wait().await?;
    vm.shutdown().await?;
    // Returning would wait for a read of the terminal, which nothing can cancel.
    std::process::exit(status.code().unwrap_or(1))
}
