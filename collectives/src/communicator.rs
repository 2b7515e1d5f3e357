//! Does: the public calls of a group, and who drives its engine: the caller of a blocking call, from its own thread and
//! so without a hand-over, or else one progress thread that sleeps while nothing is under way.

use crate::call::{Call, Piece};
use crate::choose::Chooser;
use crate::describe::Description;
use crate::device::{Asked, Bell, Devices, Passage};
use crate::driver::Shared;
use crate::engine::Engine;
use crate::explain::Explanation;
use crate::hosts::Hosts;
use crate::local::Local;
use crate::memory::{Memory, MemoryPool};
use crate::messages::{Kind, Message};
use crate::pending::{Outcome, Ticket};
use crate::plans::Plans;
use crate::settings::Settings;
use crate::submitter::Submitter;
use crate::trace::{Trace, TraceWriter};
use crate::{Collective, CollectiveError, DType};
use gradwire_transport::cuda::Stream;
use gradwire_transport::{Group, Link, PeerName, Rank, TransportError, WireKind, WorldSize};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A group of ranks, and this process's place in it.
///
/// All methods may be called from any thread; collectives must be called in the same order on every rank.
pub struct Communicator {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    rank: Rank,
    world_size: WorldSize,
    group: String,
    members: Vec<PeerName>,
    links: Vec<Link>,
    chooser: Chooser,
    trace: Arc<Trace>,
    memory: MemoryPool,
    pub(crate) submitter: Submitter,
    pub(crate) devices: Devices,
}

/// An operation under way. Dropping it does not stop the operation.
#[derive(Clone)]
pub struct Pending {
    driver: PendingDriver,
    ticket: Arc<Ticket>,
    passage: Option<Arc<Passage>>,
}

/// Who is waited for.
#[derive(Clone)]
enum PendingDriver {
    /// The engine, which the waiting thread drives.
    Engine(Arc<Shared>),
    /// The thread that copies from and to a device.
    Device(Arc<Bell>),
}

impl Pending {
    fn at_engine(shared: &Arc<Shared>, ticket: Arc<Ticket>) -> Self {
        Self { driver: PendingDriver::Engine(Arc::clone(shared)), ticket, passage: None }
    }

    pub(crate) fn on_device(bell: Arc<Bell>, ticket: Arc<Ticket>, passage: Option<Arc<Passage>>) -> Self {
        Self { driver: PendingDriver::Device(bell), ticket, passage }
    }

    /// Has what `stream` is given from now on wait, on its device, for the results of a collective over that device's memory,
    /// and blocks nobody. False where that cannot be: [`wait`](Self::wait), after which they are there for every stream.
    ///
    /// A call that fails lets the stream through: [`wait`](Self::wait) tells before the results are believed.
    ///
    /// # Errors
    /// `Cuda`.
    pub fn order(&self, stream: &Stream) -> Result<bool, CollectiveError> {
        self.passage.as_ref().map_or(Ok(false), |passage| passage.hold(stream))
    }

    /// Waits until the operation has ended, and tells how. The caller's thread drives it meanwhile.
    ///
    /// With a `timeout`, gives up waiting after that long with `None`; the operation goes on.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Outcome> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        match &self.driver {
            PendingDriver::Engine(shared) => shared.wait(&self.ticket, until),
            PendingDriver::Device(bell) => bell.wait(&self.ticket, until),
        }
        self.ticket.outcome()
    }

    /// As [`wait`](Self::wait) with a time-out, which is kept also where this thread would be the one to begin the operation at the
    /// shared segment and to stay there until all ranks have come: it is left to the group's progress thread then, at the cost of a
    /// hand-over.
    pub fn wait_at_most(&self, timeout: Duration) -> Option<Outcome> {
        let until = Instant::now() + timeout;
        match &self.driver {
            PendingDriver::Engine(shared) => shared.wait_at_most(&self.ticket, until),
            PendingDriver::Device(bell) => bell.wait(&self.ticket, Some(until)),
        }
        self.ticket.outcome()
    }

    /// Whether the operation has ended.
    pub fn is_done(&self) -> bool {
        self.ticket.is_done()
    }

    /// Runs `callback` when the operation ends: on the thread that drives the engine then, or at once on this one. It
    /// must be short, and must not wait for an operation.
    pub fn on_done(&self, callback: impl FnOnce(&Outcome) + Send + 'static) {
        self.ticket.on_done(Box::new(callback));
    }
}

impl Communicator {
    /// A communicator over a group that has been formed.
    ///
    /// # Errors
    /// `Invalid` for a setting that cannot be used.
    pub fn new(group: Group, name: &str, settings: Settings) -> Result<Self, CollectiveError> {
        let Group { wire, rank, world_size, members, links, segment, hosts, costs, news } = group;
        let local = segment.filter(|_| settings.same_host);
        let local = local.map(|segment| Box::new(Local::new(segment, rank, world_size)));
        let patience = settings.patience(&members, rank);
        let chooser = settings.chooser()?.on(Hosts::new(settings.hosts.as_ref().unwrap_or(&hosts)), costs);
        let plans = Plans::new(chooser.clone());
        let waker = wire.waker();
        let trace = Arc::new(Trace::new(name.to_owned(), rank, members.clone(), settings.trace.clone()));
        let who = (name.to_owned(), members.clone());
        let mut engine = Engine::new((wire, news), (rank, world_size), who, plans, local, Arc::clone(&trace));
        engine.checks_nan = settings.check_nan;
        let shared = Arc::new(Shared::new(engine, waker, patience, settings.timeout));
        let (thread, group, memory) = (Mutex::new(None), name.to_owned(), MemoryPool::default());
        let host = members.get(rank.index()).map_or("unknown", |name| name.host.as_str());
        let who = format!("{rank} (host {host})");
        let submitter = Submitter { shared: Arc::clone(&shared), rank, world_size, chooser: chooser.clone(), who };
        let rdma = links.iter().any(|link| link.kind == WireKind::Verbs);
        let devices = Devices::new(rdma, &links, &settings);
        let communicator = Self {
            shared,
            thread,
            rank,
            world_size,
            group,
            members,
            links,
            chooser,
            trace,
            memory,
            submitter,
            devices,
        };
        if rdma {
            // Queue pairs may break under a message whose sender has nothing more to do.
            communicator.have_progress_thread();
        }
        Ok(communicator)
    }

    /// This process's place in the group.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> WorldSize {
        self.world_size
    }

    /// Host and process of every rank.
    pub fn members(&self) -> &[PeerName] {
        &self.members
    }

    /// Begins a collective and returns at once; the progress thread carries it out, or whoever waits for it.
    ///
    /// # Errors
    /// `Invalid`: the call does not fit its pieces; nothing was sent.
    pub fn start(&self, call: Call) -> Result<Pending, CollectiveError> {
        let ticket = self.submit(call)?;
        self.leave_to_progress_thread();
        Ok(Pending::at_engine(&self.shared, ticket))
    }

    /// Begins a collective that the caller will wait for at once: it moves when somebody waits, without a hand-over.
    ///
    /// # Errors
    /// As [`Communicator::start`].
    pub fn begin(&self, call: Call) -> Result<Pending, CollectiveError> {
        Ok(Pending::at_engine(&self.shared, self.submit(call)?))
    }

    /// Carries out a collective from the caller's own thread.
    ///
    /// # Errors
    /// `Invalid`, or the group's verdict.
    pub fn run(&self, call: Call) -> Result<(), CollectiveError> {
        self.devices.order.wait();
        self.submitter.run(call)
    }

    /// Sends `piece` to rank `to`, where it meets a receive with the same `tag`.
    ///
    /// # Errors
    /// `Invalid` for a rank that is not there, or for this rank itself.
    pub fn send(
        &self,
        to: Rank,
        tag: u32,
        piece: Piece,
        timeout: Option<Duration>,
    ) -> Result<Pending, CollectiveError> {
        self.other("send", to)?;
        Ok(self.message(Kind::Send(to), tag, piece, timeout))
    }

    /// Receives into `piece`, which must be as long as the message, from rank `from`, or from whoever is first.
    ///
    /// # Errors
    /// `Invalid` for a rank that is not there, or for this rank itself.
    pub fn recv(
        &self,
        from: Option<Rank>,
        tag: u32,
        piece: Piece,
        timeout: Option<Duration>,
    ) -> Result<Pending, CollectiveError> {
        let kind = match from {
            Some(from) => {
                self.other("recv", from)?;
                Kind::Recv(from)
            }
            None => Kind::RecvAny,
        };
        Ok(self.message(kind, tag, piece, timeout))
    }

    /// How long an operation may take that is given no time-out of its own.
    pub fn set_timeout(&self, timeout: Duration) {
        self.shared.set_timeout(timeout);
    }

    /// Has `watch` asked, every 50 ms or so, by a thread that waits for ranks at the shared segment: true gives the group up.
    ///
    /// Waits at a wire come back by themselves; for the bindings, which look for Ctrl-C. Only the first watch counts.
    pub fn set_watch(&self, watch: impl Fn() -> bool + Send + Sync + 'static) {
        self.shared.wishes().set_watch(Box::new(watch));
    }

    /// Memory of `bytes` for calls to come: where the group has RDMA, the device knows it already. It begins on a page, and
    /// holds whatever was there.
    ///
    /// # Errors
    /// `Register` where the device does not take it; `Transport` where there is not so much.
    pub fn allocate(&self, bytes: usize) -> Result<Memory, CollectiveError> {
        if let Some(memory) = self.memory.take(bytes) {
            return Ok(memory);
        }
        let refused = || TransportError::io(format!("allocate {bytes} bytes"), std::io::ErrorKind::OutOfMemory);
        let region = MemoryPool::stretch(bytes).ok_or_else(refused)?;
        if self.links.iter().any(|link| link.kind == WireKind::Verbs) {
            let wire = &mut self.shared.engine().wire;
            self.memory.surplus().iter().for_each(|surplus| wire.deregister(surplus));
            wire.register(&region)?;
        } else {
            drop(self.memory.surplus());
        }
        Ok(self.memory.add(&region, bytes))
    }

    /// Collectives begun so far.
    pub fn sequence(&self) -> u64 {
        self.shared.sequence()
    }

    /// Which wire leads to which rank and why, what has been moved, and how collectives are carried out.
    pub fn describe(&self) -> Description {
        let engine = self.shared.engine();
        Description::new(&engine, &self.links, self.chooser.world(), self.devices.describe())
    }

    /// By which algorithm `collective` over `bytes` bytes (of a rank's buffer, or part) of `dtype` goes, and why; and where a CUDA
    /// device's memory is folded in it, once a call of several rounds has found out.
    pub fn explain(&self, collective: &Collective, dtype: DType, bytes: usize) -> Explanation {
        let choice = self.chooser.choice(collective, dtype, bytes, self.world_size);
        let folded =
            self.devices.explain(Asked { collective, dtype, bytes, world_size: self.world_size }, &self.chooser);
        Explanation::new(choice, &self.chooser, self.shared.engine().local.is_some(), folded)
    }

    /// The last operations, [`Settings::REMEMBERED`] at most, with their times, as JSON. Answers also while ranks are late.
    pub fn trace(&self) -> String {
        self.trace.to_json()
    }

    /// Writes the same where [`Settings::trace`] says, whenever it is asked to.
    pub fn trace_writer(&self) -> TraceWriter {
        TraceWriter(Arc::downgrade(&self.trace))
    }

    /// The error that ended the group, if it is over.
    pub fn error(&self) -> Option<CollectiveError> {
        let engine = self.shared.engine();
        let operation = engine.group_operation();
        engine.verdict().map(|verdict| verdict.error(operation, &self.members))
    }

    /// Ends the group at once, on every rank: everything under way fails with `reason`. Idempotent.
    pub fn abort(&self, reason: &str) {
        self.devices.give_up();
        self.submitter.abort(reason);
    }

    /// Leaves the group in good order: sends what was posted, says goodbye, stops the progress thread. Idempotent.
    ///
    /// Operations still under way fail. Waits at most `timeout`, and for a CUDA device that does nothing some 10 s more.
    pub fn close(&self, timeout: Duration) {
        let until = Instant::now() + timeout;
        self.shared.stop(until);
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic of the thread has been printed; there is nothing to add.
            let _ = thread.join();
        }
        self.shared.close(until);
        self.shared.ring();
        self.devices.close();
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.shared.timeout()
    }

    pub(crate) fn other(&self, call: &str, rank: Rank) -> Result<(), CollectiveError> {
        if self.world_size.contains(rank) && rank != self.rank {
            return Ok(());
        }
        let reason = format!(
            "takes another rank of the {} in the group, got {rank}; this is {}",
            self.world_size.get(),
            self.rank
        );
        Err(CollectiveError::Invalid { call: call.to_owned(), reason })
    }

    fn submit(&self, call: Call) -> Result<Arc<Ticket>, CollectiveError> {
        self.devices.order.wait();
        self.submitter.submit(call)
    }

    fn message(&self, kind: Kind, tag: u32, piece: Piece, timeout: Option<Duration>) -> Pending {
        let timeout = timeout.unwrap_or_else(|| self.shared.timeout());
        let ticket = Arc::new(Ticket::default());
        let deadline = Instant::now() + timeout;
        self.shared.submit_message(Message {
            ticket: Arc::clone(&ticket),
            kind,
            tag,
            piece,
            fetch: None,
            deadline,
            timeout,
            over: false,
        });
        self.leave_to_progress_thread();
        Pending::at_engine(&self.shared, ticket)
    }

    fn leave_to_progress_thread(&self) {
        self.have_progress_thread();
        self.shared.ring();
    }

    fn have_progress_thread(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let name = format!("gradwire-{}", self.group);
            // Without the thread, operations move while somebody waits for them: slower, never wrong.
            *thread = std::thread::Builder::new()
                .name(name.chars().take(15).collect())
                .spawn(move || shared.run_progress())
                .inspect(|_| self.shared.set_has_thread())
                .map_err(|error| tracing::warn!(%error, "no progress thread"))
                .ok();
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.close(Duration::from_millis(500));
    }
}
