//! Pure: how a call over a device's memory is cut into rounds that fit a ring of pinned buffers, and in which order the rounds'
//! copies and messages begin, so that both directions and the wire are busy at once.
//!
//! All ranks must cut alike, since each round is a collective of its own. So a call is cut only where every rank knows all
//! lengths; others are one round.

use crate::Collective;
use std::ops::Range;

/// Buffers of the ring: one filled, two on the wire, one emptied.
pub(crate) const SLOTS: usize = 4;
/// Bytes of each. All ranks must have the same; 4 MiB is what UCX stages CUDA memory by.
pub(crate) const SLOT_BYTES: usize = 4 << 20;
/// The least that is worth a round of its own.
const LEAST_BYTES: usize = 512 << 10;
/// Parts begin on cache lines, but for those that are one piece.
const LINE: usize = 64;

/// Which list of the call a part belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Input,
    Output,
}

/// Bytes of one of the call's pieces, and where they lie in the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) side: Side,
    pub(crate) piece: usize,
    pub(crate) range: Range<usize>,
    pub(crate) at: usize,
}

/// What one buffer of the ring holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Round {
    pub(crate) parts: Vec<Part>,
    pub(crate) bytes: usize,
}

/// Something that begins; each waits for what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Copy the round's parts from the device, once the buffer is free.
    Fetch(usize),
    /// Hand the buffer to the group, once the copies are done.
    Exchange(usize),
    /// Copy the results to the device, once the group is done with the buffer.
    Store(usize),
}

/// In how many rounds what has `parts` parts of `bytes` bytes fits the ring, and keeps all of it at work where it is long enough. A
/// round's share of a part may be `slack` longer than that of another. `None`: in none.
pub(crate) fn ring_rounds(parts: usize, bytes: usize, slack: usize) -> Option<usize> {
    let room = (SLOT_BYTES / parts).checked_sub(slack + LINE).filter(|room| *room > 0)?;
    Some((parts * bytes / LEAST_BYTES).clamp(1, SLOTS).max(bytes.div_ceil(room)))
}

/// `count` rounds, each of as many pieces of these lengths, in their order.
pub(crate) fn in_turn(input: &[usize], output: &[usize], count: usize) -> Vec<Round> {
    let round = |number: usize| {
        let mut round = Round { parts: Vec::new(), bytes: 0 };
        for (side, pieces) in [(Side::Input, input), (Side::Output, output)] {
            let each = pieces.len() / count;
            for (piece, len) in pieces.iter().enumerate().skip(number * each).take(each) {
                let (range, at) = (0..*len, round.bytes.next_multiple_of(LINE));
                round.bytes = at + range.len();
                round.parts.push(Part { side, piece, range, at });
            }
        }
        round
    };
    (0..count).map(round).collect()
}

/// The rounds of a call whose pieces have these lengths in bytes, for buffers of `slot_bytes`.
pub(crate) fn rounds(
    collective: &Collective,
    element_bytes: usize,
    (input, output): (&[usize], &[usize]),
    world_size: usize,
    slot_bytes: usize,
) -> Vec<Round> {
    let Some((input_parts, output_parts, len)) = even(collective, (input, output), world_size) else {
        return in_turn(input, output, 1);
    };
    // What lies on one side only begins at the buffer's beginning.
    let borders = if input_parts > 0 { 2 * LINE } else { 0 };
    let most = slot_bytes.saturating_sub(borders) / (input_parts + output_parts) / element_bytes * element_bytes;
    if most == 0 || len % element_bytes != 0 {
        return in_turn(input, output, 1);
    }
    let round = |start: usize| {
        let bytes = most.min(len - start);
        let mut round = Round { parts: Vec::new(), bytes: 0 };
        for (side, parts, pieces) in
            [(Side::Input, input_parts, input.len()), (Side::Output, output_parts, output.len())]
        {
            round.bytes = round.bytes.next_multiple_of(LINE);
            for part in 0..parts {
                // One piece holds all parts, one after the other, or each part is a piece.
                let (piece, first) = if pieces == 1 { (0, part * len) } else { (part, 0) };
                let range = first + start..first + start + bytes;
                round.parts.push(Part { side, piece, range, at: round.bytes });
                round.bytes += bytes;
            }
        }
        round
    };
    (0..len.div_ceil(most).max(1)).map(|number| round(number * most)).collect()
}

/// Whether what goes in these rounds is memory of devices on all ranks, or on none, who are alike in calls of more than `alike` bytes.
pub(crate) fn is_alike(rounds: &[Round], alike: usize) -> bool {
    rounds.len() > 1 || rounds.iter().map(|round| round.bytes).sum::<usize>() > alike
}

/// Parts of input and output, and the bytes of each, where every rank knows them to be the same on all.
pub(crate) fn even(
    collective: &Collective,
    (input, output): (&[usize], &[usize]),
    n: usize,
) -> Option<(usize, usize, usize)> {
    let part = |pieces: &[usize]| match pieces {
        [all] if all % n == 0 => Some(all / n),
        [first, ..] if pieces.len() == n && pieces.iter().all(|piece| piece == first) => Some(*first),
        _ => None,
    };
    match (collective, input, output) {
        (Collective::AllReduce { .. } | Collective::Reduce { .. } | Collective::Broadcast { .. }, [], [len]) => {
            Some((0, 1, *len))
        }
        (Collective::AllGather, [len], output) if part(output) == Some(*len) => Some((1, n, *len)),
        (Collective::ReduceScatter { .. }, input, [len]) if part(input) == Some(*len) => Some((n, 1, *len)),
        // By one piece each, the callers say that all ranks do the same.
        (Collective::AllToAll, [all], [other]) if all == other && all % n == 0 => Some((n, n, all / n)),
        _ => None,
    }
}

/// Whether a rank's outputs are read first, and whether they are written.
pub(crate) fn uses_of_output(collective: &Collective, rank: usize) -> (bool, bool) {
    let root = collective.root().is_some_and(|root| root.index() == rank);
    match collective {
        Collective::AllReduce { .. } => (true, true),
        Collective::Reduce { .. } => (true, root),
        Collective::Broadcast { .. } => (root, !root),
        _ => (false, true),
    }
}

/// The order in which `rounds` rounds begin their copies and messages.
pub(crate) fn order(rounds: usize) -> impl Iterator<Item = Act> {
    (0..rounds + SLOTS - 1).flat_map(move |turn| {
        let fetch = (turn < rounds).then_some(Act::Fetch(turn));
        let exchange = turn.checked_sub(1).filter(|round| *round < rounds).map(Act::Exchange);
        let store = turn.checked_sub(SLOTS - 1).map(Act::Store);
        [fetch, exchange, store].into_iter().flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reduction;
    use gradwire_transport::Rank;

    const SUM: Collective = Collective::AllReduce { op: Reduction::Sum };

    /// Every byte of every piece is in one round, at one place that no other has; how many rounds there are.
    fn check(collective: &Collective, element: usize, pieces: (&[usize], &[usize]), n: usize, slot: usize) -> usize {
        let rounds = rounds(collective, element, pieces, n, slot);
        let mut seen: Vec<Vec<u8>> = pieces.0.iter().chain(pieces.1).map(|len| vec![0; *len]).collect();
        for round in &rounds {
            let mut places = vec![0u8; round.bytes];
            for part in &round.parts {
                let piece = part.piece + if part.side == Side::Output { pieces.0.len() } else { 0 };
                assert!(part.range.start % element == 0 && part.range.len() % element == 0);
                seen[piece][part.range.clone()].iter_mut().for_each(|byte| *byte += 1);
                places[part.at..part.at + part.range.len()].iter_mut().for_each(|byte| *byte += 1);
            }
            assert!(places.iter().all(|times| *times <= 1));
        }
        assert!(seen.iter().flatten().all(|times| *times == 1), "{collective:?} {pieces:?}");
        assert!(rounds.len() == 1 || rounds.iter().all(|round| round.bytes <= slot));
        rounds.len()
    }

    #[test]
    fn rounds_cover_each_byte_once_and_fit_the_buffers() {
        for element in [1, 2, 4, 16] {
            for n in 1..9 {
                for len in (0..200).map(|len| len * element) {
                    let all = len * n;
                    for slot in [400, 1000, 4096] {
                        check(&SUM, element, (&[], &[len]), n, slot);
                        check(&Collective::Broadcast { root: Rank(0) }, element, (&[], &[len]), n, slot);
                        check(&Collective::AllGather, element, (&[len], &[all]), n, slot);
                        check(&Collective::AllGather, element, (&[len], &vec![len; n]), n, slot);
                        check(&Collective::ReduceScatter { op: Reduction::Sum }, element, (&[all], &[len]), n, slot);
                        check(&Collective::AllToAll, element, (&[all], &[all]), n, slot);
                    }
                }
            }
        }
    }

    #[test]
    fn calls_of_which_ranks_do_not_know_all_lengths_are_one_round() {
        let long = 10 << 20;
        for pieces in [(&[long][..], &[long, 3 * long][..]), (&[long], &[long, long])] {
            assert_eq!(check(&Collective::Gather { root: Rank(0) }, 4, pieces, 2, SLOT_BYTES), 1);
        }
        assert_eq!(check(&Collective::AllToAll, 4, (&[long, 4], &[4, long]), 2, SLOT_BYTES), 1);
        assert_eq!(check(&Collective::AllGather, 4, (&[long], &[long, 3 * long]), 2, SLOT_BYTES), 1);
        assert_eq!(check(&SUM, 4, (&[], &[long]), 2, SLOT_BYTES), 3);
        // Of 4 MiB a rank may hand in the host's memory.
        assert_eq!(check(&SUM, 4, (&[], &[SLOT_BYTES]), 2, SLOT_BYTES), 1);
    }

    #[test]
    fn no_buffer_is_filled_before_it_was_emptied_and_all_rounds_come_in_order() {
        for rounds in 1..20 {
            let (mut fetched, mut exchanged, mut stored, mut most) = (0, 0, 0, 0);
            for act in order(rounds) {
                match act {
                    Act::Fetch(round) => {
                        assert!(round == fetched && round < stored + SLOTS);
                        fetched += 1;
                    }
                    Act::Exchange(round) => {
                        assert!(round == exchanged && round < fetched);
                        exchanged += 1;
                    }
                    Act::Store(round) => {
                        assert!(round == stored && round < exchanged);
                        stored += 1;
                    }
                }
                most = most.max(exchanged - stored);
            }
            assert_eq!((fetched, exchanged, stored), (rounds, rounds, rounds));
            assert_eq!(most, rounds.min(SLOTS - 1), "so many are with the group at once");
        }
    }
}
