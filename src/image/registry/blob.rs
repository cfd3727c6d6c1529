//! One blob's way from a registry into the store, in as many attempts as it takes.
//!
//! What has arrived stays when a connection breaks, and the next attempt asks for the rest. The digest is that of all
//! bytes, whichever attempt brought them.

use std::time::Duration;

use futures::StreamExt;
use oci_client::client::SizedStream;
use tokio::time::Instant;

use crate::image::error::PullError;
use crate::image::manifest::Descriptor;
use crate::image::progress::Progress;
use crate::image::progress::ProgressEvent;
use crate::image::registry::backoff::Backoff;
use crate::image::registry::failure::Cure;
use crate::image::registry::failure::Failure;
use crate::image::registry::failure::is_digest_error;
use crate::image::registry::source::Body;
use crate::image::registry::source::Source;
use crate::image::store::BlobError;
use crate::image::store::BlobWriter;
use crate::image::store::ExpectedBlob;
use crate::image::store::ImageStore;
use crate::image::store::run_blocking;

/// How much of a blob is gathered before it is hashed and written in one blocking job. Times the number of blobs that
/// are fetched at once, this bounds a pull's memory.
const WRITE_CHUNK: usize = 1 << 20;

/// A blob slower than this, on average, is a registry that keeps us waiting, in bytes a second.
pub(super) const MIN_BYTES_PER_SECOND: u64 = 32 << 10;

/// A blob to be fetched.
pub(super) struct Download<'a> {
    pub(super) source: &'a Source,
    pub(super) store: &'a ImageStore,
    /// "layer 2", "configuration"...
    pub(super) what: String,
    pub(super) blob: &'a Descriptor,
    /// Of layers only.
    pub(super) progress: Option<&'a Progress>,
}

/// What one attempt came to; the writer has what it brought.
enum Attempt {
    /// The body ended where it was to end, or short of it if the registry meant it so.
    Ended,
    Broke(Failure),
}

/// The state across attempts.
struct Course {
    backoff: Backoff,
    may_log_in: bool,
    may_restart: bool,
    /// Whether the bytes come from several answers, which may be of different content.
    is_pieced: bool,
    deadline: Instant,
}

impl Download<'_> {
    /// Fetches the blob. When an error is returned, what had been written is gone.
    pub(super) async fn run(&self) -> Result<(), PullError> {
        let limit = self.source.blob_limit(self.blob.size, MIN_BYTES_PER_SECOND);
        let mut course = Course {
            backoff: self.source.backoff(),
            may_log_in: true,
            may_restart: true,
            is_pieced: false,
            deadline: Instant::now() + limit,
        };
        let mut writer = self.create().await?;
        loop {
            let before = writer.written();
            let (back, attempt) = self.attempt(writer, course.deadline).await?;
            writer = back;
            let failure = match attempt {
                // An error after the last byte takes nothing from it.
                Attempt::Broke(failure) if writer.written() < self.blob.size => failure,
                _ => {
                    if self.finish(writer, &mut course).await? {
                        return Ok(());
                    }
                    writer = self.create().await?;
                    continue;
                }
            };
            if writer.written() >= before + WRITE_CHUNK as u64 {
                course.backoff.progressed();
            }
            writer = self.recover(writer, failure, &mut course, limit).await?;
        }
    }

    async fn create(&self) -> Result<BlobWriter, PullError> {
        self.report(0);
        let expected = ExpectedBlob { what: self.what.clone(), digest: self.blob.digest, size: self.blob.size };
        let store = self.store.clone();
        run_blocking(move || Ok(BlobWriter::create(&store, expected)?)).await
    }

    /// Gives the blob its name, if it is what it should be; false if a fresh start may make it so.
    async fn finish(&self, writer: BlobWriter, course: &mut Course) -> Result<bool, PullError> {
        match run_blocking(move || writer.finish()).await {
            Ok(()) => Ok(true),
            // A whole answer does not get better by being repeated. But several may have been of different content, and a
            // registry may have sent another part than was asked for.
            Err(BlobError::DigestMismatch { .. }) if course.is_pieced && std::mem::take(&mut course.may_restart) => {
                tracing::debug!(what = %self.what, "its parts do not fit together; once more from the start");
                course.is_pieced = false;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The writer for the next attempt, or the error when there is none.
    async fn recover(
        &self,
        writer: BlobWriter,
        failure: Failure,
        course: &mut Course,
        limit: Duration,
    ) -> Result<BlobWriter, PullError> {
        if failure.cure == Cure::Restart && std::mem::take(&mut course.may_restart) {
            discard(writer).await?;
            course.is_pieced = false;
            return self.create().await;
        }
        course.is_pieced |= writer.written() > 0;
        match self.source.cure(failure, &mut course.backoff, &mut course.may_log_in).await {
            Ok(()) => Ok(writer),
            Err(error) => {
                discard(writer).await?;
                Err(self.over(error, course.deadline, limit))
            }
        }
    }

    /// The error of a step that the whole blob's deadline cut short names that deadline.
    fn over(&self, error: PullError, deadline: Instant, limit: Duration) -> PullError {
        match error {
            PullError::Timeout { registry, what, .. } if Instant::now() >= deadline => {
                PullError::Timeout { registry, what, limit }
            }
            error => error,
        }
    }

    /// Asks for what is missing and writes what comes.
    async fn attempt(&self, mut writer: BlobWriter, deadline: Instant) -> Result<(BlobWriter, Attempt), PullError> {
        let have = writer.written();
        let (mut body, mut skip) = match self.source.open(&self.what, self.blob, have, deadline).await {
            Ok(Body::Rest(body)) => (body, 0),
            // The registry starts over: what is here already is passed over.
            Ok(Body::Whole(body)) => (body, have),
            Err(failure) => return Ok((writer, Attempt::Broke(failure))),
        };
        loop {
            let mut chunk = Vec::new();
            let end = self.gather(&mut body, &mut skip, &mut chunk, deadline).await;
            if !chunk.is_empty() {
                writer = run_blocking(move || Ok::<_, PullError>(writer.write(&chunk)?)).await?;
                self.report(writer.written());
            }
            match end {
                Ok(true) => {}
                // Without a promised length, the end may be that of the connection.
                Ok(false) if body.content_length.is_none() && writer.written() < self.blob.size => {
                    let failure = self.source.asked(&self.what).network("it ended early", Cure::Wait);
                    return Ok((writer, Attempt::Broke(failure)));
                }
                Ok(false) => return Ok((writer, Attempt::Ended)),
                Err(failure) => return Ok((writer, Attempt::Broke(failure))),
            }
        }
    }

    /// Collects the next [`WRITE_CHUNK`] bytes, after `skip`; false at the end of the body.
    async fn gather(
        &self,
        body: &mut SizedStream,
        skip: &mut u64,
        chunk: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<bool, Failure> {
        while chunk.len() < WRITE_CHUNK {
            match self.source.step(&self.what, Some(deadline), body.next()).await? {
                Some(Ok(bytes)) => {
                    let passed = usize::try_from(*skip).map_or(bytes.len(), |skip| skip.min(bytes.len()));
                    *skip -= passed as u64;
                    chunk.extend_from_slice(&bytes[passed..]);
                }
                // The writer judges by size and digest itself, and so tells a short blob from a wrong one.
                Some(Err(error)) if is_digest_error(&error) => return Ok(false),
                Some(Err(error)) => return Err(self.source.asked(&self.what).stream(error)),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn report(&self, done: u64) {
        if let Some(progress) = self.progress {
            progress.send(ProgressEvent::Fetching { layer: self.blob.digest, done, total: self.blob.size });
        }
    }
}

async fn discard(writer: BlobWriter) -> Result<(), PullError> {
    run_blocking(move || {
        writer.discard();
        Ok(())
    })
    .await
}
