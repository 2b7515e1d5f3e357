//! Does: servers within this process, each on its own thread: for notebooks, tests, and a first try.

use crate::{PsError, Server, ServerSettings, Stopper};
use gradwire_transport::TransportError;
use std::net::SocketAddr;
use std::thread::JoinHandle;

/// Running servers, one a shard. They stop when this is dropped.
pub struct LocalServers {
    addresses: Vec<String>,
    running: Vec<(Stopper, JoinHandle<()>)>,
}

impl LocalServers {
    /// Starts `shards` servers. With port 0 each takes a free port; otherwise they take that port and the following ones.
    ///
    /// # Errors
    /// As [`Server::bind`]; `Invalid` for no shard, or more ports than there are.
    pub fn start(shards: u32, settings: ServerSettings) -> Result<Self, PsError> {
        if shards == 0 {
            return Err(PsError::invalid("starting servers", "0 shards hold nothing: ask for at least 1"));
        }
        let mut local = Self { addresses: Vec::new(), running: Vec::new() };
        for shard in 0..shards {
            let listen = address_of(settings.listen, shard)?;
            let mut server = Server::bind(ServerSettings { listen, ..settings.clone() })?;
            local.addresses.push(server.address().to_string());
            let stopper = server.stopper();
            let thread = std::thread::Builder::new().name(format!("gradwire-ps-{shard}"));
            let thread = thread.spawn(move || server.run());
            let thread = thread.map_err(|error| TransportError::io("start a server's thread", error))?;
            local.running.push((stopper, thread));
        }
        Ok(local)
    }

    /// Where they listen, in the order of the shards: what a client connects to.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Stops one shard, as if its process had ended; the others go on.
    pub fn stop_shard(&mut self, shard: usize) {
        let (stopper, thread) = self.running.remove(shard);
        stopper.stop();
        join(thread);
    }

    /// Stops them all and waits until they are gone.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for LocalServers {
    fn drop(&mut self) {
        self.running.iter().for_each(|(stopper, _)| stopper.stop());
        self.running.drain(..).for_each(|(_, thread)| join(thread));
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a server's thread panicked");
    }
}

pub(crate) fn address_of(first: SocketAddr, shard: u32) -> Result<SocketAddr, PsError> {
    if first.port() == 0 {
        return Ok(first);
    }
    let port = u32::from(first.port()).checked_add(shard).and_then(|port| u16::try_from(port).ok());
    let reason = "it takes one port a shard, and there are no more: begin lower";
    port.map(|port| SocketAddr::new(first.ip(), port))
        .ok_or_else(|| PsError::invalid(format!("listening at {first}"), reason))
}
