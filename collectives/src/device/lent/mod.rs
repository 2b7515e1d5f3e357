//! Does: collectives of ranks on one host by memory of their devices that they lend each other (CUDA IPC): nothing of it comes to the
//! host. What is to be done is `plan`'s; here it is given to the device, and all take the steps between.
//!
//! Who lends what is told by a collective of its own, before the first long call. One rank that cannot is enough for all to go by
//! way of the host.

mod card;
mod kernels;
mod plan;
mod reach;

use super::DeviceCall;
use super::carry::Carry;
use super::cut::Side;
use crate::call::{Call, Piece};
use crate::submitter::Submitter;
use crate::{Collective, CollectiveError, DType};
use card::Card;
use gradwire_transport::Region;
use gradwire_transport::cuda::{Act, Copying, CudaError, DeviceMemory, DeviceSlice};
pub use kernels::DeviceKernels;
use plan::{Place, Round, SET_BYTES, SETS, Seen, Task};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Bytes of a slot.
const SLOT_BYTES: usize = SETS * SET_BYTES;

/// What a group knows of its ranks' devices.
pub(crate) struct Neighbours {
    /// Whether all ranks are on this host.
    pub(super) here: bool,
    /// Why this rank lends nothing, where it does not.
    pub(super) refusal: Option<String>,
    /// The file that stands for NVRTC.
    pub(super) compiler: Option<PathBuf>,
    /// For the one thread that carries calls out.
    near: Mutex<Option<Near>>,
    words: Mutex<Option<String>>,
}

/// What the ranks of a host have told each other.
enum Near {
    /// They reach each other's devices.
    Reached(Reached),
    /// They do not, and why.
    Not(String),
}

/// Memory that ranks lend each other.
struct Reached {
    /// Every rank's slot, as this rank's device reaches it.
    slots: Vec<Arc<DeviceMemory>>,
    /// Where all ranks can fold on their devices; else why not.
    kernels: Result<DeviceKernels, String>,
    /// Rounds so far, which tell whose turn the sets are.
    round: usize,
    ordinal: u32,
    /// Whether a rank is of another process.
    abroad: bool,
}

impl Neighbours {
    pub(super) fn new(here: bool, refusal: Option<String>, compiler: Option<PathBuf>) -> Self {
        Self { here, refusal, compiler, near: Mutex::default(), words: Mutex::default() }
    }

    /// How long calls travel, in words, once there was one.
    pub(super) fn words(&self) -> Option<String> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Carries a call of several rounds out, if it can go by this way; all ranks say the same. However it ends, the device is done
    /// with what was begun.
    pub(super) fn carry(&self, carry: &mut Carry) -> Result<bool, CollectiveError> {
        if !self.here || carry.submitter.world_size.get() == 1 {
            return Ok(false);
        }
        let mut near = self.near.lock().unwrap_or_else(PoisonError::into_inner);
        if near.is_none() {
            let met = Near::meet(self, carry)?;
            *self.words.lock().unwrap_or_else(PoisonError::into_inner) = Some(met.words());
            *near = Some(met);
        }
        match &mut *near {
            Some(Near::Reached(reached)) => reached.carry(carry),
            _ => Ok(false),
        }
    }
}

impl Near {
    /// Has all ranks tell each other what they lend. All do this at once.
    fn meet(wanted: &Neighbours, carry: &Carry) -> Result<Self, CollectiveError> {
        let (lane, submitter, deadline) = (&carry.lane, &carry.submitter, carry.deadline);
        let lent = match &wanted.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => reach::lend(&lane.device).map_err(|error| error.to_string()),
        };
        let kernels = DeviceKernels::new(&lane.device, wanted.compiler.as_deref()).map_err(|error| error.to_string());
        let own = Card {
            process: *reach::PROCESS,
            address: lent.as_ref().map_or(0, |(memory, _)| memory.address()),
            handle: lent.as_ref().map_or([0; 64], |(_, handle)| *handle),
            folds: kernels.is_ok(),
            words: lent.as_ref().err().or(kernels.as_ref().err()).cloned().unwrap_or_default(),
            willing: lent.is_ok(),
        };
        let cards = gather(submitter, &own, deadline)?;
        if let Some(reason) = refusal(&cards) {
            return Ok(Self::Not(reason));
        }
        let memory = lent.map(|(memory, _)| memory);
        let me = submitter.rank.index();
        let reach = |(rank, card): (usize, &Card)| match &memory {
            Ok(memory) if rank == me => Ok(Arc::clone(memory)),
            _ => reach::reach(&lane.device, card),
        };
        let slots: Result<Vec<_>, _> = cards.iter().enumerate().map(reach).collect();
        let words = slots.as_ref().err().map(CudaError::to_string).unwrap_or_default();
        let own = Card { willing: slots.is_ok(), words, ..own };
        let reached = gather(submitter, &own, deadline)?;
        match (slots, refusal(&reached)) {
            (Ok(slots), None) => {
                let cannot = cards.iter().position(|card| !card.folds);
                let because = cannot.map(|rank| format!("rank {rank}: {}", cards[rank].words));
                let kernels = kernels.and_then(|kernels| because.map_or(Ok(kernels), Err));
                let abroad = cards.iter().any(|card| card.process != *reach::PROCESS);
                Ok(Self::Reached(Reached { slots, kernels, round: 0, ordinal: lane.device.ordinal(), abroad }))
            }
            (Err(error), _) => Ok(Self::Not(error.to_string())),
            (_, Some(reason)) => Ok(Self::Not(reason)),
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Not(reason) => format!("calls of several rounds staged too, as CUDA IPC is not to be had ({reason})"),
            Self::Reached(reached) => {
                let folds = match &reached.kernels {
                    Ok(kernels) => kernels
                        .words()
                        .map_or_else(|error| error.to_string(), |words| format!("folded there ({words})")),
                    Err(reason) => format!("reductions staged ({reason})"),
                };
                format!("calls of several rounds by CUDA IPC, {} MiB lent, {folds}", SLOT_BYTES >> 20)
            }
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
        seen.rounds(SET_BYTES)
    }

    fn place(&self, place: &Place, call: &DeviceCall) -> Result<DeviceSlice, CollectiveError> {
        Ok(match place {
            Place::Piece { side, piece, range } => {
                let pieces = if *side == Side::Input { &call.input } else { &call.output };
                pieces[*piece].part(range.clone())
            }
            Place::Slot { rank, range } => {
                let set = self.round % SETS * SET_BYTES;
                self.slots[*rank]
                    .slice(set + range.start..set + range.end)
                    .map_err(|error| super::in_use(&call.words(), &error))?
            }
        })
    }

    fn begin(&mut self, tasks: &[Task], carry: &Carry) -> Result<Option<Copying<Vec<DeviceSlice>>>, CollectiveError> {
        let call = &carry.call;
        let mut places = Vec::with_capacity(tasks.len());
        for task in tasks {
            places.push(match task {
                Task::Copy { from, to } => (vec![self.place(from, call)?], self.place(to, call)?, false),
                Task::Fold { from, into } => {
                    let from = from.iter().map(|place| self.place(place, call)).collect::<Result<_, _>>()?;
                    (from, self.place(into, call)?, true)
                }
            });
        }
        let kernel = match (call.collective.reduction(), &mut self.kernels) {
            (Some(op), Ok(kernels)) => Some(kernels.get(call.dtype, op)?),
            _ => None,
        };
        let acts = places.into_iter().flat_map(|(from, to, folds)| match kernel.filter(|_| folds) {
            Some(kernel) => vec![Act::Fold { kernel, from, into: to }],
            None => from.into_iter().map(|from| Act::Copy { from, to: to.clone() }).collect(),
        });
        Ok(carry.lane.out.work(acts.collect())?)
    }

    fn carry(&mut self, carry: &mut Carry) -> Result<bool, CollectiveError> {
        let Some(rounds) = self.rounds(&carry.call, &carry.submitter) else { return Ok(false) };
        let ordinal = carry.lane.device.ordinal();
        if ordinal != self.ordinal {
            let reason = format!(
                "the group's long calls go by CUDA IPC from device {}, and this one is on device {ordinal}: keep each rank's \
                 tensors on one device, or set GRADWIRE_CUDA_IPC=0 on all ranks",
                self.ordinal
            );
            return Err(CollectiveError::Invalid { call: carry.call.words(), reason });
        }
        carry.lane.out.wait_for(&carry.ready)?;
        let mut working = Vec::new();
        let outcome = self.all_rounds(&rounds, carry, &mut working);
        Copying::let_go(working);
        if outcome.is_err() && self.abroad {
            // Another process's device may still read it, and nobody tells when that ends.
            std::mem::forget(Arc::clone(&self.slots[carry.submitter.rank.index()]));
        }
        outcome.map(|()| true)
    }

    fn all_rounds(
        &mut self,
        rounds: &[Round],
        carry: &Carry,
        working: &mut Vec<Copying<Vec<DeviceSlice>>>,
    ) -> Result<(), CollectiveError> {
        for round in rounds {
            for (number, tasks) in round.iter().enumerate() {
                if number > 0 {
                    carry.settle(working)?;
                    step(&carry.submitter, carry.deadline)?;
                }
                working.extend(self.begin(tasks, carry)?);
            }
            self.round += 1;
        }
        // Nobody leaves, and takes its slot along, while another still reads it.
        carry.settle(working)?;
        step(&carry.submitter, carry.deadline)
    }
}

/// What another rank has told.
fn gather(submitter: &Submitter, own: &Card, deadline: Instant) -> Result<Vec<Card>, CollectiveError> {
    let ranks = submitter.world_size.get() as usize;
    let (input, output) = (Region::from_vec(own.encode().to_vec()), Region::zeroed(ranks * card::BYTES));
    let (give, get) = (Piece::whole(input), Piece::whole(Arc::clone(&output)));
    let timeout = Some(deadline.saturating_duration_since(Instant::now()));
    submitter.run(Call {
        collective: Collective::AllGather,
        dtype: DType::U8,
        input: vec![give],
        output: vec![get],
        timeout,
    })?;
    let all = output.read(0..output.len()).map_err(|error| super::in_use("the meeting of devices", &error))?;
    Ok(all.as_chunks::<{ card::BYTES }>().0.iter().map(Card::decode).collect())
}

/// The first rank that takes no part, and why.
fn refusal(cards: &[Card]) -> Option<String> {
    let rank = cards.iter().position(|card| !card.willing)?;
    Some(format!("rank {rank}: {}", cards[rank].words))
}

fn step(submitter: &Submitter, deadline: Instant) -> Result<(), CollectiveError> {
    let timeout = Some(deadline.saturating_duration_since(Instant::now()));
    submitter.run(Call { collective: Collective::Barrier, dtype: DType::U8, input: vec![], output: vec![], timeout })
}
