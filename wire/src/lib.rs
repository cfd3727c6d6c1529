//! The exec wire protocol between kiln and its in-guest agent, without I/O.
