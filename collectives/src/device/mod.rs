//! Does: collectives and messages over memory of CUDA devices, by way of pinned buffers of the host: what a network card or a wire
//! cannot reach itself is copied while other parts travel. Callers' streams are ordered by events; nobody synchronises a device.

mod carry;
mod cut;
mod fold;
mod lane;
mod lent;
mod measure;
mod worker;

use crate::call::Piece;
use crate::choose::Chooser;
use crate::communicator::Communicator;
use crate::communicator::Pending;
use crate::pending::Ticket;
use crate::{Collective, CollectiveError, DType, Settings};
use carry::Carry;
pub(crate) use cut::SLOT_BYTES;
pub(crate) use fold::Asked;
pub use fold::FoldPlace;
use gradwire_transport::cuda::{Device, DeviceSlice, Event, Stream};
use gradwire_transport::{Link, Overlap, Rank, Region};
use lane::Lane;
pub use lent::DeviceKernels;
use lent::Lending;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use worker::{Order, Worker};

/// A collective over a device's memory; its pieces are as those of [`Call`](crate::Call), all of one device.
#[derive(Clone, Debug)]
pub struct DeviceCall {
    /// What to do.
    pub collective: Collective,
    /// Of which elements.
    pub dtype: DType,
    /// What this rank gives.
    pub input: Vec<DeviceSlice>,
    /// What this rank gets.
    pub output: Vec<DeviceSlice>,
    /// How long it may take; `None`: the group's time-out.
    pub timeout: Option<Duration>,
}

/// Where the end of a call over a device's memory is waited for.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Condvar,
    lock: Mutex<()>,
}

impl Bell {
    /// Waits until `ticket` has ended or `until` has passed.
    pub(crate) fn wait(&self, ticket: &Ticket, until: Option<Instant>) {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !ticket.is_done() {
            let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return;
            }
            // Every call ends by its deadline; the second is insurance against a lost wake-up.
            let nap = left.min(Duration::from_secs(1));
            lock = self.rung.wait_timeout(lock, nap).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn ring(&self) {
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.rung.notify_all();
    }
}

/// The gate behind which the results of a call are.
pub(crate) struct Passage {
    lane: Arc<Lane>,
    number: u32,
}

impl Passage {
    /// Has `stream` wait for the results, on the device. False where the device cannot: the host has to wait.
    pub(crate) fn hold(&self, stream: &Stream) -> Result<bool, CollectiveError> {
        Ok(self.lane.device.ordinal() == stream.device().ordinal() && self.lane.gate.hold(stream, self.number)?)
    }
}

/// What a communicator keeps for calls over devices' memory.
pub(crate) struct Devices {
    lanes: Mutex<BTreeMap<u32, Arc<Lane>>>,
    /// Whether a link of the group is by RDMA.
    rdma: bool,
    lending: Arc<Lending>,
    calls: Worker,
    receives: Arc<Worker>,
    /// Calls over devices that are still to be handed to the group, which others must not overtake.
    pub(crate) order: Arc<Order>,
    /// Set once the group is closed or given up: nobody waits for a device any more.
    over: Arc<AtomicBool>,
    bell: Arc<Bell>,
}

impl Devices {
    /// For a group with a link by RDMA or none, and these links.
    pub(crate) fn new(rdma: bool, links: &[Link], settings: &Settings) -> Self {
        Self {
            lanes: Mutex::default(),
            rdma,
            lending: Arc::new(Lending::new(links, settings)),
            calls: Worker::new("gradwire-cuda"),
            receives: Arc::new(Worker::new("gradwire-cuda-r")),
            order: Arc::default(),
            over: Arc::default(),
            bell: Arc::default(),
        }
    }

    /// Nothing is waited for any more.
    pub(crate) fn give_up(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// Ends the threads, once the engine has ended all that was under way.
    pub(crate) fn close(&self) {
        self.give_up();
        self.calls.join();
        self.receives.join();
    }

    /// How each device's memory travels, in words.
    pub(crate) fn describe(&self) -> Vec<String> {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes
            .values()
            .map(|lane| {
                let (ring, each, pinned) = (cut::SLOTS, cut::SLOT_BYTES >> 20, lane.pinned.count());
                format!(
                    "CUDA device {} ({}): staged by {ring} pinned buffers of {each} MiB, copies and messages at once; {} MiB pinned in \
                     the process, {} buffers made and {} used again{}",
                    lane.device.ordinal(),
                    lane.device.name().unwrap_or_default(),
                    pinned.bytes >> 20,
                    pinned.made,
                    pinned.reused,
                    lane.way.as_ref().map_or_else(String::new, |way| format!(" ({way})"))
                )
            })
            .chain(self.lending.told().into_iter().flat_map(|(words, _)| words))
            .collect()
    }

    /// Where `collective` over `bytes` bytes (of a rank's buffer, or part) of `dtype` is folded, in words, once the ranks have told each
    /// other what they need to know; `None` where nothing is folded.
    pub(crate) fn explain(&self, asked: Asked<'_>, chooser: &Chooser) -> Option<String> {
        asked.collective.reduction()?;
        let (n, bytes) = (asked.world_size.get() as usize, asked.bytes);
        let (input, output) = match asked.collective {
            Collective::ReduceScatter { .. } => (vec![n * bytes], [bytes]),
            _ => (vec![], [bytes]),
        };
        let rounds = cut::rounds(asked.collective, asked.dtype.bytes(), (&input, &output), n, cut::SLOT_BYTES);
        let (_, folding) = self.lending.told()?;
        let alike = cut::is_alike(&rounds, self.lending.alike);
        Some(if alike {
            folding.told(asked, chooser)
        } else {
            "on the hosts (a rank may hand in its host's memory)".to_owned()
        })
    }

    fn lane(&self, device: &Arc<Device>) -> Result<Arc<Lane>, CollectiveError> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get(&device.ordinal()) {
            return Ok(Arc::clone(lane));
        }
        let lane = Arc::new(Lane::new(device, self.rdma)?);
        lanes.insert(device.ordinal(), Arc::clone(&lane));
        Ok(lane)
    }

    fn begun(&self, passage: Option<Passage>) -> (Arc<Ticket>, Pending) {
        let ticket = Arc::new(Ticket::default());
        (Arc::clone(&ticket), Pending::on_device(Arc::clone(&self.bell), ticket, passage.map(Arc::new)))
    }
}

impl Communicator {
    /// Begins a collective over a device's memory, after all that `stream` has been given so far, and returns at once.
    ///
    /// What `stream` is given later does not wait for it: [`Pending::order`] does that, or [`Pending::wait`]. All ranks must call
    /// with memory of a device, or with parts of at most 4 MiB ([`Settings::cuda_alike`]): longer ones are cut, and each part is a
    /// collective.
    ///
    /// # Errors
    /// `Invalid`: the call does not fit its pieces, or `stream` is of another device; `Cuda`. Nothing was sent.
    pub fn start_on_device(&self, call: DeviceCall, stream: &Stream) -> Result<Pending, CollectiveError> {
        let (devices, submitter) = (&self.devices, self.submitter.clone());
        devices.lending.sweep();
        let device = stream.device();
        one_device(&call, device)?;
        let lane = devices.lane(device)?;
        let (input, output) = call.lens();
        let world_size = submitter.world_size.get() as usize;
        let bytes = call.dtype.bytes();
        let rounds = cut::rounds(&call.collective, bytes, (&input, &output), world_size, cut::SLOT_BYTES);
        let most = rounds.iter().map(|round| round.bytes).max().unwrap_or(0);
        let large = if most > cut::SLOT_BYTES { Some(lane.pinned.take(most)?) } else { None };
        let first = large.as_ref().unwrap_or(&lane.slots[0]);
        call.staged(&rounds[0], first, None).shape(submitter.rank.index(), submitter.world_size)?;
        let ready = stream.mark()?;
        let timeout = call.timeout.unwrap_or_else(|| submitter.shared.timeout());
        let (deadline, over) = (Instant::now() + timeout, Arc::clone(&devices.over));
        // Held until the call is queued: the gate counts calls in the order of the queue.
        let mut count = lane.begun.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.wrapping_add(1);
        let number = *count;
        let (ticket, pending) = devices.begun(Some(Passage { lane: Arc::clone(&lane), number }));
        let (bell, gate) = (Arc::clone(&devices.bell), Arc::clone(&lane));
        let entry = Some(devices.order.enter());
        let (lane, lending) = (Arc::clone(&lane), Arc::clone(&devices.lending));
        let carry = Carry { call, rounds, large, lane, lending, ready, submitter, entry, over, deadline };
        devices.calls.give(move || {
            let (outcome, call) = carry.run();
            gate.gate.open(number);
            ticket.finish(outcome);
            bell.ring();
            drop(call);
        })?;
        drop(count);
        Ok(pending)
    }

    /// Sends a device's memory to rank `to`, after all that `stream` has been given so far. One message, whatever memory the
    /// other end has. Waits until the bytes are in the host's memory.
    ///
    /// # Errors
    /// As [`Communicator::send`], and `Cuda`.
    pub fn send_from_device(
        &self,
        to: Rank,
        tag: u32,
        slice: DeviceSlice,
        stream: &Stream,
        timeout: Option<Duration>,
    ) -> Result<Pending, CollectiveError> {
        self.other("send", to)?;
        let lane = self.devices.lane(stream.device())?;
        let (bytes, deadline) = (slice.len(), Instant::now() + timeout.unwrap_or_else(|| self.timeout()));
        let buffer = lane.pinned.take(bytes)?;
        lane.sends.wait_for(&stream.mark()?)?;
        let host = buffer.write(0..bytes).map_err(|error| in_use("send", &error))?;
        drop(lane.sends.copy_out(slice, host)?.wait(deadline)?);
        let piece = Piece { region: Arc::clone(&buffer), range: 0..bytes };
        let pending = self.send(to, tag, piece, timeout)?;
        pending.on_done(move |_| drop(buffer));
        Ok(pending)
    }

    /// Receives into a device's memory, as [`Communicator::recv`] does; the memory is written after all that `stream` has been
    /// given so far. One message, whatever memory the other end has.
    ///
    /// # Errors
    /// As [`Communicator::recv`], and `Cuda`.
    pub fn recv_to_device(
        &self,
        from: Option<Rank>,
        tag: u32,
        slice: DeviceSlice,
        stream: &Stream,
        timeout: Option<Duration>,
    ) -> Result<Pending, CollectiveError> {
        let lane = self.devices.lane(stream.device())?;
        let (bytes, timeout) = (slice.len(), timeout.unwrap_or_else(|| self.timeout()));
        let (deadline, buffer, ready) = (Instant::now() + timeout, lane.pinned.take(bytes)?, stream.mark()?);
        let piece = Piece { region: Arc::clone(&buffer), range: 0..bytes };
        let arriving = self.recv(from, tag, piece, Some(timeout))?;
        let (ticket, pending) = self.devices.begun(None);
        let (receives, bell) = (Arc::clone(&self.devices.receives), Arc::clone(&self.devices.bell));
        arriving.on_done(move |outcome| {
            let (outcome, late, lost) = (outcome.clone(), Arc::clone(&bell), Arc::clone(&ticket));
            let finish = move || {
                let stored = outcome.and_then(|done| {
                    store(&lane, &buffer, slice, &ready, deadline)?;
                    Ok(done)
                });
                drop(buffer);
                ticket.finish(stored);
                bell.ring();
            };
            if let Err(error) = receives.give(finish) {
                lost.finish(Err(error.into()));
                late.ring();
            }
        });
        Ok(pending)
    }
}

fn store(
    lane: &Lane,
    buffer: &Arc<Region>,
    slice: DeviceSlice,
    ready: &Event,
    deadline: Instant,
) -> Result<(), CollectiveError> {
    lane.receives.wait_for(ready)?;
    let host = buffer.read(0..slice.len()).map_err(|error| in_use("recv", &error))?;
    lane.receives.copy_in(host, slice)?.wait(deadline)?;
    Ok(())
}

fn in_use(call: &str, error: &Overlap) -> CollectiveError {
    CollectiveError::Invalid { call: call.to_owned(), reason: format!("a pinned buffer is in use: {error}") }
}

fn one_device(call: &DeviceCall, device: &Device) -> Result<(), CollectiveError> {
    let invalid = |reason| CollectiveError::Invalid { call: call.words(), reason };
    if call.collective == Collective::Barrier {
        return Err(invalid("a barrier has no memory: call it without a device".to_owned()));
    }
    match call.input.iter().chain(&call.output).find(|slice| slice.device().ordinal() != device.ordinal()) {
        Some(other) => Err(invalid(format!(
            "the stream is of device {}, and a tensor is on device {}: all must be on one",
            device.ordinal(),
            other.device().ordinal()
        ))),
        None => Ok(()),
    }
}
