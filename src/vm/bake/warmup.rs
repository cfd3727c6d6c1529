//! What a caller does with a guest once, so that every guest that is restored has it done already.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;

use crate::vm::Vm;

/// How a warm-up ends: any error is a reason.
pub type WarmupResult = Result<(), Box<dyn Error + Send + Sync>>;

/// A warm-up and the tag by which its results are known again.
#[derive(Clone)]
pub(in crate::vm) struct Warmup {
    tag: Arc<str>,
    run: Arc<dyn Fn(Arc<Vm>) -> BoxFuture<'static, WarmupResult> + Send + Sync>,
}

impl Warmup {
    pub(in crate::vm) fn new<F, R>(tag: String, run: F) -> Self
    where
        F: Fn(Arc<Vm>) -> R + Send + Sync + 'static,
        R: Future<Output = WarmupResult> + Send + 'static,
    {
        Self { tag: tag.into(), run: Arc::new(move |vm| Box::pin(run(vm))) }
    }

    pub(super) fn tag(&self) -> &str {
        &self.tag
    }

    pub(super) async fn run(&self, vm: Arc<Vm>) -> WarmupResult {
        (self.run)(vm).await
    }
}

impl fmt::Debug for Warmup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Warmup").field("tag", &self.tag).finish_non_exhaustive()
    }
}
