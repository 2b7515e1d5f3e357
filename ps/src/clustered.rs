//! Does: the seats of one server process in a cluster, each on its own thread: what the coordinator gives them, they serve.

use crate::control::Agent;
use crate::replica::Seat;
use crate::{Checkpointing, Monitor, PsError, Server, ServerSettings, Stopper, dial};
use gradwire_transport::TransportError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pause before a seat that could not be begun anew is tried again.
const AGAIN: Duration = Duration::from_millis(100);
/// After a life shorter than this, what ended it may well end the next one: a pause comes between.
const SHORT: Duration = Duration::from_secs(1);
/// How often it is looked whether all is handed over.
const LOOK: Duration = Duration::from_millis(20);

/// Running seats. They stop when this is dropped.
pub struct ClusterServers {
    addresses: Vec<String>,
    running: Vec<(Arc<Place>, JoinHandle<()>)>,
    monitors: Vec<Monitor>,
    /// After the seats, so that nobody hears that one has gone before it has.
    agent: Arc<Agent>,
}

/// Where one seat after the other is.
struct Place {
    stop: AtomicBool,
    now: Mutex<Option<Stopper>>,
}

impl ClusterServers {
    /// Offers `seats` seats to the coordinator at one of `coordinators`. Where it cannot be reached yet, they wait for it.
    ///
    /// `advertise`: the host by which others reach these seats, where it is not the address listened at.
    ///
    /// # Errors
    /// As [`Server::bind`]; `Invalid` for no seat, for more ports than there are, and for an address that nobody can call.
    pub fn join(
        seats: u32,
        settings: &ServerSettings,
        coordinators: Vec<String>,
        advertise: Option<&str>,
    ) -> Result<Self, PsError> {
        if seats == 0 || (settings.listen.ip().is_unspecified() && advertise.is_none()) {
            let reason =
                "it takes at least 1 seat, and an address that others can call: listen at one, or advertise one";
            return Err(PsError::invalid(format!("joining with {seats} seats at {}", settings.listen), reason));
        }
        let config = gradwire_transport::Config {
            token: settings.token.clone().filter(|token| !token.is_empty()),
            ..settings.transport.clone()
        };
        let agent = Arc::new(Agent::start(coordinators, &config)?);
        let mut servers =
            Self { addresses: Vec::new(), running: Vec::new(), monitors: Vec::new(), agent: Arc::clone(&agent) };
        for number in 0..seats {
            let mut settings = settings.clone();
            settings.listen = crate::local::address_of(settings.listen, number)?;
            let (mut server, id) = bind(&settings)?;
            settings.listen = server.address();
            let monitor = server.uncounted_monitor();
            servers.monitors.push(monitor.clone());
            let address = match advertise {
                Some(host) => format!("{host}:{}", settings.listen.port()),
                None => settings.listen.to_string(),
            };
            servers.addresses.push(address.clone());
            let place = Arc::new(Place { stop: AtomicBool::new(false), now: Mutex::new(Some(server.stopper())) });
            let life = Life { settings, address, agent: Arc::clone(&agent), place: Arc::clone(&place), monitor };
            let thread = std::thread::Builder::new().name(format!("gradwire-seat-{number}"));
            let thread = thread.spawn(move || life.run((server, id)));
            let thread = thread.map_err(|error| TransportError::io("start a seat's thread", error))?;
            servers.running.push((place, thread));
        }
        Ok(servers)
    }

    /// Where the seats listen.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// What tells of them, in that order; times and refusals only where they are watched.
    pub fn monitors(&self) -> &[Monitor] {
        &self.monitors
    }

    /// Has the coordinator hand over all shards that are served here to their backups, while they go on being served. Blocks until
    /// that is done, for `patience` at most.
    ///
    /// # Errors
    /// The shards that are still here: where there is no other server to take them, or no coordinator that answers.
    pub fn drain(&self, patience: Duration) -> Result<(), PsError> {
        let began = Instant::now();
        self.agent.withdraw();
        loop {
            let left = self.agent.parts_left();
            if left.as_ref().is_some_and(Vec::is_empty) {
                return Ok(());
            }
            let waited = began.elapsed();
            if waited >= patience {
                let what = left.map_or_else(
                    || "the coordinator to hear that this server ends; see that it runs".to_owned(),
                    |left| format!("another server to take over shards {left:?}; start one with room for them"),
                );
                return Err(PsError::Timeout { what, waited });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Stops them all and waits until they are gone.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for ClusterServers {
    fn drop(&mut self) {
        for (place, _) in &self.running {
            place.stop.store(true, Ordering::Release);
            if let Some(stopper) = &*place.now.lock().unwrap_or_else(PoisonError::into_inner) {
                stopper.stop();
            }
        }
        for (_, thread) in self.running.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a seat's thread panicked");
            }
        }
    }
}

fn bind(settings: &ServerSettings) -> Result<(Server, u64), PsError> {
    let id = dial::random()?;
    let mut limits = settings.limits.clone();
    if settings.checkpoints.is_some() && settings.as_wanted {
        // Which shard it is, the map says.
        limits.checkpoints = Checkpointing::AsWanted { shard: 0, shards: 0 };
    }
    let mut server = Server::bind_seat(settings.clone(), id, Seat::spare(id, limits))?;
    if settings.watched {
        server.count();
    }
    Ok((server, id))
}

/// One seat after the other at the same address.
struct Life {
    settings: ServerSettings,
    address: String,
    agent: Arc<Agent>,
    place: Arc<Place>,
    monitor: Monitor,
}

impl Life {
    fn run(self, first: (Server, u64)) {
        let mut next = Some(first);
        while !self.place.stop.load(Ordering::Acquire) {
            let Some((mut server, id)) = next.take().or_else(|| self.begin_anew()) else { continue };
            let began = Instant::now();
            server.join(self.agent.seat(id, self.address.clone(), server.waker()));
            server.run();
            self.agent.leave(id);
            if let Some(why) = server.over() {
                tracing::warn!(address = self.address, why, "this seat has lost its part, and begins anew without one");
                drop(server);
                while began.elapsed() < SHORT && !self.place.stop.load(Ordering::Acquire) {
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    fn begin_anew(&self) -> Option<(Server, u64)> {
        match bind(&self.settings) {
            Ok((mut server, id)) => {
                server.answer_to(&self.monitor);
                *self.place.now.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.stopper());
                Some((server, id))
            }
            Err(error) => {
                tracing::error!(address = self.address, %error, "a seat cannot begin anew yet");
                std::thread::sleep(AGAIN);
                None
            }
        }
    }
}
