//! Feeds this program's standard input, line by line, to a shell in the guest and shows what it answers:
//! `cargo run --example exec_interactive -- REFERENCE`. Ends with the input.

use std::error::Error;

use kiln::Image;
use kiln::VmConfig;
use tokio::io::AsyncWriteExt;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let reference = std::env::args().nth(1).ok_or("usage: exec_interactive REFERENCE")?;
    let vm = Image::pull(&reference).await?.start(VmConfig::new()).await?;

    let mut shell = vm.exec(["sh"]).await?;
    let mut stdin = shell.stdin.take().ok_or("no standard input")?;
    let mut stdout = shell.stdout.take().ok_or("no standard output")?;
    let mut stderr = shell.stderr.take().ok_or("no standard error")?;
    let (mut our_stdout, mut our_stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let input = async {
        tokio::io::copy(&mut tokio::io::stdin(), &mut stdin).await?;
        // The end of our input is the end of the shell's.
        stdin.shutdown().await
    };
    tokio::try_join!(
        input,
        tokio::io::copy(&mut stdout, &mut our_stdout),
        tokio::io::copy(&mut stderr, &mut our_stderr),
    )?;
    shell.wait().await?;
    vm.shutdown().await?;
    Ok(())
}
