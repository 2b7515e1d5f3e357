//! Does: reaches servers: the one thing that the waist leaves to each wire.

use crate::PsError;
use gradwire_transport::{Identity, PeerId, TcpWire, TransportError, Wire, home};
use std::net::ToSocketAddrs;
use std::time::Instant;

/// A wire that can call a server by its address.
pub trait Dialer: Wire {
    /// Connects to the server at `address` and makes it `peer`; blocks until the deadline at most.
    ///
    /// # Errors
    /// `Authentication`; `Unreachable`.
    fn call(&mut self, peer: PeerId, address: &str, deadline: Instant) -> Result<(), TransportError>;
}

impl Dialer for TcpWire {
    fn call(&mut self, peer: PeerId, address: &str, deadline: Instant) -> Result<(), TransportError> {
        let found = address.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        let found = found.map_err(|error| TransportError::io(format!("look up the server {address:?}"), error))?;
        self.dial(peer, None, &found, deadline)
    }
}

/// What this process tells of itself.
pub(crate) fn identity(nonce: u64) -> Identity {
    let home = home();
    Identity { rank: None, host: home.host, pid: std::process::id(), boot_id: home.boot_id, nonce }
}

/// A number that no other process draws.
pub(crate) fn random() -> Result<u64, PsError> {
    getrandom::u64().map_err(|error| {
        let source = std::io::Error::other(error.to_string());
        PsError::Transport(TransportError::io("draw a random number", source))
    })
}
