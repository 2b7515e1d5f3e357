//! Does: has all ranks of a group tell each other what they lend and how fast they fold, once, by collectives of its own. One rank that
//! cannot is enough for all to go by way of the host.

use super::card::{self, Card, Told};
use super::plan::SET_BYTES;
use super::plan::hierarchy::Between;
use super::reach::{self, Own, Slot};
use super::{DeviceKernels, Lending, Reached};
use crate::call::{Call, Piece};
use crate::device::carry::Carry;
use crate::device::fold::{FoldPlace, Folding, Rates, Way};
use crate::device::measure;
use crate::submitter::Submitter;
use crate::{Collective, CollectiveError, DType};
use gradwire_transport::cuda::{DeviceMemory, HANDLE_BYTES};
use gradwire_transport::{Rank, Region, RemoteSlice, WorldSize};
use std::sync::Arc;
use std::time::Instant;

/// What the ranks have told each other.
pub(super) struct Met {
    /// What calls are carried out by from device to device, or by what is brought to each; none where nothing is.
    pub(super) reached: Option<Box<Reached>>,
    /// Why devices do not reach each other, where they do not.
    refusal: Option<String>,
    /// Where reductions are folded.
    pub(super) folding: Folding,
}

/// Memory of devices that ranks reach.
struct Linked {
    slots: Vec<Slot>,
    own: Own,
    between: Option<Between>,
    /// Whether a rank is of another process.
    abroad: bool,
}

impl Met {
    /// Has all ranks tell each other what they lend. All do this at once.
    pub(super) fn new(lending: &Lending, carry: &Carry) -> Result<Self, CollectiveError> {
        let linked = link(lending, carry)?;
        let device = &carry.lane.device;
        let load = || DeviceKernels::new(device, lending.compiler.as_deref()).map_err(|error| error.to_string());
        let kernels = match lending.wish {
            Some(FoldPlace::Host) => Err("told not to by GRADWIRE_CUDA_REDUCE=host".to_owned()),
            _ => load(),
        };
        let (refusal, way, mut reached) = match linked {
            Ok(linked) => (None, way_of(linked.between, carry), Ok(Reached::new(linked, kernels, device))),
            Err(reason) => (Some(reason), Way::Brought, brought(lending, carry, kernels)),
        };
        let told = told(lending, carry, &mut reached);
        let abroad =
            reached.as_ref().ok().filter(|reached| reached.abroad).map(|reached| Arc::clone(&reached.own.memory));
        let all = gather(&carry.submitter, told.encode(), carry.deadline).inspect_err(|_| {
            // Another process's device, or a card, may still read it.
            std::mem::forget(abroad);
        })?;
        let folding = folding(&all.iter().map(Told::decode).collect::<Vec<_>>(), way);
        let mut reached = reached.ok().map(Box::new);
        if let (Folding::OnHosts(reason), Some(kept)) = (&folding, &mut reached) {
            lending.leave(std::mem::replace(&mut kept.kernels, Err(reason.clone())));
        }
        if reached.as_ref().is_some_and(|reached| reached.brings && reached.kernels.is_err()) {
            lending.leave(reached.take());
        }
        Ok(Self { reached, refusal, folding })
    }

    /// How long calls travel, in words.
    pub(super) fn words(&self, submitter: &Submitter) -> Vec<String> {
        let ways = match (&self.refusal, &self.reached) {
            (None, Some(reached)) => reached.words(),
            (Some(reason), Some(reached)) => format!(
                "calls of several rounds staged too, as devices do not reach each other ({reason}); {} MiB for what is brought to the \
                 device, folded there{}",
                reached.own.memory.len() >> 20,
                reached.compiled()
            ),
            (reason, _) => format!(
                "calls of several rounds staged too, as devices do not reach each other ({})",
                reason.as_deref().unwrap_or_default()
            ),
        };
        [ways].into_iter().chain(self.folding.words(&submitter.chooser, submitter.world_size)).collect()
    }
}

impl Reached {
    fn new(
        linked: Linked,
        kernels: Result<DeviceKernels, String>,
        device: &Arc<gradwire_transport::cuda::Device>,
    ) -> Self {
        let Linked { slots, own, between, abroad } = linked;
        Self { slots, own, kernels, round: 0, ordinal: device.ordinal(), abroad, between, brings: false }
    }

    fn words(&self) -> String {
        let folds = match &self.kernels {
            Ok(_) => format!("folded there{}", self.compiled()),
            Err(reason) => format!("reductions staged ({reason})"),
        };
        let lent = format!("{} MiB lent, {folds}", self.own.memory.len() >> 20);
        let ways = &self.own.ways;
        match self.between {
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

    fn compiled(&self) -> String {
        let words = self.kernels.as_ref().ok().map(DeviceKernels::words);
        words.map_or_else(String::new, |words| format!(" ({})", words.unwrap_or_else(|error| error.to_string())))
    }
}

/// Has all ranks find out whether they reach each other's devices; if not, why. All say the same.
fn link(lending: &Lending, carry: &Carry) -> Result<Result<Linked, String>, CollectiveError> {
    let (device, submitter) = (&carry.lane.device, &carry.submitter);
    let lent = match &lending.refusal {
        Some(refusal) => Err(refusal.clone()),
        None => reach::lend(device, &lending.links, submitter),
    };
    let apart = lent.as_ref().map_or_else(|own| Some(own.clone()), |own| own.apart.clone());
    let own = Card {
        process: *reach::PROCESS,
        address: lent.as_ref().map_or(0, |own| own.memory.address()),
        handle: lent.as_ref().map_or([0; HANDLE_BYTES], |own| own.handle),
        remote: lent.as_ref().map_or(RemoteSlice { key: 0, offset: 0, bytes: 0 }, |own| own.exposed),
        words: apart.unwrap_or_default(),
        willing: lent.as_ref().is_ok_and(|own| own.apart.is_none()),
        near: lent.as_ref().is_ok_and(|own| own.near),
    };
    let cards = gather_cards(submitter, &own, carry.deadline)?;
    let all_near = cards.iter().all(|card| card.near);
    let (lent, apart) = match (lent, refusal(&cards)) {
        (Ok(lent), None) => (lent, None),
        (Ok(lent), Some(reason)) if all_near => (lent, Some(reason)),
        (Ok(lent), Some(reason)) => return Ok(Err(not(lent, lending, submitter, reason))),
        (Err(own), reason) => return Ok(Err(reason.unwrap_or(own))),
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
    let words = slots.as_ref().err().cloned().unwrap_or_default();
    let reached = gather_cards(submitter, &Card { willing: slots.is_ok(), words, ..own }, carry.deadline)?;
    let between = all_near.then_some(if apart.is_some() { Between::Staged } else { Between::Direct });
    let abroad = cards.iter().any(|card| card.process != *reach::PROCESS);
    Ok(match (slots, refusal(&reached)) {
        (Ok(slots), None) => Ok(Linked { slots, own: lent, between, abroad }),
        (slots, told) => {
            let reason = told.or(slots.as_ref().err().cloned()).unwrap_or_default();
            lending.leave(slots);
            Err(not(lent, lending, submitter, reason))
        }
    })
}

fn not(lent: Own, lending: &Lending, submitter: &Submitter, reason: String) -> String {
    reach::take_back(&lent, submitter);
    lending.leave(lent);
    reason
}

/// What folds what is brought to this rank's device; else why nothing does.
fn brought(lending: &Lending, carry: &Carry, kernels: Result<DeviceKernels, String>) -> Result<Reached, String> {
    let (kernels, device, submitter) = (kernels?, &carry.lane.device, &carry.submitter);
    let memory = match lending.checks_nan {
        true => Err("GRADWIRE_CHECK_NAN=1 looks through what hosts fold".to_owned()),
        false => DeviceMemory::allocate(device, SET_BYTES).map_err(|error| error.to_string()),
    };
    let memory = match memory {
        Ok(memory) => memory,
        Err(reason) => {
            lending.leave(kernels);
            return Err(reason);
        }
    };
    let slot = |rank| if rank == submitter.rank { Slot::Near(Arc::clone(&memory)) } else { Slot::Away };
    let slots = submitter.world_size.ranks().map(slot).collect();
    let linked = Linked { slots, own: Own::alone(memory), between: None, abroad: false };
    Ok(Reached { brings: true, ..Reached::new(linked, Ok(kernels), device) })
}

/// What this rank tells of how it folds on its device. It measures that where it was not told where to fold.
fn told(lending: &Lending, carry: &Carry, reached: &mut Result<Reached, String>) -> Told {
    let insists = lending.wish == Some(FoldPlace::Device);
    let measured = match reached {
        Err(reason) => Err(reason.clone()),
        Ok(Reached { kernels: Err(reason), .. }) => Err(reason.clone()),
        Ok(_) if insists => Ok(None),
        Ok(reached) => reached.measured(carry).map(Some).map_err(|error| format!("measuring: {error}")),
    };
    let rates = measured.as_ref().ok().copied().flatten();
    Told { able: measured.map(drop), insists, rates }
}

impl Reached {
    fn measured(&mut self, carry: &Carry) -> Result<Rates, CollectiveError> {
        let Ok(kernels) = &mut self.kernels else { unreachable!("who cannot fold measures nothing") };
        // Others read the first half of a set meanwhile.
        let space = SET_BYTES / 2..SET_BYTES / 2 + measure::SPACE_BYTES;
        let space = self.own.memory.slice(space).expect("a set is longer than what is measured of it");
        let rates = measure::rates(&carry.lane, kernels, &space, carry.deadline)?;
        Ok(if self.brings { rates } else { Rates { reach: self.pace(carry)?, ..rates } })
    }
}

fn way_of(between: Option<Between>, carry: &Carry) -> Way {
    let hosts = carry.submitter.chooser.hosts().filter(|_| between == Some(Between::Staged));
    let by_hosts = hosts.and_then(|hosts| Some((hosts.most(), WorldSize::new(hosts.count() as u32)?)));
    by_hosts.map_or(Way::Lent, |(each, hosts)| Way::ByHosts { each, hosts })
}

/// Where reductions are folded, by what all ranks told: on the hosts where one cannot do otherwise.
fn folding(all: &[Told], way: Way) -> Folding {
    let unable = all.iter().enumerate().find_map(|(rank, told)| Some((rank, told.able.as_ref().err()?)));
    if let Some((rank, reason)) = unable {
        return Folding::OnHosts(format!("rank {rank}: {reason}"));
    }
    match all.iter().position(|told| told.insists) {
        Some(rank) => Folding::Told(rank, way),
        None => Folding::Measured(Rates::slowest(all.iter().filter_map(|told| told.rates)), way),
    }
}

fn gather_cards(submitter: &Submitter, own: &Card, deadline: Instant) -> Result<Vec<Card>, CollectiveError> {
    Ok(gather(submitter, own.encode(), deadline)?.iter().map(Card::decode).collect())
}

/// What all ranks have told.
fn gather(
    submitter: &Submitter,
    own: [u8; card::BYTES],
    deadline: Instant,
) -> Result<Vec<[u8; card::BYTES]>, CollectiveError> {
    let ranks = submitter.world_size.get() as usize;
    let (input, output) = (Region::from_vec(own.to_vec()), Region::zeroed(ranks * card::BYTES));
    let (give, get) = (Piece::whole(input), Piece::whole(Arc::clone(&output)));
    let timeout = Some(deadline.saturating_duration_since(Instant::now()));
    let (collective, dtype) = (Collective::AllGather, DType::U8);
    submitter.run(Call { collective, dtype, input: vec![give], output: vec![get], timeout })?;
    let all = output.read(0..output.len()).map_err(|error| crate::device::in_use("the meeting of devices", &error))?;
    Ok(all.as_chunks::<{ card::BYTES }>().0.to_vec())
}

/// The first rank that takes no part, and why.
fn refusal(cards: &[Card]) -> Option<String> {
    let rank = cards.iter().position(|card| !card.willing)?;
    Some(format!("rank {rank}: {}", cards[rank].words))
}
