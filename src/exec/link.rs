//! The way to one agent, and what is known of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OnceCell;

use crate::exec::AgentInfo;
use crate::exec::ExecError;
use crate::exec::control;
use crate::transport::Connector;

/// The way to an agent; clones share what is learnt about it.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    connector: Arc<dyn Connector>,
    info: Arc<OnceCell<Option<AgentInfo>>>,
}

impl Link {
    pub(crate) fn new(connector: Arc<dyn Connector>) -> Self {
        Self { connector, info: Arc::default() }
    }

    /// The same way, to an agent that `info` describes.
    pub(crate) fn knowing(self, info: AgentInfo) -> Self {
        Self { info: Arc::new(OnceCell::new_with(Some(Some(info)))), ..self }
    }

    pub(crate) fn connector(&self) -> &dyn Connector {
        &*self.connector
    }

    pub(crate) fn shared_connector(&self) -> Arc<dyn Connector> {
        Arc::clone(&self.connector)
    }

    /// Whether the agent confirms that a process has started; asks it the first time.
    ///
    /// # Cancel safety
    /// Cancel safe: the next caller asks.
    pub(crate) async fn tells_starts(&self, patience: Duration) -> Result<bool, ExecError> {
        let ask = async {
            match control::probe(self.connector(), patience).await {
                Ok(info) => Ok(Some(info)),
                // Whoever answers something else is worth a try as an agent that only runs processes.
                Err(ExecError::Refused { .. } | ExecError::Protocol { .. } | ExecError::BadRequest { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let info = self.info.get_or_try_init(|| ask).await?;
        Ok(info.is_some_and(|info| info.tells_starts))
    }
}
