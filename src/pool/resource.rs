//! A VM as what a pool holds.

use futures::future::BoxFuture;

use super::core::Resource;
use crate::vm::StartError;
use crate::vm::Vm;

impl Resource for Vm {
    type Error = StartError;

    fn has_ended(&self) -> bool {
        self.remote().has_ended()
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        Box::pin(self.remote().ended())
    }

    fn stop(&self) -> BoxFuture<'static, ()> {
        Box::pin(self.remote().stop())
    }
}
