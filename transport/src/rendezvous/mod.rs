//! How processes that know nothing of each other meet: a store that all can reach, where each leaves its addresses.

mod file;
mod interfaces;
mod memory;
mod record;
pub(crate) mod requests;
mod tcp_store;
mod url;

pub use file::FileStore;
pub use interfaces::{InterfaceFilter, addresses, routed_address};
pub use memory::MemoryStore;
pub use record::{HostIdentity, Record};
pub use tcp_store::TcpStore;
pub use url::open_store;

use crate::TransportError;
use std::time::Instant;

/// A place where processes leave short values for each other. PyTorch's stores are wrapped into this by the bindings.
pub trait Store: Send + Sync {
    /// Leaves `value` under `key`, in place of what was there.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), TransportError>;

    /// Waits until there is a value under `key`, and reads it.
    ///
    /// # Errors
    /// `Timeout` at the deadline, naming the key and where it was looked for.
    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, TransportError>;
}

/// Longest key and value that our own stores take.
pub(crate) const MAX_KEY_BYTES: usize = 1024;
pub(crate) const MAX_VALUE_BYTES: usize = 1 << 20;

pub(crate) fn timeout(what: String, began: Instant) -> TransportError {
    TransportError::Timeout { what, waited: began.elapsed() }
}
