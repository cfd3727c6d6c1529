//! What a long operation is doing, as a stream of events.
//!
//! The operation never waits for whoever watches it: what is not taken in time is overtaken. Of the events that count
//! bytes only the latest for each layer is kept, so what waits is bounded by the number of layers.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;

use futures::Stream;

use crate::image::digest::Digest;

/// A step on the way from a reference to a guest that can be restored.
///
/// A layer is named by the digest of its blob. Events of different layers interleave.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgressEvent {
    /// The source is being asked which image the reference means.
    Resolving {
        /// The reference, or the path of a layout or archive.
        reference: String,
    },
    /// The image is known.
    Resolved {
        /// Digest of its manifest.
        image: Digest,
        /// Its layers, lowest first, with their sizes as transported, in bytes.
        layers: Vec<(Digest, u64)>,
    },
    /// A layer is arriving, or was here already: then the first event has all of it.
    Fetching {
        /// The layer.
        layer: Digest,
        /// Bytes that are here. Less than before when a source that failed made this start again.
        done: u64,
        /// All of its bytes.
        total: u64,
    },
    /// A layer's archive is being converted, or was already.
    Unpacking {
        /// The layer.
        layer: Digest,
        /// Bytes of the blob that have been read.
        done: u64,
        /// All of its bytes.
        total: u64,
    },
    /// The layers are being joined to a root filesystem.
    Building {
        /// The image.
        image: Digest,
    },
    /// The root filesystem is there.
    Built {
        /// The image.
        image: Digest,
    },
    /// A guest boots from the image, to be kept as a snapshot.
    Booting {
        /// The image.
        image: Digest,
    },
    /// The guest's agent answers, and the caller's warm-up is at work.
    WarmingUp {
        /// The image.
        image: Digest,
    },
    /// The guest is being written to disk.
    Saving {
        /// The image.
        image: Digest,
    },
    /// The snapshot is there, or was already: guests start from it.
    Baked {
        /// The image.
        image: Digest,
    },
}

impl ProgressEvent {
    /// Whether `self` says all that `older` said.
    fn overtakes(&self, older: &Self) -> bool {
        match (self, older) {
            (Self::Fetching { layer, .. }, Self::Fetching { layer: other, .. })
            | (Self::Unpacking { layer, .. }, Self::Unpacking { layer: other, .. }) => layer == other,
            _ => false,
        }
    }
}

/// Events that are not about bytes and wait to be taken; an operation has a handful.
const MAX_WAITING: usize = 4096;

/// Where an operation reports to. Cheap to clone; the default reports to nobody.
///
/// ```
/// use kiln::image::{Image, Progress};
/// let (progress, events) = Progress::channel();
/// let builder = Image::builder("alpine").progress(progress);
/// // `events` is a `Stream`: poll it beside `builder.pull()`.
/// # drop((builder, events));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Progress {
    sender: Option<Arc<Sender>>,
}

/// The events of the operations that report to a [`Progress`]. Ends when the last clone of that is gone.
#[derive(Debug)]
#[must_use = "streams do nothing unless polled"]
pub struct ProgressEvents {
    queue: Arc<Mutex<Queue>>,
}

#[derive(Debug)]
struct Sender {
    queue: Arc<Mutex<Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<ProgressEvent>,
    is_closed: bool,
    waker: Option<Waker>,
}

impl Progress {
    /// A reporter and the stream of what it reports.
    pub fn channel() -> (Self, ProgressEvents) {
        let queue = Arc::new(Mutex::new(Queue::default()));
        let sender = Sender { queue: Arc::clone(&queue) };
        (Self { sender: Some(Arc::new(sender)) }, ProgressEvents { queue })
    }

    /// Reports `event`. Never waits.
    pub(crate) fn send(&self, event: ProgressEvent) {
        let Some(sender) = &self.sender else { return };
        let waker = lock(&sender.queue).put(event);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut queue = lock(&self.queue);
        queue.is_closed = true;
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Queue {
    fn put(&mut self, event: ProgressEvent) -> Option<Waker> {
        match self.waiting.iter_mut().find(|older| event.overtakes(older)) {
            Some(older) => *older = event,
            None => {
                if self.waiting.len() >= MAX_WAITING {
                    self.waiting.pop_front();
                }
                self.waiting.push_back(event);
            }
        }
        self.waker.take()
    }
}

/// The queue is whole whatever a panicking holder did: every change to it is one call.
fn lock(queue: &Mutex<Queue>) -> std::sync::MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream for ProgressEvents {
    type Item = ProgressEvent;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut queue = lock(&self.queue);
        match queue.waiting.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if queue.is_closed => Poll::Ready(None),
            None => {
                queue.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    fn fetching(layer: &[u8], done: u64) -> ProgressEvent {
        ProgressEvent::Fetching { layer: Digest::of(layer), done, total: 100 }
    }

    #[tokio::test]
    async fn only_the_latest_count_of_each_layer_waits() {
        let (progress, events) = Progress::channel();
        let building = ProgressEvent::Building { image: Digest::of(b"i") };
        for event in [fetching(b"a", 1), fetching(b"b", 1), building.clone(), fetching(b"a", 2), building.clone()] {
            progress.send(event);
        }
        drop(progress);
        let seen: Vec<_> = events.collect().await;
        assert_eq!(seen, [fetching(b"a", 2), fetching(b"b", 1), building.clone(), building]);
    }

    #[tokio::test]
    async fn the_stream_wakes_for_events_and_ends_with_the_last_reporter() {
        let (progress, mut events) = Progress::channel();
        let other = progress.clone();
        let reader = tokio::spawn(async move { (events.next().await, events.next().await) });
        tokio::task::yield_now().await;
        drop(progress);
        other.send(fetching(b"a", 1));
        drop(other);
        assert_eq!(reader.await.unwrap(), (Some(fetching(b"a", 1)), None));
    }

    #[test]
    fn nobody_watching_costs_nothing() {
        Progress::default().send(fetching(b"a", 1));
    }
}
