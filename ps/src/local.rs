//! Does: servers within this process, each on its own thread: for notebooks, tests, and a first try.

use crate::shard::Shard;
use crate::storage::Storage;
use crate::{Checkpointing, Monitor, PsError, Server, ServerSettings, Stopper, dial};
use gradwire_transport::TransportError;
use std::net::SocketAddr;
use std::thread::JoinHandle;

/// Running servers, one a shard. They stop when this is dropped.
pub struct LocalServers {
    addresses: Vec<String>,
    running: Vec<(Stopper, JoinHandle<()>)>,
    monitors: Vec<Monitor>,
}

impl LocalServers {
    /// Starts `shards` servers. With port 0 each takes a free port; otherwise they take that port and the following ones.
    ///
    /// # Errors
    /// As [`Server::bind`]; `Invalid` for no shard, or more ports than there are.
    pub fn start(shards: u32, settings: ServerSettings) -> Result<Self, PsError> {
        let fresh = |_| Ok(Shard::new(settings.limits.clone(), dial::random()?));
        let made = (0..shards).map(fresh).collect::<Result<_, PsError>>()?;
        Self::start_with(made, &settings)
    }

    /// Starts `shards` servers with what a checkpoint holds, whatever number of shards wrote it: the named one of those that
    /// `settings.checkpoints` keep, or the latest whole one, which may be none yet. Tells its name.
    ///
    /// # Errors
    /// As [`LocalServers::start`]; `Invalid` naming the object that is missing, cut or changed.
    pub fn restore(
        shards: u32,
        settings: ServerSettings,
        name: Option<&str>,
    ) -> Result<(Self, Option<String>), PsError> {
        let bad = |what: &str, why: String| PsError::invalid(format!("restoring {what}"), why);
        let Some(kept) = &settings.checkpoints else {
            return Err(bad("a checkpoint", "say where checkpoints are kept (--checkpoint-dir)".into()));
        };
        let storage = Storage::open(&kept.place).map_err(|error| bad(&kept.place, error.to_string()))?;
        let whole = || storage.whole().map_err(|error| bad(&kept.place, error.to_string()));
        let latest = if name.is_none() { whole()?.into_iter().next() } else { None };
        let Some(name) = name.map(str::to_owned).or(latest) else {
            return Ok((Self::start(shards, settings)?, None));
        };
        let instance = |shard| dial::random().map(|instance| (shard, instance));
        let wanted = (0..shards).map(instance).collect::<Result<Vec<_>, _>>()?;
        let made = storage.read(&name, shards, &settings.limits, &wanted);
        let mut made = made.map_err(|error| bad(&name, error.to_string()))?;
        made.iter_mut().for_each(Shard::mark_restored);
        Ok((Self::start_with(made, &settings)?, Some(name)))
    }

    fn start_with(made: Vec<Shard>, settings: &ServerSettings) -> Result<Self, PsError> {
        let shards = u32::try_from(made.len()).unwrap_or(u32::MAX);
        if shards == 0 {
            return Err(PsError::invalid("starting servers", "0 shards hold nothing: ask for at least 1"));
        }
        let mut local = Self { addresses: Vec::new(), running: Vec::new(), monitors: Vec::new() };
        for (shard, mut made) in (0..).zip(made) {
            if settings.checkpoints.is_some() && settings.as_wanted {
                made.keep_checkpoints(Checkpointing::AsWanted { shard, shards });
            }
            let listen = address_of(settings.listen, shard)?;
            let mut server = Server::bind_with(ServerSettings { listen, ..settings.clone() }, made)?;
            local.addresses.push(server.address().to_string());
            let stopper = server.stopper();
            if settings.watched {
                local.monitors.push(server.monitor());
            }
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

    /// What tells of them, in the order of the shards, where they are watched.
    pub fn monitors(&self) -> &[Monitor] {
        &self.monitors
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
