//! Work that may block, off the executor.

/// The runtime is shutting down: the work was not done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShuttingDown;

/// Runs `work` where it may block, and passes a panic of it on.
///
/// # Cancel safety
/// Dropping the future does not interrupt the work, only the wait for it.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ShuttingDown> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done),
        Err(join) => match join.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(ShuttingDown),
        },
    }
}
