//! Pure: what an algorithm is expected to take: messages one after the other, messages at once, bytes, sums.
//!
//! The model is Hockney's, with the cost of a message to its sender: `rounds * latency + messages * message + bytes * byte`,
//! inside a host and between hosts apart. The ranks of a host share what leaves it, and its cores.

use crate::Collective;
use crate::algorithm::Algorithm;
use crate::hosts::Hosts;
use gradwire_transport::{LinkCosts, Rank};

/// What each byte that is combined, or copied within a rank, takes: it is in cache.
pub(crate) const COMBINE_NS: f64 = 0.03;
/// What a round takes more for each rank beyond the first that waits for the same core: another must leave it first.
const SWITCH_NS: f64 = 20_000.0;
/// What a copy of a part within a rank takes beside its bytes.
const COPY_NS: f64 = 150.0;
/// What traffic from everybody to everybody takes more than traffic to neighbours, a byte; and traffic to partners that change
/// from round to round. These and the two above are from `benches/algorithms.rs`.
const CROWD: f64 = 1.1;
const PARTNERS: f64 = 1.05;

/// Who takes part, and what links cost.
#[derive(Clone, Debug)]
pub struct World {
    /// Ranks.
    pub ranks: usize,
    /// Hosts.
    pub hosts: usize,
    /// The most ranks of a host.
    pub most: usize,
    /// The fewest ranks of a host.
    pub fewest: usize,
    /// The most ranks of a host whose right neighbour is on another one.
    pub borders: usize,
    /// What links cost.
    pub costs: LinkCosts,
    /// Bytes of a segment.
    pub segment: usize,
}

impl World {
    /// The world of `ranks` ranks on `hosts`.
    pub fn new(ranks: usize, hosts: &Hosts, costs: LinkCosts, segment: usize) -> Self {
        let right = |rank: &Rank| Rank((rank.0 + 1) % ranks as u32);
        let leaves = |here: &[Rank]| here.iter().filter(|rank| !here.contains(&right(rank))).count();
        let borders = hosts.iter().map(leaves).max().unwrap_or(0);
        Self { ranks, hosts: hosts.count(), most: hosts.most(), fewest: hosts.fewest(), borders, costs, segment }
    }
}

/// What one rank does, and one host.
#[derive(Default)]
struct Work {
    near_rounds: f64,
    far_rounds: f64,
    messages: f64,
    /// Bytes a rank sends inside its host.
    near_bytes: f64,
    /// Bytes that leave a host.
    far_bytes: f64,
    /// Bytes a rank combines or copies.
    combined: f64,
    copies: f64,
}

/// Rounds of doublings to reach `n`.
fn doublings(n: usize) -> f64 {
    f64::from(n.next_power_of_two().ilog2())
}

impl World {
    /// Whether some ranks share a host and others do not.
    pub fn is_mixed(&self) -> bool {
        self.hosts > 1 && self.most > 1
    }

    /// Nanoseconds that `collective` over `bytes` bytes (of a rank's buffer, or part) is expected to take.
    pub fn expected_ns(&self, collective: &Collective, algorithm: Algorithm, bytes: usize) -> f64 {
        let b = bytes as f64;
        let work = match collective {
            Collective::AllReduce { .. } => self.all_reduce(algorithm, b),
            Collective::Reduce { .. } | Collective::Broadcast { .. } => {
                let combines = matches!(collective, Collective::Reduce { .. });
                self.one(algorithm, b, combines)
            }
            Collective::AllGather => self.all_gather(algorithm, b),
            Collective::ReduceScatter { .. } => self.reduce_scatter(algorithm, b),
            Collective::AllToAll if algorithm == Algorithm::Bruck => self.packed(b),
            Collective::Barrier => Work { near_rounds: doublings(self.ranks), ..Work::default() },
            _ => self.crowd(1.0, (self.ranks - 1) as f64, b, 0.0),
        };
        let LinkCosts { near, far, cores, .. } = self.costs;
        // Where a host has more ranks than cores, they take turns.
        let turns = (self.most as f64 / f64::from(cores)).max(1.0);
        let slowest = if self.hosts > 1 { far } else { near };
        let latency_ns = near.latency_ns + SWITCH_NS * (turns - 1.0) / turns;
        let inside = work.near_rounds * latency_ns + work.near_bytes * near.byte_ns;
        let own = work.messages * slowest.message_ns + work.combined * COMBINE_NS + work.copies * COPY_NS;
        work.far_rounds * far.latency_ns + work.far_bytes * far.byte_ns + turns * (inside + own)
    }

    fn pieces(&self, bytes: f64) -> f64 {
        (bytes / self.segment as f64).ceil().max(1.0)
    }

    /// Work in `rounds` rounds in which a rank sends `messages` times `bytes` to others that may be anywhere.
    fn anywhere(&self, rounds: f64, messages: f64, bytes: f64, combined: f64) -> Work {
        let sent = messages * bytes;
        let away = if self.ranks > 1 { (self.ranks - self.most) as f64 / (self.ranks - 1) as f64 } else { 0.0 };
        self.flat(
            rounds,
            messages * self.pieces(bytes),
            (sent * (1.0 - away), sent * away * self.most as f64),
            combined,
        )
    }

    /// The same, everybody with everybody at once.
    fn crowd(&self, rounds: f64, messages: f64, bytes: f64, combined: f64) -> Work {
        self.anywhere(rounds, messages, bytes, combined).times(if self.ranks > 2 { CROWD } else { 1.0 })
    }

    /// The same to the right neighbour only.
    fn ring(&self, rounds: f64, bytes: f64, combined: f64) -> Work {
        let sent = rounds * bytes;
        self.flat(rounds, rounds * self.pieces(bytes), (sent, sent * self.borders as f64), combined)
    }

    fn flat(&self, rounds: f64, messages: f64, (near, far): (f64, f64), combined: f64) -> Work {
        let near_bytes = if self.hosts > 1 && self.most == 1 { 0.0 } else { near };
        let (near_rounds, far_rounds) = if self.hosts > 1 { (0.0, rounds) } else { (rounds, 0.0) };
        Work { near_rounds, far_rounds, messages, near_bytes, far_bytes: far, combined, copies: 0.0 }
    }

    fn all_reduce(&self, algorithm: Algorithm, b: f64) -> Work {
        let (n, h, m) = (self.ranks as f64, self.hosts as f64, self.most as f64);
        let folded = if self.ranks.is_power_of_two() { 0.0 } else { 1.0 };
        match algorithm {
            Algorithm::Ring => self.ring(2.0 * (n - 1.0), b / n, b),
            Algorithm::Short => self.crowd(1.0, n - 1.0, b, n * b),
            Algorithm::Doubling => {
                let rounds = f64::from(self.ranks.ilog2());
                self.anywhere(rounds + 2.0 * folded, rounds + folded, b, 2.0 * rounds * b)
            }
            Algorithm::Halving => {
                let most = 1 << self.ranks.ilog2();
                let work = self.halving(most, b);
                let all = self.anywhere(work.0, 1.0, work.2 + folded * b, (1.0 + folded) * b).times(PARTNERS);
                Work { messages: work.1 + folded * self.pieces(b), ..all }.and_rounds(self, 2.0 * folded)
            }
            Algorithm::DoubleTree => {
                let levels = doublings(self.ranks) + 1.0;
                let ahead = levels * (b / 2.0).min(self.segment as f64);
                let work = self.anywhere(2.0 * levels, 1.0, 2.0 * b + ahead, 2.0 * b).times(PARTNERS);
                Work { messages: 4.0 * self.pieces(b / 2.0), ..work }
            }
            Algorithm::Hierarchical | Algorithm::Leaders => {
                let lanes = if algorithm == Algorithm::Leaders { 1.0 } else { self.fewest as f64 };
                let slice = b / lanes;
                let (rounds, messages) = match algorithm {
                    Algorithm::Leaders => {
                        let halving = self.halving(1 << self.hosts.ilog2(), b);
                        let folded = if self.hosts.is_power_of_two() { 0.0 } else { 2.0 };
                        (halving.0 + folded, halving.1 + folded)
                    }
                    _ => (2.0 * (h - 1.0), 2.0 * (h - 1.0) * self.pieces(slice / h)),
                };
                Work {
                    near_rounds: 2.0,
                    far_rounds: rounds,
                    messages: messages + 2.0 * (m - 1.0) * self.pieces(slice),
                    near_bytes: 2.0 * (m - 1.0) * slice,
                    far_bytes: 2.0 * (h - 1.0) / h * b,
                    combined: m * slice,
                    copies: 0.0,
                }
            }
            _ => self.crowd(2.0, 2.0 * (n - 1.0), b / n, b),
        }
    }

    /// Rounds, messages and bytes of halving and doubling among `most` ranks.
    fn halving(&self, most: usize, b: f64) -> (f64, f64, f64) {
        let rounds = most.ilog2();
        let messages: f64 = (1..=rounds).map(|round| 2.0 * self.pieces(b / f64::from(1u32 << round))).sum();
        (2.0 * f64::from(rounds), messages, 2.0 * b * (1.0 - 1.0 / most as f64))
    }

    fn one(&self, algorithm: Algorithm, b: f64, combines: bool) -> Work {
        let n = self.ranks as f64;
        let (levels, segment) = (doublings(self.ranks), b.min(self.segment as f64));
        let combined = if combines { b } else { 0.0 };
        match algorithm {
            Algorithm::Direct => self.crowd(2.0, n, b / n, 2.0 * b),
            Algorithm::Tree => {
                let work = self.anywhere(levels, 1.0, levels * b, levels * combined);
                Work { messages: levels * self.pieces(b), ..work }
            }
            Algorithm::DoubleTree => {
                let half = segment.min(b / 2.0);
                let work = self.anywhere(levels + 1.0, 1.0, b + (levels + 1.0) * half, 2.0 * combined);
                Work { messages: 2.0 * self.pieces(b / 2.0), ..work }
            }
            Algorithm::Hierarchical => {
                let far = doublings(self.hosts);
                Work {
                    near_rounds: 1.0,
                    far_rounds: far,
                    messages: (far + self.most as f64 - 1.0) * self.pieces(b),
                    near_bytes: (self.most as f64 - 1.0) * b,
                    far_bytes: far * b,
                    ..Work::default()
                }
            }
            _ => {
                let work = self.ring(1.0, b + (n - 2.0).max(0.0) * segment, combined);
                Work { messages: self.pieces(b), ..work }.and_rounds(self, n - 2.0)
            }
        }
    }

    fn all_gather(&self, algorithm: Algorithm, b: f64) -> Work {
        let n = self.ranks as f64;
        match algorithm {
            Algorithm::Ring => self.ring(n - 1.0, b, b),
            Algorithm::Bruck => {
                let rounds = doublings(self.ranks);
                let work = self.anywhere(rounds, 1.0, (n - 1.0) * b, 2.0 * n * b);
                Work { messages: rounds.max(self.pieces(n * b)), copies: n, ..work }
            }
            Algorithm::Hierarchical => self.passed_on(2.0, b, 0.0),
            _ => self.crowd(1.0, n - 1.0, b, b),
        }
    }

    fn reduce_scatter(&self, algorithm: Algorithm, b: f64) -> Work {
        let n = self.ranks as f64;
        match algorithm {
            Algorithm::Hierarchical => self.passed_on(1.0, b, n * b),
            _ => self.crowd(1.0, n - 1.0, b, n * b),
        }
    }

    /// Each part crosses once to each other host, and goes to or comes from all ranks inside.
    fn passed_on(&self, near_rounds: f64, b: f64, combined: f64) -> Work {
        let (n, m, h) = (self.ranks as f64, self.most as f64, self.hosts as f64);
        let carried = (n - m) / self.fewest as f64;
        Work {
            near_rounds,
            far_rounds: 1.0,
            messages: ((h - 1.0) + (1.0 + carried) * (m - 1.0)) * self.pieces(b),
            near_bytes: (1.0 + carried) * (m - 1.0) * b,
            far_bytes: (n - m) * b,
            combined,
            copies: 0.0,
        }
    }

    fn packed(&self, b: f64) -> Work {
        let n = self.ranks as f64;
        let (rounds, half) = (doublings(self.ranks), (n / 2.0).ceil() * b);
        let work = self.anywhere(rounds, rounds, half, 2.0 * rounds * half);
        Work { copies: rounds * n / 2.0 + n, ..work }
    }
}

impl Work {
    /// With bytes that take `factor` times as long.
    fn times(self, factor: f64) -> Self {
        Self { near_bytes: self.near_bytes * factor, far_bytes: self.far_bytes * factor, ..self }
    }

    /// With rounds in which nothing more is sent.
    fn and_rounds(self, world: &World, rounds: f64) -> Self {
        let (near, far) = if world.hosts > 1 { (0.0, rounds) } else { (rounds, 0.0) };
        Self { near_rounds: self.near_rounds + near, far_rounds: self.far_rounds + far, ..self }
    }
}
