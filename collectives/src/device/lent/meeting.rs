//! Does: has all ranks of a group tell each other what they lend, once, by two collectives of its own. One rank that cannot is enough
//! for all to go by way of the host.

use super::card::{self, Card};
use super::plan::hierarchy::Between;
use super::reach::{self, Own, Slot};
use super::{DeviceKernels, Lending, Reached};
use crate::call::{Call, Piece};
use crate::device::carry::Carry;
use crate::submitter::Submitter;
use crate::{Collective, CollectiveError, DType};
use gradwire_transport::cuda::HANDLE_BYTES;
use gradwire_transport::{Rank, Region, RemoteSlice};
use std::sync::Arc;
use std::time::Instant;

/// What the ranks have told each other.
pub(super) enum Met {
    /// They reach each other's devices.
    Reached(Box<Reached>),
    /// They do not, and why.
    Not(String),
}

impl Met {
    /// Has all ranks tell each other what they lend. All do this at once.
    pub(super) fn new(lending: &Lending, carry: &Carry) -> Result<Self, CollectiveError> {
        let (device, submitter) = (&carry.lane.device, &carry.submitter);
        let lent = match &lending.refusal {
            Some(refusal) => Err(refusal.clone()),
            None => reach::lend(device, &lending.links, submitter),
        };
        let load = || DeviceKernels::new(device, lending.compiler.as_deref()).map_err(|error| error.to_string());
        let kernels = lent.as_ref().map_err(Clone::clone).and_then(|_| load());
        let apart = lent.as_ref().ok().and_then(|own| own.apart.clone());
        let own = Card {
            process: *reach::PROCESS,
            address: lent.as_ref().map_or(0, |own| own.memory.address()),
            handle: lent.as_ref().map_or([0; HANDLE_BYTES], |own| own.handle),
            remote: lent.as_ref().map_or(RemoteSlice { key: 0, offset: 0, bytes: 0 }, |own| own.exposed),
            folds: kernels.is_ok(),
            words: apart.or_else(|| kernels.as_ref().err().cloned()).unwrap_or_default(),
            willing: lent.as_ref().is_ok_and(|own| own.apart.is_none()),
            near: lent.as_ref().is_ok_and(|own| own.near),
        };
        let cards = gather(submitter, &own, carry.deadline)?;
        let all_near = cards.iter().all(|card| card.near);
        let (lent, apart) = match (lent, refusal(&cards)) {
            (Ok(lent), None) => (lent, None),
            (Ok(lent), Some(reason)) if all_near => (lent, Some(reason)),
            (Ok(lent), Some(reason)) => return Ok(Self::not(&lent, submitter, reason)),
            (Err(own), reason) => return Ok(Self::Not(reason.unwrap_or(own))),
        };
        if apart.is_some() {
            reach::take_back(&lent, submitter);
        }
        let host = |rank| submitter.chooser.hosts().map(|hosts| hosts.place(rank).0);
        let is_away = |rank| apart.is_some() && host(Rank(rank)) != host(submitter.rank);
        let reach = |(rank, card): (u32, &Card)| match lending.links.iter().find(|(other, _)| *other == Rank(rank)) {
            Some(_) if is_away(rank) => Ok(Slot::Away),
            Some((_, link)) => reach::reach(device, card, *link).map_err(|error| error.to_string()),
            None => Ok(Slot::Near(Arc::clone(&lent.memory))),
        };
        let slots: Result<Vec<_>, String> = (0..).zip(&cards).map(reach).collect();
        let words = slots.as_ref().err().or(kernels.as_ref().err()).cloned().unwrap_or_default();
        let reached = gather(submitter, &Card { willing: slots.is_ok(), words, ..own }, carry.deadline)?;
        let between = all_near.then_some(if apart.is_some() { Between::Staged } else { Between::Direct });
        let slots = match (slots, refusal(&reached)) {
            (Ok(slots), None) => slots,
            (_, Some(reason)) | (Err(reason), None) => return Ok(Self::not(&lent, submitter, reason)),
        };
        let cannot = cards.iter().position(|card| !card.folds);
        let because = cannot.map(|rank| format!("rank {rank}: {}", reached[rank].words));
        let kernels = kernels.and_then(|kernels| because.map_or(Ok(kernels), Err));
        let abroad = cards.iter().any(|card| card.process != *reach::PROCESS);
        let reached = Reached { slots, own: lent, kernels, round: 0, ordinal: device.ordinal(), abroad, between };
        Ok(Self::Reached(Box::new(reached)))
    }

    fn not(lent: &Own, submitter: &Submitter, reason: String) -> Self {
        reach::take_back(lent, submitter);
        Self::Not(reason)
    }

    /// How long calls travel, in words.
    pub(super) fn words(&self) -> String {
        match self {
            Self::Not(reason) => {
                format!("calls of several rounds staged too, as devices do not reach each other ({reason})")
            }
            Self::Reached(reached) => {
                let folds = match &reached.kernels {
                    Ok(kernels) => kernels
                        .words()
                        .map_or_else(|error| error.to_string(), |words| format!("folded there ({words})")),
                    Err(reason) => format!("reductions staged ({reason})"),
                };
                let lent = format!("{} MiB lent, {folds}", reached.own.memory.len() >> 20);
                let ways = &reached.own.ways;
                match reached.between {
                    Some(Between::Staged) => format!(
                        "all_reduce, reduce_scatter and all_gather of several rounds inside each host by CUDA IPC, {lent}; between \
                         hosts each rank's share staged"
                    ),
                    Some(Between::Direct) => format!(
                        "calls of several rounds from device to device by {ways}, {lent}; all_reduce inside each host first"
                    ),
                    None => format!("calls of several rounds from device to device by {ways}, {lent}"),
                }
            }
        }
    }
}

/// What all ranks have told.
fn gather(submitter: &Submitter, own: &Card, deadline: Instant) -> Result<Vec<Card>, CollectiveError> {
    let ranks = submitter.world_size.get() as usize;
    let (input, output) = (Region::from_vec(own.encode().to_vec()), Region::zeroed(ranks * card::BYTES));
    let (give, get) = (Piece::whole(input), Piece::whole(Arc::clone(&output)));
    let timeout = Some(deadline.saturating_duration_since(Instant::now()));
    let (collective, dtype) = (Collective::AllGather, DType::U8);
    submitter.run(Call { collective, dtype, input: vec![give], output: vec![get], timeout })?;
    let all = output.read(0..output.len()).map_err(|error| crate::device::in_use("the meeting of devices", &error))?;
    Ok(all.as_chunks::<{ card::BYTES }>().0.iter().map(Card::decode).collect())
}

/// The first rank that takes no part, and why.
fn refusal(cards: &[Card]) -> Option<String> {
    let rank = cards.iter().position(|card| !card.willing)?;
    Some(format!("rank {rank}: {}", cards[rank].words))
}
