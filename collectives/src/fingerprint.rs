//! Pure: what all ranks must say the same of, in 64 bits that travel in every message's header and can be read back.

use crate::collective::NAMES;
use crate::{Collective, DType, Reduction};
use std::fmt;

/// A call in 64 bits: collective (4), dtype (5), reduction (4), root + 1 (11), number of elements (40). A reduction that is to
/// go in the order of the ranks has 8 more: those of floats, which alone can be told so, have the numbers below 5.
///
/// Parts of unequal lengths, which all ranks list alike, have numbers of their own as collectives, and in the place of the elements
/// a digest of the list. What only two ranks know the length of has 0 there, and with each message the elements between these two.
///
/// A root of 2046 or more and 2^40 elements or more are told as the largest that fits: such calls compare less exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub u64);

const NONE: u64 = 15;
const ORDERED: u64 = 8;
const LEN_BITS: u32 = 40;
const ROOT_BITS: u32 = 11;
const MOST: u64 = (1 << LEN_BITS) - 1;
/// Number of an all-to-all in messages that hold parts of several ranks, and the collective's own.
const PACKED: u64 = 12;
const ALL_TO_ALL: u64 = 5;
/// Number of what is said in place of a call by who would give NaN in it.
const NOT_A_NUMBER: u64 = 13;
/// Numbers of the collectives whose parts all ranks list alike, for unequal parts.
const UNEQUAL: [(u64, &str); 2] = [(14, "all_gather"), (15, "reduce_scatter")];

impl Fingerprint {
    /// The fingerprint of a call over `len` elements; 0 where ranks need not agree on a length.
    pub fn of(collective: &Collective, dtype: DType, len: usize, ordered: bool) -> Self {
        let reduction = collective.reduction().map_or(NONE, |op| u64::from(op.code()) | (u64::from(ordered) * ORDERED));
        let root = collective.root().map_or(0, |root| (u64::from(root.0) + 1).min((1 << ROOT_BITS) - 1));
        // A barrier has no elements, so of no type.
        let dtype = if matches!(collective, Collective::Barrier) { 31 } else { u64::from(dtype.code()) };
        let head = u64::from(collective.code()) << 20 | dtype << 15 | reduction << ROOT_BITS | root;
        Self(head << LEN_BITS).of_len(len)
    }

    /// The fingerprint of an all-gather or a reduce-scatter whose parts have `lens` elements, which are not all the same.
    pub(crate) fn of_unequal(collective: &Collective, dtype: DType, lens: &[usize], ordered: bool) -> Self {
        let even = Self::of(collective, dtype, 0, ordered);
        let number = UNEQUAL.iter().find(|(_, name)| *name == collective.name()).map_or(0, |(number, _)| *number);
        // Each step of the generator SplitMix64 (Steele, Lea and Flood 2014), so that it is the same wherever a rank runs.
        let mix = |hash: u64, len: &usize| {
            let mixed = (hash ^ *len as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        };
        let digest = lens.iter().fold(lens.len() as u64, mix) & MOST;
        Self(even.0 & !(15 << (20 + LEN_BITS)) | number << (20 + LEN_BITS) | digest)
    }

    /// What a rank says in place of its call where the first NaN of what it would give is `element`.
    pub(crate) fn of_nan(element: u64) -> Self {
        Self(NOT_A_NUMBER << (20 + LEN_BITS) | element.min(MOST))
    }

    /// The element, where it says so.
    pub(crate) const fn nan(self) -> Option<u64> {
        if self.0 >> (20 + LEN_BITS) == NOT_A_NUMBER { Some(self.len()) } else { None }
    }

    /// The same call, of `len` elements.
    pub(crate) fn of_len(self, len: usize) -> Self {
        Self(self.0 & !MOST | (len as u64).min(MOST))
    }

    /// What goes with the messages of this all-to-all where a rank packs parts for several others in one.
    pub(crate) const fn packed(self) -> Self {
        self.numbered(PACKED)
    }

    /// The all-to-all of which such a message is.
    const fn unpacked(self) -> Self {
        if self.0 >> (20 + LEN_BITS) == PACKED { self.numbered(ALL_TO_ALL) } else { self }
    }

    const fn numbered(self, number: u64) -> Self {
        Self(self.0 & !(15 << (20 + LEN_BITS)) | number << (20 + LEN_BITS))
    }

    /// The elements.
    pub(crate) const fn len(self) -> u64 {
        self.0 & MOST
    }
}

/// What goes with the messages of a call, that both ends compare.
#[derive(Clone, Debug)]
pub(crate) enum Notes {
    /// With all the same.
    All(Fingerprint),
    /// For each other rank that takes part what goes to it, and what comes from it.
    Each(Vec<(Fingerprint, Fingerprint)>),
    /// With all the same, of an all-to-all whose parts have so many elements each: it is packed.
    Packed(Fingerprint),
}

/// What a note says of the message that it came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// It is of this call, as it goes here.
    Same,
    /// It is of this call and packed, where this rank does not pack: the part alone comes after it.
    Packed,
    /// It is one part alone of this call, where this rank packs.
    Alone,
    /// It is of this call, but of so many elements where so many are awaited.
    Len { sent: u64, awaited: u64 },
    /// It is of another call.
    Other,
}

impl Notes {
    /// With what goes to the rank at `at`.
    pub(crate) fn to(&self, at: usize) -> u64 {
        match self {
            Self::All(note) => note.0,
            Self::Each(notes) => notes[at].0.0,
            Self::Packed(call) => call.packed().0,
        }
    }

    /// What `note` from the rank at `at` says. Lengths are told of where not all ranks must know them.
    pub(crate) fn said(&self, at: usize, note: u64) -> Said {
        let told = Fingerprint(note);
        let (awaited, packs) = match self {
            Self::All(call) => return if told == *call { Said::Same } else { Said::Other },
            Self::Each(notes) => (notes[at].1, false),
            Self::Packed(call) => (*call, true),
        };
        match (told == awaited, told == awaited.packed()) {
            (true, _) if packs => Said::Alone,
            (_, true) if !packs => Said::Packed,
            (false, false) if awaited.of_len(0) == told.unpacked().of_len(0) => {
                Said::Len { sent: told.len(), awaited: awaited.len() }
            }
            (false, false) => Said::Other,
            _ => Said::Same,
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (head, len) = (self.0 >> LEN_BITS, self.len());
        let byte = |value: u64| u8::try_from(value).unwrap_or(u8::MAX);
        let unequal = UNEQUAL.iter().find(|(number, _)| *number == head >> 20).map(|(_, name)| *name);
        let number = self.unpacked().0 >> (20 + LEN_BITS);
        let even = || usize::try_from(number).ok().and_then(|code| NAMES.get(code)).copied();
        let name = unequal.or_else(even);
        if let Some(element) = self.nan() {
            return write!(f, "a call with NaN, first at element {element}");
        }
        let Some(name) = name else { return write!(f, "an unknown call ({:#x})", self.0) };
        f.write_str(name)?;
        let reduction = head >> ROOT_BITS & 15;
        if let Some(op) = Reduction::from_code(byte(reduction & !ORDERED)).filter(|_| reduction != NONE) {
            write!(f, " {}{}", op.name(), if reduction & ORDERED > 0 { " in rank order" } else { "" })?;
        }
        if let Some(dtype) = DType::from_code(byte(head >> 15 & 31)) {
            if unequal.is_some() {
                write!(f, " of {dtype} in unequal parts (list {len:010x})")?;
            } else if len > 0 {
                write!(f, " of {len} {dtype}")?;
            } else {
                write!(f, " of {dtype}")?;
            }
        }
        match head & ((1 << ROOT_BITS) - 1) {
            0 => Ok(()),
            root => write!(f, " with root {}", root - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradwire_transport::Rank;

    #[test]
    fn it_reads_as_the_call() {
        let words = |collective: Collective, dtype, len| Fingerprint::of(&collective, dtype, len, false).to_string();
        assert_eq!(words(Collective::AllReduce { op: Reduction::Sum }, DType::F32, 8), "all_reduce sum of 8 float32");
        assert_eq!(words(Collective::Broadcast { root: Rank(3) }, DType::I64, 1), "broadcast of 1 int64 with root 3");
        assert_eq!(words(Collective::AllGather, DType::BF16, 0), "all_gather of bfloat16");
        assert_eq!(words(Collective::Barrier, DType::F32, 0), "barrier");
        let ordered = Fingerprint::of(&Collective::AllReduce { op: Reduction::Max }, DType::F64, 3, true);
        assert_eq!(ordered.to_string(), "all_reduce max in rank order of 3 float64");
        assert_eq!((ordered.nan(), Fingerprint::of_nan(7).nan()), (None, Some(7)));
        assert_eq!(Fingerprint::of_nan(7).to_string(), "a call with NaN, first at element 7");
    }

    #[test]
    fn lists_of_unequal_parts_differ_from_each_other_and_from_equal_parts() {
        let of = |lens: &[usize]| Fingerprint::of_unequal(&Collective::AllGather, DType::I32, lens, false);
        let words = of(&[1, 2]).to_string();
        assert!(words.starts_with("all_gather of int32 in unequal parts (list "), "{words}");
        let mut seen = std::collections::HashSet::from([Fingerprint::of(&Collective::AllGather, DType::I32, 2, false)]);
        for one in 0..40 {
            for other in 0..40 {
                assert!(seen.insert(of(&[one, other])) && seen.insert(of(&[one, other, 0])), "{one} {other}");
            }
        }
        let scatter = Collective::ReduceScatter { op: Reduction::Sum };
        assert!(seen.insert(Fingerprint::of_unequal(&scatter, DType::I32, &[1, 2], false)));
        let ordered = Fingerprint::of_unequal(&scatter, DType::F32, &[1, 2], true).to_string();
        assert!(ordered.starts_with("reduce_scatter sum in rank order of float32 in unequal parts"), "{ordered}");
    }

    #[test]
    fn two_ranks_see_that_only_their_lengths_differ() {
        let call = Fingerprint::of(&Collective::AllToAll, DType::F32, 0, false);
        let notes = Notes::Each(vec![(call.of_len(3), call.of_len(5))]);
        assert_eq!(notes.to(0), call.of_len(3).0);
        assert_eq!(notes.said(0, call.of_len(7).0), Said::Len { sent: 7, awaited: 5 });
        assert_eq!(notes.said(0, call.of_len(5).0), Said::Same);
        let other = Fingerprint::of(&Collective::AllToAll, DType::F64, 7, false);
        assert_eq!(notes.said(0, other.0), Said::Other);
        assert_eq!(Notes::All(call).said(0, call.of_len(7).0), Said::Other);
        assert_eq!(Notes::All(call).said(0, call.0), Said::Same);
    }

    #[test]
    fn an_all_to_all_is_known_as_the_same_call_packed_or_not() {
        let call = Fingerprint::of(&Collective::AllToAll, DType::F32, 5, false);
        let (packs, alone) = (Notes::Packed(call), Notes::Each(vec![(call, call)]));
        assert_eq!(packs.to(3), call.packed().0);
        assert_eq!((packs.said(3, packs.to(3)), alone.said(0, alone.to(0))), (Said::Same, Said::Same));
        assert_eq!((packs.said(3, alone.to(0)), alone.said(0, packs.to(3))), (Said::Alone, Said::Packed));
        let longer = call.of_len(7);
        for notes in [&packs, &alone] {
            for told in [longer, longer.packed()] {
                assert_eq!(notes.said(0, told.0), Said::Len { sent: 7, awaited: 5 });
            }
            let other = Fingerprint::of(&Collective::AllToAll, DType::F64, 5, false);
            assert_eq!((notes.said(0, other.0), notes.said(0, other.packed().0)), (Said::Other, Said::Other));
        }
        assert_eq!(call.packed().to_string(), call.to_string());
        let gather = Fingerprint::of(&Collective::Gather { root: Rank(0) }, DType::F32, 5, false);
        assert_eq!(Notes::Each(vec![(gather, gather)]).said(0, call.packed().0), Said::Other);
    }

    #[test]
    fn calls_that_differ_have_fingerprints_that_differ() {
        let mut seen = std::collections::HashSet::new();
        for op in (0..8).filter_map(Reduction::from_code) {
            for dtype in (0..21).filter_map(DType::from_code) {
                for len in [0, 1, 1 << 39] {
                    for root in [0, 5] {
                        let root = Rank(root);
                        assert!(seen.insert(Fingerprint::of(&Collective::Reduce { op, root }, dtype, len, false)));
                    }
                    for ordered in [false, true].into_iter().take(if op.code() < 5 { 2 } else { 1 }) {
                        assert!(seen.insert(Fingerprint::of(&Collective::AllReduce { op }, dtype, len, ordered)));
                    }
                }
            }
        }
    }
}
