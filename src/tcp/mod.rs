//! TCP ports of a running guest: connections to them, and ports of the host's that lead there.
//!
//! A connection is a stream of the exec protocol; the guest's end is a socket of the agent's on the guest's loopback interface. So a server in
//! the guest is reached without a network device, address or route, and only from here.

mod forwarder;
mod stream;

pub use forwarder::TcpForwarder;
pub use stream::GuestTcpStream;
