//! Does: asks for checkpoints while servers of this process run, as often as they are told to or as a table wants.

use super::snapshot::{LOOK, left, told, wanted};
use gradwire_ps::{Client, ClientSettings, Monitor, PsError, Role, ShardStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The least and the longest that one checkpoint may take.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(600));
/// Time for a shard of this process to answer.
const SHARD_PATIENCE: Duration = Duration::from_secs(2);

/// Whom to ask.
pub(crate) enum Whom {
    /// All shards, which are served here, at these addresses.
    These(Vec<String>),
    /// A cluster, by its coordinators: the process that serves shard 0 asks, so that one does. These tell what is served here.
    Cluster(Vec<String>, Vec<Monitor>),
}

/// A thread that asks, until it is dropped.
pub(crate) struct Periodic {
    asking: Arc<Mutex<Asking>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The client that asks, and whether it is all over: closing it ends what it waits for.
#[derive(Default)]
struct Asking {
    client: Option<Arc<Client>>,
    over: bool,
}

struct Asker {
    whom: Whom,
    settings: ClientSettings,
    own: Option<Duration>,
    asking: Arc<Mutex<Asking>>,
}

impl Periodic {
    /// `own`: how often whoever runs the servers wants one, beside what tables want.
    pub(crate) fn start(whom: Whom, settings: ClientSettings, own: Option<Duration>) -> Result<Self, String> {
        let (stop, stopped) = channel();
        let asking = Arc::new(Mutex::new(Asking::default()));
        let asker = Asker { whom, settings, own, asking: Arc::clone(&asking) };
        let thread = std::thread::Builder::new().name("gradwire-ps-every".to_owned());
        let thread = thread.spawn(move || asker.run(&stopped));
        let thread = thread.map_err(|error| format!("starting the thread for checkpoints: {error}"))?;
        Ok(Self { asking, stop: Some(stop), thread: Some(thread) })
    }
}

impl Asker {
    fn run(self, stopped: &Receiver<()>) {
        let (mut begun, mut every) = (Instant::now(), None);
        loop {
            let before = every;
            // Who cannot be asked now wants what it wanted.
            every = self.every().unwrap_or(before.or(self.own));
            if before.is_none() {
                // From here on this process asks: whoever did before may just have had one written.
                begun = Instant::now();
            }
            let left = every.map_or(Some(LOOK), |every| left(every, begun));
            if stopped.recv_timeout(left.unwrap_or_default().min(LOOK)) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let Some(every) = every.filter(|_| left.is_none()) else { continue };
            begun = Instant::now();
            match self.connected().and_then(|client| client.snapshot(every.clamp(PATIENCE.0, PATIENCE.1))) {
                Ok(checkpoint) => tracing::info!("{}", told(&checkpoint)),
                Err(error) => {
                    tracing::error!(%error, "no checkpoint was written");
                    // The next one begins with servers as they are by then.
                    self.locked().client.take().into_iter().for_each(|client| client.close());
                }
            }
        }
    }

    /// How often one is wanted now, if this process is to ask. Servers without a table want none: it would push out others.
    fn every(&self) -> Result<Option<Duration>, PsError> {
        let shards = match &self.whom {
            Whom::These(_) => self.connected()?.status()?,
            Whom::Cluster(_, monitors) => first_of(monitors)?,
        };
        let is_empty = shards.iter().all(|shard| shard.tables.is_empty() && shard.sparse.is_empty());
        Ok(if is_empty { None } else { wanted(&shards).into_iter().chain(self.own).min() })
    }

    fn connected(&self) -> Result<Arc<Client>, PsError> {
        if let Some(client) = &self.locked().client {
            return Ok(Arc::clone(client));
        }
        let settings = self.settings.clone();
        let client = Arc::new(match &self.whom {
            Whom::These(addresses) => Client::connect(addresses, settings)?,
            Whom::Cluster(coordinators, _) => Client::through(coordinators, settings)?,
        });
        let mut asking = self.locked();
        if asking.over {
            return Err(PsError::Closed);
        }
        asking.client = Some(Arc::clone(&client));
        Ok(client)
    }

    fn locked(&self) -> MutexGuard<'_, Asking> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shard 0, which has a part of every table, where its primary is here.
fn first_of(monitors: &[Monitor]) -> Result<Vec<ShardStatus>, PsError> {
    let silent =
        || PsError::Timeout { what: "a seat of this process to tell what it is".to_owned(), waited: SHARD_PATIENCE };
    let reports = monitors.iter().map(|monitor| monitor.report(SHARD_PATIENCE).ok_or_else(silent));
    let reports = reports.collect::<Result<Vec<_>, _>>()?;
    let leads = |status: &ShardStatus| status.standing.role == Role::Primary && status.standing.shard == 0;
    Ok(reports.into_iter().map(|report| report.status).filter(leads).collect())
}

impl Drop for Periodic {
    fn drop(&mut self) {
        self.stop = None;
        // Ends what it waits for.
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        asking.over = true;
        let client = asking.client.take();
        drop(asking);
        client.into_iter().for_each(|client| client.close());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread for checkpoints panicked");
        }
    }
}
