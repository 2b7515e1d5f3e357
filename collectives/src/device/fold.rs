//! Pure: where what is on CUDA devices is folded in calls of several rounds: on the devices or on the hosts, wherever the call is
//! expected to take less by what all ranks have measured. All of them have the same numbers, so all choose alike.

use super::cut::{SLOT_BYTES, ring_rounds};
use super::lent::{DeviceKernels, SET_BYTES, SLACK};
use crate::choose::Chooser;
use crate::cost::COMBINE_NS;
use crate::{Collective, DType};
use gradwire_transport::WorldSize;

/// A place where elements are folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoldPlace {
    /// On the ranks' devices.
    Device,
    /// On their hosts, while what is folded passes through.
    Host,
}

/// What work takes that begins on a device: once, and for each byte.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub(crate) struct Pace {
    pub(crate) begin_ns: f64,
    pub(crate) byte_ns: f64,
}

/// What a rank has measured, or the slowest of several.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub(crate) struct Rates {
    /// The host folds a byte of one source into another, by type as [`DeviceKernels::TYPES`] has them.
    pub(crate) host_ns: [f64; DeviceKernels::TYPES.len()],
    /// Copies to the host, and to the device.
    pub(crate) out: Pace,
    pub(crate) into: Pace,
    /// A kernel reads a byte of its own device's memory, and folds it; of any type, since memory is the slower.
    pub(crate) fold: Pace,
    /// The same of memory that ranks lend each other, by the way that leads there.
    pub(crate) reach: Pace,
}

/// Bytes of rates.
pub(crate) const RATES_BYTES: usize = 8 * (DeviceKernels::TYPES.len() + 8);

/// By which way what is folded on devices comes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Ranks read each other's.
    Lent,
    /// Those of a host do; what a host has folded goes to the others by way of its memory.
    ByHosts {
        /// Ranks of a host.
        each: usize,
        hosts: WorldSize,
    },
    /// By way of the hosts' memory.
    Brought,
}

impl Way {
    /// Whether such a call can go by it. What is to be in the order of the ranks cannot be in that of the hosts first.
    fn leads(self, asked: Asked<'_>, chooser: &Chooser) -> bool {
        let to_one = matches!(asked.collective, Collective::Reduce { .. });
        match self {
            Self::Lent => true,
            Self::ByHosts { .. } => !to_one && !chooser.orders(asked.collective, asked.dtype),
            Self::Brought => !to_one,
        }
    }
}

/// A reduction over devices' memory: `bytes` of a rank's buffer, or part.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) collective: &'a Collective,
    pub(crate) dtype: DType,
    pub(crate) bytes: usize,
    pub(crate) world_size: WorldSize,
}

/// Nanoseconds that a reduction is expected to take, by where it is folded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Expected {
    pub(crate) device_ns: f64,
    pub(crate) host_ns: f64,
}

impl Expected {
    /// Where it takes less.
    pub(crate) fn place(self) -> FoldPlace {
        if self.device_ns <= self.host_ns { FoldPlace::Device } else { FoldPlace::Host }
    }
}

impl Rates {
    fn numbers(&self) -> impl Iterator<Item = f64> + use<> {
        let paces = [self.out, self.into, self.fold, self.reach];
        self.host_ns.into_iter().chain(paces.into_iter().flat_map(|pace| [pace.begin_ns, pace.byte_ns]))
    }

    fn of(mut next: impl FnMut() -> Option<f64>) -> Option<Self> {
        let mut host_ns = [0.0; DeviceKernels::TYPES.len()];
        for ns in &mut host_ns {
            *ns = next()?;
        }
        let mut pace = || Some(Pace { begin_ns: next()?, byte_ns: next()? });
        Some(Self { host_ns, out: pace()?, into: pace()?, fold: pace()?, reach: pace()? })
    }

    pub(crate) fn encode(&self) -> [u8; RATES_BYTES] {
        let mut bytes = [0; RATES_BYTES];
        bytes.as_chunks_mut().0.iter_mut().zip(self.numbers()).for_each(|(to, number)| *to = number.to_le_bytes());
        bytes
    }

    /// `None` for what are no rates: numbers that are none, or too few.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut numbers = bytes.as_chunks().0.iter().map(|eight| f64::from_le_bytes(*eight));
        Self::of(|| numbers.next().filter(|ns| ns.is_finite() && *ns >= 0.0))
    }

    /// The slowest of each: a call is as slow as its slowest rank.
    pub(crate) fn slowest(all: impl IntoIterator<Item = Self>) -> Self {
        all.into_iter().fold(Self::default(), |one, other| {
            let mut numbers = one.numbers().zip(other.numbers()).map(|(one, other)| one.max(other));
            Self::of(|| numbers.next()).expect("there are as many")
        })
    }

    /// What the host takes for a byte of `dtype` more than what links are expected to take has in it.
    fn excess_ns(&self, dtype: DType) -> f64 {
        let at = DeviceKernels::TYPES.iter().position(|known| *known == dtype);
        (at.map_or(0.0, |at| self.host_ns[at]) - COMBINE_NS).max(0.0)
    }

    /// What is expected of `asked` at each place, where devices are reached by `way`.
    pub(crate) fn expected(&self, way: Way, asked: Asked<'_>, chooser: &Chooser) -> Expected {
        let device_ns = match way {
            Way::Brought => self.brought_ns(asked, chooser),
            Way::Lent => self.lent_ns(asked, asked.world_size.get() as usize, chooser),
            Way::ByHosts { each, hosts } => {
                self.lent_ns(asked, each, chooser) + self.across_ns(asked, each, hosts, chooser)
            }
        };
        Expected { device_ns, host_ns: self.host_ns(asked, chooser) }
    }

    /// Staged, and folded on the hosts.
    fn host_ns(&self, asked: Asked<'_>, chooser: &Chooser) -> f64 {
        let (n, b) = (f64::from(asked.world_size.get()), asked.bytes as f64);
        let (given, folded, room) = match asked.collective {
            Collective::ReduceScatter { .. } => (n * b, (n - 1.0) * b, SLOT_BYTES as f64 / (n + 1.0)),
            _ => (b, (n - 1.0) / n * b, SLOT_BYTES as f64),
        };
        let rounds = (b / room).ceil().max(1.0);
        let wire_ns = rounds * message_ns(asked.collective, asked.dtype, b / rounds, asked.world_size, chooser);
        self.staged_ns(given, b, rounds, wire_ns + folded * self.excess_ns(asked.dtype))
    }

    /// Staged, and folded on the devices: what a rank folds comes to it, and what it has folded goes to the others.
    fn brought_ns(&self, asked: Asked<'_>, chooser: &Chooser) -> f64 {
        let (n, b) = (f64::from(asked.world_size.get()), asked.bytes as f64);
        let scatters = matches!(asked.collective, Collective::ReduceScatter { .. });
        let given = if scatters { n * b } else { b };
        let sets = (given / SET_BYTES as f64).ceil().max(1.0);
        let (given, share) = (given / sets, given / sets / n);
        let leg = |collective: &Collective, parts: f64, out: f64, into: f64| {
            let rounds = ring_rounds(parts as usize, share as usize, SLACK).unwrap_or(1) as f64;
            let wire_ns = rounds * message_ns(collective, asked.dtype, share / rounds, asked.world_size, chooser);
            self.staged_ns(out, into, rounds, wire_ns)
        };
        let come = leg(&Collective::AllToAll, 2.0 * n, given, given);
        let go = if scatters { 0.0 } else { leg(&Collective::AllGather, n + 1.0, share, given) };
        sets * (come + self.fold.begin_ns + given * self.fold.byte_ns + go)
    }

    /// Among `n` ranks that reach each other's devices: a copy to the slot, a fold of all ranks', and what the others have folded.
    fn lent_ns(&self, asked: Asked<'_>, n: usize, chooser: &Chooser) -> f64 {
        let b = asked.bytes as f64;
        let (put, read, steps) = match asked.collective {
            Collective::ReduceScatter { .. } => {
                let all = f64::from(asked.world_size.get()) * b;
                (all, all, 1.0)
            }
            _ => (b, 2.0 * b, if n == 2 { 1.0 } else { 2.0 }),
        };
        let sets = (put / SET_BYTES as f64).ceil().max(1.0);
        let step_ns = message_ns(&Collective::AllGather, DType::U8, 0.0, asked.world_size, chooser);
        let begin_ns = self.fold.begin_ns + steps * (step_ns + self.reach.begin_ns);
        sets * begin_ns + step_ns + put * self.fold.byte_ns + read * self.reach.byte_ns
    }

    /// What a rank has of that between `hosts` hosts of `each` ranks.
    fn across_ns(&self, asked: Asked<'_>, each: usize, hosts: WorldSize, chooser: &Chooser) -> f64 {
        let (h, b) = (f64::from(hosts.get()), asked.bytes as f64);
        let (given, share, parts) = match asked.collective {
            Collective::ReduceScatter { .. } => (h * b, b, hosts.get() as usize + 1),
            _ => (b / each as f64, b / each as f64, 1),
        };
        let sets = (given * each as f64 / SET_BYTES as f64).ceil().max(1.0);
        let rounds = ring_rounds(parts, (share / sets) as usize, SLACK).unwrap_or(1) as f64;
        let apart = chooser.apart(hosts);
        let wire_ns = rounds * message_ns(asked.collective, asked.dtype, share / sets / rounds, hosts, &apart);
        let folded = (h - 1.0) / h * given * self.excess_ns(asked.dtype);
        sets * self.staged_ns(given / sets, share / sets, rounds, wire_ns) + folded
    }

    /// `rounds` rounds of copies out, messages of `wire_ns` in all, and copies in, each beside the others: the longest, and what there
    /// is of the others before its first round and behind its last.
    fn staged_ns(&self, out: f64, into: f64, rounds: f64, wire_ns: f64) -> f64 {
        let copies_ns = |pace: Pace, bytes: f64| rounds * pace.begin_ns + bytes * pace.byte_ns;
        let all = [copies_ns(self.out, out), wire_ns, copies_ns(self.into, into)];
        let longest = all.into_iter().fold(0.0, f64::max);
        longest + (all.iter().sum::<f64>() - longest) / rounds
    }
}

/// What a collective over the hosts' memory is expected to take.
fn message_ns(collective: &Collective, dtype: DType, bytes: f64, size: WorldSize, chooser: &Chooser) -> f64 {
    let choice = chooser.choice(collective, dtype, bytes as usize, size);
    let wished = choice.expected_us.iter().find(|(algorithm, _)| *algorithm == choice.algorithm);
    wished.or(choice.expected_us.first()).map_or(0.0, |(_, us)| us * 1e3)
}

/// Where reductions of several rounds are folded.
#[derive(Clone, Debug)]
pub(crate) enum Folding {
    /// On the hosts, and why.
    OnHosts(String),
    /// On the devices, as this rank was told.
    Told(usize, Way),
    /// Where it takes less.
    Measured(Rates, Way),
}

impl Folding {
    /// Where `asked` is folded, of which there is a kernel.
    pub(crate) fn place(&self, asked: Asked<'_>, chooser: &Chooser) -> FoldPlace {
        match self {
            Self::OnHosts(_) => FoldPlace::Host,
            Self::Told(..) => FoldPlace::Device,
            Self::Measured(rates, way) => rates.expected(*way, asked, chooser).place(),
        }
    }

    /// The same in words.
    pub(crate) fn told(&self, asked: Asked<'_>, chooser: &Chooser) -> String {
        let has = asked.collective.reduction().is_some_and(|op| DeviceKernels::has(asked.dtype, op));
        match self {
            Self::OnHosts(reason) => format!("on the hosts ({reason})"),
            _ if !has => format!("on the hosts (no kernel folds {} so)", asked.dtype.name()),
            Self::Told(_, way) | Self::Measured(_, way) if !way.leads(asked, chooser) => {
                "on the hosts (this call has no other way)".to_owned()
            }
            Self::Told(rank, _) => format!("on the devices (rank {rank} was told to by GRADWIRE_CUDA_REDUCE=device)"),
            Self::Measured(rates, way) => {
                let expected @ Expected { device_ns, host_ns } = rates.expected(*way, asked, chooser);
                let place = if expected.place() == FoldPlace::Device { "devices" } else { "hosts" };
                let (device, host) = (device_ns / 1e3, host_ns / 1e3);
                format!("on the {place} (expected: {device:.0} us on the devices, {host:.0} us on the hosts)")
            }
        }
    }

    /// For `describe`: with the figures, and what they come to. `None` where there is no choice.
    pub(crate) fn words(&self, chooser: &Chooser, world_size: WorldSize) -> Option<String> {
        let Self::Measured(rates, way) = self else {
            let Self::Told(rank, _) = self else { return None };
            let words = "reductions of several rounds folded on the devices wherever a kernel does";
            return Some(format!("{words} (rank {rank} was told to by GRADWIRE_CUDA_REDUCE=device)"));
        };
        let gb_per_s =
            |byte_ns: f64| if byte_ns > 0.0 { format!("{:.1} GB/s", 1.0 / byte_ns) } else { "any".to_owned() };
        let pace = |pace: Pace| format!("{} after {:.0} us", gb_per_s(pace.byte_ns), pace.begin_ns / 1e3);
        let sum = Collective::AllReduce { op: crate::Reduction::Sum };
        let asked = |bytes| Asked { collective: &sum, dtype: DType::F32, bytes, world_size };
        let [shorter, longer] = [8usize, 64].map(|mib| self.told(asked(mib << 20), chooser));
        let lent = if *way == Way::Brought { String::new() } else { format!(", others' {}", pace(rates.reach)) };
        Some(format!(
            "reductions of several rounds folded where that takes less; the slowest rank's host folds float32 at {}, copies out {}, in {}, \
             its device folds {}{lent}; all_reduce of 8 MiB {shorter}, of 64 MiB {longer}",
            gb_per_s(rates.host_ns[0]),
            pace(rates.out),
            pace(rates.into),
            pace(rates.fold),
        ))
    }
}

#[cfg(test)]
mod tests;
