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
use super::cut::{Side, even};
use super::fold::{Asked, FoldPlace, Folding, Pace};
use super::measure;
use crate::call::Piece;
use crate::messages::{Fetch, Kind, Message};
use crate::pending::Ticket;
use crate::submitter::Submitter;
use crate::{Collective, CollectiveError, DType, Fingerprint, Reduction, Settings};
use gradwire_transport::cuda::{Act, Copying, DeviceSlice, MOST_SOURCES};
use gradwire_transport::{Link, Rank, Region, RemoteSlice, WireKind};
pub use kernels::DeviceKernels;
use meeting::Met;
use plan::hierarchy::Between;
use plan::{LINE, Place, Round, SETS, Seen, Task};
pub(crate) use plan::{Leg, SET_BYTES, SLACK};
use reach::{Own, Slot};
use std::any::Any;
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
    /// Where this rank was told to fold.
    wish: Option<FoldPlace>,
    /// Whether this rank looks for NaN in what hosts fold.
    checks_nan: bool,
    /// The file that stands for NVRTC.
    compiler: Option<PathBuf>,
    /// Bytes of a call above which all ranks hand in memory of a device, or none.
    pub(super) alike: usize,
    /// For the one thread that carries calls out.
    met: Mutex<Option<Met>>,
    told: Mutex<Option<(Vec<String>, Folding)>>,
    /// What was made to no avail. Freeing it may wait for the whole device, so for streams that wait for the thread that carries calls
    /// out: a caller does it.
    leftover: Mutex<Vec<Box<dyn Any + Send>>>,
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
    /// Whether no rank reaches another's: what a rank folds is brought to it by way of the hosts.
    brings: bool,
}

/// What a phase reads of other hosts, and where it lands.
#[derive(Default)]
struct Landing {
    end: usize,
    reads: Vec<(Rank, Fetch)>,
}

impl Lending {
    pub(super) fn new(links: &[Link], settings: &Settings) -> Self {
        Self {
            links: links.iter().filter_map(|link| Some((link.peer.rank?, link.kind))).collect(),
            refusal: (!settings.cuda_direct).then(|| "told not to by GRADWIRE_CUDA_DIRECT=0".to_owned()),
            wish: settings.cuda_reduce,
            checks_nan: settings.check_nan,
            compiler: settings.nvrtc.clone(),
            alike: settings.cuda_alike,
            met: Mutex::default(),
            told: Mutex::default(),
            leftover: Mutex::default(),
        }
    }

    /// How long calls travel, in words, and where they are folded, once there was one.
    pub(super) fn told(&self) -> Option<(Vec<String>, Folding)> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn leave(&self, what: impl Any + Send) {
        self.leftover.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(what));
    }

    /// Frees what was made to no avail. For callers.
    pub(super) fn sweep(&self) {
        let leftover = std::mem::take(&mut *self.leftover.lock().unwrap_or_else(PoisonError::into_inner));
        drop(leftover);
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
            let told = (new.words(&carry.submitter), new.folding.clone());
            *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
            *met = Some(new);
        }
        match &mut *met {
            Some(Met { reached: Some(reached), folding, .. }) => reached.carry(carry, folding),
            _ => Ok(false),
        }
    }
}

impl Reached {
    /// The rounds of a call that can go this way; all ranks say the same.
    fn rounds(&self, call: &DeviceCall, submitter: &Submitter, folding: &Folding) -> Option<Vec<Round>> {
        let folds = |op| self.kernels.is_ok() && DeviceKernels::has(call.dtype, op);
        if !call.collective.reduction().is_none_or(folds) {
            return None;
        }
        let (input, output) = call.lens();
        let world_size = submitter.world_size;
        if call.collective.reduction().is_some() {
            let (.., bytes) = even(&call.collective, (&input, &output), world_size.get() as usize)?;
            let asked = Asked { collective: &call.collective, dtype: call.dtype, bytes, world_size };
            if folding.place(asked, &submitter.chooser) == FoldPlace::Host {
                return None;
            }
        }
        let seen = Seen {
            collective: &call.collective,
            element_bytes: call.dtype.bytes(),
            input: &input,
            output: &output,
            rank: submitter.rank.index(),
            ranks: world_size.get() as usize,
        };
        if self.brings {
            return seen.rounds_brought(SET_BYTES);
        }
        // What is to be in the order of the ranks cannot be in that of the hosts first.
        let ordered = submitter.chooser.orders(&call.collective, call.dtype);
        let by_hosts = self.between.zip(submitter.chooser.hosts()).filter(|_| !ordered);
        let rounds = by_hosts.and_then(|(between, hosts)| seen.rounds_by_hosts(hosts, between, SET_BYTES));
        rounds.or_else(|| seen.rounds(SET_BYTES).filter(|_| self.between != Some(Between::Staged)))
    }

    fn carry(&mut self, carry: &mut Carry, folding: &Folding) -> Result<bool, CollectiveError> {
        let Some(rounds) = self.rounds(&carry.call, &carry.submitter, folding) else { return Ok(false) };
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
        if self.brings {
            // What comes and goes has other lengths than the call: that all are in the same one is found out before.
            step(carry, fingerprint)?;
        }
        for round in rounds {
            for (number, tasks) in round.iter().enumerate() {
                if number > 0 {
                    carry.settle(working)?;
                }
                if number > 0 && !self.brings {
                    step(carry, fingerprint)?;
                }
                working.extend(self.begin(tasks, &carry.call, carry)?);
                for task in tasks {
                    if let Task::Across { leg, input, output, rounds } = task {
                        carry.settle(working)?;
                        self.across((input, output), *rounds, carry, (*leg, fingerprint))?;
                    }
                }
            }
            self.round += usize::from(!self.brings);
        }
        // Nobody leaves, and takes its slot along, while another still reads it.
        carry.settle(working)?;
        if self.brings { Ok(()) } else { step(carry, fingerprint) }
    }

    /// What these places have by way of the host.
    fn across(
        &self,
        (input, output): (&[Place], &[Place]),
        rounds: usize,
        carry: &Carry,
        part: (Leg, Fingerprint),
    ) -> Result<(), CollectiveError> {
        let here = |places: &[Place]| -> Result<Vec<_>, _> {
            places.iter().map(|place| self.place(place, &carry.call, &mut Landing::default())).collect()
        };
        let (input, output) = (here(input)?, here(output)?);
        let DeviceCall { collective, dtype, timeout, .. } = carry.call;
        let collective = match part.0 {
            Leg::BetweenHosts => collective,
            Leg::Come => Collective::AllToAll,
            Leg::Go => Collective::AllGather,
        };
        carry.across(&DeviceCall { collective, dtype, input, output, timeout }, rounds, part)
    }

    /// Has the card read what lies on other hosts, then begins `tasks` on the device.
    fn begin(
        &mut self,
        tasks: &[Task],
        call: &DeviceCall,
        carry: &Carry,
    ) -> Result<Option<Copying<Vec<DeviceSlice>>>, CollectiveError> {
        let mut landing = Landing::default();
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

    /// What it takes to fold what lies in the slots of all ranks that are reached; all do this at once, and none writes there.
    fn pace(&mut self, carry: &Carry) -> Result<Pace, CollectiveError> {
        let is_there = |slot: &&Slot| !matches!(slot, Slot::Away);
        let sources = self.slots.iter().filter(is_there).count().min(MOST_SOURCES);
        let (me, collective) = (carry.submitter.rank.index(), Collective::AllReduce { op: Reduction::Sum });
        let call = DeviceCall { collective, dtype: DType::F32, input: vec![], output: vec![], timeout: None };
        let mut working = Vec::new();
        let pace = measure::pace(|bytes| {
            let bytes = (bytes / sources).next_multiple_of(LINE);
            let there = self.slots.iter().enumerate().filter(|(_, slot)| is_there(slot)).take(sources);
            let from = there.map(|(rank, _)| Place::Slot { rank, range: 0..bytes }).collect();
            let into = Place::Slot { rank: me, range: SET_BYTES / 2..SET_BYTES / 2 + bytes };
            working.extend(self.begin(&[Task::Fold { from, into, whole: true }], &call, carry)?);
            carry.settle(&mut working)
        });
        Copying::let_go(working);
        pace
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
