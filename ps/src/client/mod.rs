//! Does: a client of a parameter server: connects to its shards and makes calls on tables.

mod clip;
mod driver;
mod ending;
mod engine;
mod lane;
mod pending;
mod posting;
mod reach;
mod recovering;
mod snapshot;
mod sparse;
mod squeeze;
mod table;

pub use pending::{Done, OnDone, Pending};
pub use snapshot::Checkpoint;
pub use sparse::{SparseOptions, SparseTable};
pub use table::{DenseTable, TableOptions};

use crate::control::Directory;
use crate::dial::{self, Dialer};
use crate::header::{Header, Kind};
use crate::key::TableId;
use crate::patience;
use crate::protocol::INLINE_BYTES;
use crate::shard_map::{Epoch, MAX_PART_BYTES, ShardMap};
use crate::status::{PAGE, ShardStatus};
use crate::{ClusterMap, DType, KeyRange, Mode, PsError};
use driver::Driver;
use engine::{Cargo, Engine, NewRequest};
use gradwire_transport::{Config, CreditSettings, Region, RegionSlice};
use pending::{Call, LastStep, What};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Settings of a client.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// The secret of the servers.
    pub token: Option<String>,
    /// This process's number among the workers of synchronous tables, from 0. Without one it may read, and push to
    /// asynchronous tables.
    pub worker: Option<u32>,
    /// The longest that a request may wait, for a server or for other workers. Default 300 s.
    pub timeout: Duration,
    /// How long a server is dialled, at first and after its connection was lost, before it counts as lost. Default 5 s.
    pub reconnect: Duration,
    /// The longest that a waiting caller looks for an answer before it sleeps: less where answers take longer. Default 200 µs.
    pub spin: Duration,
    /// Settings of the wire; its token is set from `token`.
    pub transport: Config,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            token: None,
            worker: None,
            timeout: Duration::from_secs(300),
            reconnect: Duration::from_secs(5),
            spin: patience::MOST,
            // Many servers answer a pull at once.
            transport: Config { credit: Some(CreditSettings::default()), ..Config::default() },
        }
    }
}

/// A connection to all shards of a parameter server. All methods may be called from any thread.
pub struct Client {
    core: Arc<Core>,
    timeout: Duration,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What a client and its tables share.
struct Core {
    driver: Arc<Driver>,
    map: ShardMap,
    worker: Option<u32>,
    most_bytes: usize,
    sequence: AtomicU64,
    tables: Mutex<HashMap<String, Arc<table::Table>>>,
    sparse: Mutex<HashMap<String, Arc<sparse::Table>>>,
}

impl Core {
    fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// Starts a call.
    fn start(&self, verb: &'static str, subject: &Arc<str>, requests: Vec<NewRequest>) -> Result<Pending, PsError> {
        self.start_with(verb, subject, requests, None)
    }

    /// Starts a call that ends with a step of its own.
    fn start_with(
        &self,
        verb: &'static str,
        subject: &Arc<str>,
        requests: Vec<NewRequest>,
        last_step: Option<LastStep>,
    ) -> Result<Pending, PsError> {
        let call = Call::new(What { verb, subject: Arc::clone(subject) }, requests.len(), last_step);
        if !requests.is_empty() && !self.driver.submit(&call, requests) {
            return Err(PsError::Closed);
        }
        Ok(Pending { call, driver: Arc::clone(&self.driver) })
    }

    /// Checks that this client may push to a table of that mode.
    fn check_worker(&self, mode: Mode, subject: &str) -> Result<(), PsError> {
        let Some(workers) = mode.workers() else { return Ok(()) };
        if self.worker.is_some_and(|worker| worker < workers) {
            return Ok(());
        }
        let who = self.worker.map_or("has no number".to_owned(), |worker| format!("is worker {worker}"));
        let reason =
            format!("its {workers} workers push to it, and this client {who}: connect with a worker below {workers}");
        Err(PsError::invalid(subject, reason))
    }

    /// A request without elements; a body of any length.
    fn request(&self, shard: u32, header: Header, body: Vec<u8>) -> NewRequest {
        let cargo = match body.len() {
            0 => Cargo::Nothing,
            1..=INLINE_BYTES => Cargo::Body(body),
            _ => {
                let region = Region::from_vec(body);
                Cargo::Slice(region.read(0..region.len()).expect("nobody else knows it"))
            }
        };
        let header = Header { epoch: self.map.epoch, sequence: self.next_sequence(), ..header };
        let keep_body = matches!(
            header.kind,
            Kind::Status | Kind::Evicted | Kind::Norm | Kind::Snapshot | Kind::Offer | Kind::Restart
        );
        NewRequest { shard, header, cargo, target: None, lane: None, keep_body, fragile: false }
    }
}

impl Client {
    /// Connects to the servers at `addresses` (`host:port`), one a shard, in the order that all clients give them.
    ///
    /// # Errors
    /// `Authentication` where the token differs; `ServerLost` where nobody answers within `settings.reconnect`;
    /// `Refused` where a later process has taken this worker's place.
    pub fn connect(addresses: &[String], settings: ClientSettings) -> Result<Self, PsError> {
        let token = settings.token.clone().filter(|token| !token.is_empty());
        let config = Config { token, ..settings.transport.clone() };
        Self::over(dial::dialer(&config, addresses)?, addresses, settings)
    }

    /// Connects to the cluster whose coordinator is at one of `coordinators`, and finds its shards again when they move.
    ///
    /// # Errors
    /// As [`Client::connect`]; `Timeout` where no coordinator answers within `settings.reconnect`, or not all shards are
    /// there by then.
    pub fn through(coordinators: &[String], settings: ClientSettings) -> Result<Self, PsError> {
        let token = settings.token.clone().filter(|token| !token.is_empty());
        let config = Config { token, ..settings.transport.clone() };
        let directory = Directory::new(coordinators, &config);
        let (_, addresses) = directory.wait(Instant::now() + settings.reconnect)?;
        Self::begin(dial::dialer(&config, &addresses)?, &addresses, settings, Some(directory))
    }

    /// What the coordinator at one of `coordinators` says: who serves which shard. Blocks for `settings.timeout` at most.
    ///
    /// # Errors
    /// `Authentication`; `Timeout` where no coordinator answers.
    pub fn map_of(coordinators: &[String], settings: ClientSettings) -> Result<ClusterMap, PsError> {
        let token = settings.token.filter(|token| !token.is_empty());
        let config = Config { token, ..settings.transport };
        Directory::new(coordinators, &config).ask(Instant::now() + settings.timeout)
    }

    /// Has the server at `address`, as its map names it, hand over all that it has to backups. Blocks until that is done, for
    /// `settings.timeout` at most; clients go on meanwhile.
    ///
    /// # Errors
    /// `Invalid` where no server is there; `Timeout` with the shards that no other server has taken.
    pub fn drain(coordinators: &[String], address: &str, settings: ClientSettings) -> Result<(), PsError> {
        let token = settings.token.filter(|token| !token.is_empty());
        let config = Config { token, ..settings.transport };
        let (directory, began) = (Directory::new(coordinators, &config), Instant::now());
        loop {
            let left = directory.drain(address, began + settings.timeout)?;
            if left.is_empty() {
                return Ok(());
            }
            if began.elapsed() >= settings.timeout {
                let what = format!("another server to take over shards {left:?}; start one with room for them");
                return Err(PsError::Timeout { what, waited: began.elapsed() });
            }
            // Nobody tells us when it changes, and it does so seldom.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Connects over a given wire.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn over(wire: Box<dyn Dialer>, addresses: &[String], settings: ClientSettings) -> Result<Self, PsError> {
        Self::begin(wire, addresses, settings, None)
    }

    fn begin(
        wire: Box<dyn Dialer>,
        addresses: &[String],
        settings: ClientSettings,
        directory: Option<Directory>,
    ) -> Result<Self, PsError> {
        let shards = u32::try_from(addresses.len()).unwrap_or(0);
        let map = ShardMap::new(Epoch(1), shards);
        let map = map.ok_or_else(|| PsError::invalid("connecting", "give the address of at least one server"))?;
        let client = match settings.worker {
            Some(worker) => worker.into(),
            // Far from the numbers of workers.
            None => dial::random()? | 1 << 63,
        };
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let incarnation = u64::try_from(started.as_nanos()).unwrap_or(u64::MAX);
        let me = Header { client, incarnation, epoch: map.epoch, ..Header::new(Kind::Hello) };
        let waker = wire.waker();
        let mut engine = Engine::new(wire, addresses, me, settings.timeout, settings.reconnect);
        engine.directory = directory;
        engine.reach_all(Instant::now() + settings.reconnect)?;
        let most_bytes = engine.shards.iter().map(|shard| shard.most_bytes).min().unwrap_or(0);
        let most_bytes = usize::try_from(most_bytes).unwrap_or(usize::MAX).min(MAX_PART_BYTES);
        let driver = Arc::new(Driver::new(engine, waker, settings.spin));
        let thread = driver
            .start()
            .map_err(|error| gradwire_transport::TransportError::io("start the client's thread", error))?;
        let core = Core {
            driver,
            map,
            worker: settings.worker,
            most_bytes,
            sequence: AtomicU64::new(1),
            tables: Mutex::new(HashMap::new()),
            sparse: Mutex::new(HashMap::new()),
        };
        Ok(Self { core: Arc::new(core), timeout: settings.timeout, thread: Mutex::new(Some(thread)) })
    }

    /// Makes the dense table `name`, or finds it where somebody has made it. All clients must describe it alike. Blocks.
    ///
    /// The elements of a new table are 0 until [`DenseTable::init`].
    ///
    /// # Errors
    /// `Refused` with `Reason::Mismatch` where another client has described it otherwise, and with `Reason::Limit` where a
    /// server has no room for it; `Invalid` for a description that makes no sense.
    pub fn dense(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        options: TableOptions,
    ) -> Result<DenseTable, PsError> {
        table::open(&self.core, name, shape, dtype, options)
    }

    /// Makes the sparse table `name` of rows of `dim` elements, or finds it where somebody has made it. All clients must
    /// describe it alike. Blocks.
    ///
    /// # Errors
    /// As [`Client::dense`].
    pub fn sparse(&self, name: &str, dim: usize, dtype: DType, options: SparseOptions) -> Result<SparseTable, PsError> {
        sparse::open(&self.core, name, dim, dtype, options)
    }

    /// Clips the gradients of `tables` that this worker has pushed last, as `torch.nn.utils.clip_grad_norm_` would the merged
    /// ones, and has them applied; the norm over all of them, before clipping. Every worker calls it after each push, with
    /// the same tables and the same `most`; only then do pulls of that clock get their answers. Blocks until all have pushed.
    ///
    /// The norm is the root of the exact sum of squares, so its bits depend neither on the number of shards nor on who
    /// comes first. Costs a round trip, and two short messages for each table and shard.
    ///
    /// # Errors
    /// `Invalid` for tables that were not opened to be clipped; `Refused` where workers differ; `Timeout` with who is missing.
    pub fn clip(&self, tables: &[&DenseTable], most: f64) -> Result<f64, PsError> {
        clip::clip(&self.core, tables, most)
    }

    /// Gives servers that were lost, and are there again, `tables` that were opened with [`crate::Recovery::Workers`]: each with
    /// the value that this worker's last pull which ended well has brought. All workers call it with the same tables, once a
    /// call has failed with `ServerLost`, or with `Recovering` since another has begun to; calls on them that are under way are
    /// given up. The clock of each table to go on from: the latest that any worker has. A worker that had an earlier one pulls;
    /// then it pushes again, the same, what it had pushed beyond that clock: servers that have counted it count it once. Blocks
    /// until all workers and servers are there, for the client's timeout at most.
    ///
    /// What no worker has begins anew: the optimizer's state of what was lost, and bits beyond the table's type.
    ///
    /// # Errors
    /// `Invalid` for other tables, or where nobody has pulled one; `Timeout` and `Refused` with who did not come;
    /// `ServerLost` where a server stays away, or was restored from a checkpoint.
    pub fn recover(&self, tables: &[(&DenseTable, RegionSlice)]) -> Result<Vec<u64>, PsError> {
        recovering::recover(&self.core, tables, self.timeout)
    }

    /// Waits until `clients` clients have come to the barrier `name`, each as often as this one. Blocks.
    ///
    /// # Errors
    /// `Timeout` with who had come; `Refused` where others expect another number.
    pub fn barrier(&self, name: &str, clients: u32, timeout: Option<Duration>) -> Result<(), PsError> {
        let keys = KeyRange { start: 0, end: clients.into() };
        let wait_ms = timeout.map_or(0, |timeout| u32::try_from(timeout.as_millis().max(1)).unwrap_or(u32::MAX));
        let header = Header { table: TableId::of(name), keys, wait_ms, ..Header::new(Kind::Barrier) };
        let request = self.core.request(0, header, Vec::new());
        let pending = self.core.start("waiting at", &format!("barrier {name:?}").into(), vec![request])?;
        pending.wait(None).map(|_| ())
    }

    /// What each server holds, in the order of the shards. Blocks.
    ///
    /// # Errors
    /// `ServerLost`; `Protocol` for an answer that cannot be read.
    pub fn status(&self) -> Result<Vec<ShardStatus>, PsError> {
        let mut all = vec![ShardStatus::default(); self.core.map.shards() as usize];
        let mut first = 0;
        loop {
            let requests = (0..self.core.map.shards()).map(|shard| {
                let keys = KeyRange { start: first, end: first + PAGE as u64 };
                self.core.request(shard, Header { keys, ..Header::new(Kind::Status) }, Vec::new())
            });
            let pending = self.core.start("asking for", &"the servers' status".into(), requests.collect())?;
            pending.wait(None)?;
            let mut more = false;
            for (shard, body) in pending.call.bodies() {
                let mut page = ShardStatus::decode(&body).map_err(|bad| PsError::Protocol {
                    shard,
                    address: String::new(),
                    reason: bad.to_string(),
                })?;
                more |= [page.tables.len(), page.sparse.len(), page.clients.len()].contains(&PAGE);
                let whole = &mut all[shard as usize];
                (whole.memory_bytes, whole.memory_limit_bytes) = (page.memory_bytes, page.memory_limit_bytes);
                whole.standing = page.standing;
                whole.tables.append(&mut page.tables);
                whole.sparse.append(&mut page.sparse);
                whole.clients.append(&mut page.clients);
            }
            if !more {
                return Ok(all);
            }
            first += PAGE as u64;
        }
    }

    /// Number of shards.
    pub fn shards(&self) -> u32 {
        self.core.map.shards()
    }

    /// This client's number among the workers.
    pub fn worker(&self) -> Option<u32> {
        self.core.worker
    }

    /// Ends every call under way with `Closed` and says goodbye to the servers. Calling it again does nothing.
    pub fn close(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        self.core.driver.close();
        if thread.join().is_err() {
            tracing::error!("the client's thread panicked");
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}
