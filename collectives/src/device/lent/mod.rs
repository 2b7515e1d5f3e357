//! Does: collectives by memory of their devices that ranks lend each other. Those of one host reach it by CUDA IPC, those of others by
//! the network card (GPU-direct RDMA), or else by way of the host, each its own share of what its host sends. What is to be done is
//! `plan`'s; here it is given to the device and to the card, and all take the steps between.

mod card;
mod kernels;
mod meeting;
mod plan;
mod reach;

use super::DeviceCall;
use super::carry::Carry;
use super::cut::Side;
use crate::call::Piece;
use crate::messages::{Fetch, Kind, Message};
use crate::pending::Ticket;
use crate::submitter::Submitter;
use crate::{CollectiveError, Fingerprint, Reduction};
use gradwire_transport::cuda::{Act, Copying, DeviceSlice, MOST_SOURCES};
use gradwire_transport::{Link, Rank, Region, RemoteSlice, WireKind};
pub use kernels::DeviceKernels;
use meeting::Met;
use plan::hierarchy::Between;
use plan::{LINE, Place, Round, SET_BYTES, SETS, Seen, Task};
use reach::{Own, Slot};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Bytes of a slot.
const SLOT_BYTES: usize = SETS * SET_BYTES;
/// Bytes where what a phase reads of other hosts lands: as much as a set, cut into parts that begin on borders.
const LANDING_BYTES: usize = SET_BYTES + MOST_SOURCES * LINE;

/// What a group knows of its ranks' devices.
pub(crate) struct Lending {
    /// By which wire each other rank is reached.
    links: Vec<(Rank, WireKind)>,
    /// Why this rank lends nothing, where it does not.
    refusal: Option<String>,
    /// The file that stands for NVRTC.
    compiler: Option<PathBuf>,
    /// For the one thread that carries calls out.
    met: Mutex<Option<Met>>,
    words: Mutex<Option<String>>,
}

/// Memory that ranks lend each other.
struct Reached {
    /// Every rank's slot.
    slots: Vec<Slot>,
    own: Own,
    /// Where all ranks can fold on their devices; else why not.
    kernels: Result<DeviceKernels, String>,
    /// Rounds so far, which tell whose turn the sets are.
    round: usize,
    ordinal: u32,
    /// Whether a rank is of another process.
    abroad: bool,
    /// How ranks of different hosts reach each other, where there are several hosts of several ranks.
    between: Option<Between>,
}

/// What a phase reads of other hosts, and where it lands.
#[derive(Default)]
struct Landing {
    end: usize,
    reads: Vec<(Rank, Fetch)>,
}

impl Lending {
    pub(super) fn new(links: &[Link], refusal: Option<String>, compiler: Option<PathBuf>) -> Self {
        let links = links.iter().filter_map(|link| Some((link.peer.rank?, link.kind))).collect();
        Self { links, refusal, compiler, met: Mutex::default(), words: Mutex::default() }
    }

    /// How long calls travel, in words, once there was one.
    pub(super) fn words(&self) -> Option<String> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Carries a call of several rounds out, if it can go by this way; all ranks say the same. However it ends, the device is done
    /// with what was begun.
    pub(super) fn carry(&self, carry: &mut Carry) -> Result<bool, CollectiveError> {
        if carry.submitter.world_size.get() == 1 {
            return Ok(false);
        }
        let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        if met.is_none() {
            let new = Met::new(self, carry)?;
            *self.words.lock().unwrap_or_else(PoisonError::into_inner) = Some(new.words());
            *met = Some(new);
        }
        match &mut *met {
            Some(Met::Reached(reached)) => reached.carry(carry),
            _ => Ok(false),
        }
    }
}

impl Reached {
    /// The rounds of a call that can go this way; all ranks say the same.
    fn rounds(&self, call: &DeviceCall, submitter: &Submitter) -> Option<Vec<Round>> {
        let folds = |op| self.kernels.is_ok() && DeviceKernels::has(call.dtype, op);
        if !call.collective.reduction().is_none_or(folds) {
            return None;
        }
        let (input, output) = call.lens();
        let seen = Seen {
            collective: &call.collective,
            element_bytes: call.dtype.bytes(),
            input: &input,
            output: &output,
            rank: submitter.rank.index(),
            ranks: submitter.world_size.get() as usize,
        };
        // What is to be in the order of the ranks cannot be in that of the hosts first.
        let ordered = submitter.chooser.orders(&call.collective, call.dtype);
        let by_hosts = self.between.zip(submitter.chooser.hosts()).filter(|_| !ordered);
        let rounds = by_hosts.and_then(|(between, hosts)| seen.rounds_by_hosts(hosts, between, SET_BYTES));
        rounds.or_else(|| seen.rounds(SET_BYTES).filter(|_| self.between != Some(Between::Staged)))
    }

    fn carry(&mut self, carry: &mut Carry) -> Result<bool, CollectiveError> {
        let Some(rounds) = self.rounds(&carry.call, &carry.submitter) else { return Ok(false) };
        let ordinal = carry.lane.device.ordinal();
        if ordinal != self.ordinal {
            let reason = format!(
                "the group's long calls go by memory of device {}, and this one is on device {ordinal}: keep each rank's tensors on \
                 one device, or set GRADWIRE_CUDA_DIRECT=0 on all ranks",
                self.ordinal
            );
            return Err(CollectiveError::Invalid { call: carry.call.words(), reason });
        }
        carry.lane.out.wait_for(&carry.ready)?;
        let mut working = Vec::new();
        let fingerprint = carry.call.fingerprint(&carry.submitter);
        let outcome = self.all_rounds(&rounds, carry, fingerprint, &mut working);
        Copying::let_go(working);
        if outcome.is_err() && self.abroad {
            // Another process's device, or a card, may still read it, and nobody tells when that ends.
            std::mem::forget(Arc::clone(&self.own.memory));
        }
        outcome.map(|()| true)
    }

    fn all_rounds(
        &mut self,
        rounds: &[Round],
        carry: &Carry,
        fingerprint: Fingerprint,
        working: &mut Vec<Copying<Vec<DeviceSlice>>>,
    ) -> Result<(), CollectiveError> {
        for round in rounds {
            for (number, tasks) in round.iter().enumerate() {
                if number > 0 {
                    carry.settle(working)?;
                    step(carry, fingerprint)?;
                }
                working.extend(self.begin(tasks, carry)?);
                for task in tasks {
                    if let Task::Across { input, output, rounds } = task {
                        carry.settle(working)?;
                        self.across((input, output), *rounds, carry, fingerprint)?;
                    }
                }
            }
            self.round += 1;
        }
        // Nobody leaves, and takes its slot along, while another still reads it.
        carry.settle(working)?;
        step(carry, fingerprint)
    }

    /// What these places have between hosts.
    fn across(
        &self,
        (input, output): (&[Place], &[Place]),
        rounds: usize,
        carry: &Carry,
        fingerprint: Fingerprint,
    ) -> Result<(), CollectiveError> {
        let here = |places: &[Place]| -> Result<Vec<_>, _> {
            places.iter().map(|place| self.place(place, &carry.call, &mut Landing::default())).collect()
        };
        let (input, output) = (here(input)?, here(output)?);
        let DeviceCall { collective, dtype, timeout, .. } = carry.call;
        carry.across(&DeviceCall { collective, dtype, input, output, timeout }, rounds, fingerprint)
    }

    /// Has the card read what lies on other hosts, then begins `tasks` on the device.
    fn begin(&mut self, tasks: &[Task], carry: &Carry) -> Result<Option<Copying<Vec<DeviceSlice>>>, CollectiveError> {
        let (call, mut landing) = (&carry.call, Landing::default());
        let mut places = Vec::with_capacity(tasks.len());
        for task in tasks {
            places.push(match task {
                Task::Copy { from, to } => {
                    (vec![self.place(from, call, &mut landing)?], self.place(to, call, &mut landing)?, false)
                }
                Task::Fold { from, into, .. } => {
                    let from =
                        from.iter().map(|place| self.place(place, call, &mut landing)).collect::<Result<_, _>>()?;
                    (from, self.place(into, call, &mut landing)?, true)
                }
                Task::Across { .. } => continue,
            });
        }
        fetch(landing, carry)?;
        let kernel = match (call.collective.reduction(), &mut self.kernels) {
            // Of a part of the ranks an average is a sum.
            (Some(Reduction::Avg), Ok(kernels)) if !tasks.iter().all(Task::is_whole) => {
                Some(kernels.get(call.dtype, Reduction::Sum)?)
            }
            (Some(op), Ok(kernels)) => Some(kernels.get(call.dtype, op)?),
            _ => None,
        };
        let acts = places.into_iter().flat_map(|(from, to, folds)| match kernel.filter(|_| folds) {
            Some(kernel) => vec![Act::Fold { kernel, from, into: to }],
            None => from.into_iter().map(|from| Act::Copy { from, to: to.clone() }).collect(),
        });
        Ok(carry.lane.out.work(acts.collect())?)
    }

    /// Where a place is, for this rank's device: of a slot on another host, where it lands.
    fn place(&self, place: &Place, call: &DeviceCall, landing: &mut Landing) -> Result<DeviceSlice, CollectiveError> {
        let (rank, range) = match place {
            Place::Piece { side, piece, range } => {
                let pieces = if *side == Side::Input { &call.input } else { &call.output };
                return Ok(pieces[*piece].part(range.clone()));
            }
            Place::Slot { rank, range } => (*rank, range),
        };
        let set = self.round % SETS * SET_BYTES;
        let range = set + range.start..set + range.end;
        let in_use = |error| super::in_use(&call.words(), &error);
        match &self.slots[rank] {
            Slot::Near(memory) => memory.slice(range).map_err(in_use),
            Slot::Away => unreachable!("plans speak of slots that are reached"),
            Slot::Far(remote) => {
                let (start, bytes) = (SLOT_BYTES + landing.end, range.len() as u64);
                landing.end += range.len().next_multiple_of(LINE);
                if bytes > 0 {
                    let own = RemoteSlice { offset: start as u64, bytes, ..self.own.exposed };
                    let remote = RemoteSlice { offset: range.start as u64, bytes, ..*remote };
                    landing.reads.push((Rank(rank as u32), Fetch { own, remote }));
                }
                self.own.memory.slice(start..start + range.len()).map_err(in_use)
            }
        }
    }
}

/// Has the card read all of this, and waits for it.
fn fetch(landing: Landing, carry: &Carry) -> Result<(), CollectiveError> {
    let timeout = carry.deadline.saturating_duration_since(Instant::now());
    let begin = |(rank, fetch): (Rank, Fetch)| {
        let ticket = Arc::new(Ticket::default());
        carry.submitter.shared.submit_message(Message {
            ticket: Arc::clone(&ticket),
            kind: Kind::Fetch(rank),
            tag: 0,
            piece: Piece::whole(Region::zeroed(0)),
            fetch: Some(fetch),
            deadline: carry.deadline,
            timeout,
            over: false,
        });
        ticket
    };
    let tickets: Vec<_> = landing.reads.into_iter().map(begin).collect();
    tickets.iter().try_for_each(|ticket| carry.submitter.finish(ticket))
}

/// All take a step, in the name of the call.
fn step(carry: &Carry, fingerprint: Fingerprint) -> Result<(), CollectiveError> {
    carry.submitter.step(fingerprint, carry.deadline.saturating_duration_since(Instant::now()))
}
