//! Pure: what all ranks must say the same of, in 64 bits that travel in every message's header and can be read back.

use crate::collective::NAMES;
use crate::{Collective, DType, Reduction};
use std::fmt;

/// A call in 64 bits: collective (4), dtype (5), reduction (4), root + 1 (11), number of elements (40). A reduction that is to
/// go in the order of the ranks has 8 more: those of floats, which alone can be told so, have the numbers below 5.
///
/// A root of 2046 or more and 2^40 elements or more are told as the largest that fits: such calls compare less exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub u64);

const NONE: u64 = 15;
const ORDERED: u64 = 8;
const LEN_BITS: u32 = 40;
const ROOT_BITS: u32 = 11;

impl Fingerprint {
    /// The fingerprint of a call over `len` elements; 0 where ranks need not agree on a length.
    pub fn of(collective: &Collective, dtype: DType, len: usize, ordered: bool) -> Self {
        let reduction = collective.reduction().map_or(NONE, |op| u64::from(op.code()) | (u64::from(ordered) * ORDERED));
        let root = collective.root().map_or(0, |root| (u64::from(root.0) + 1).min((1 << ROOT_BITS) - 1));
        // A barrier has no elements, so of no type.
        let dtype = if matches!(collective, Collective::Barrier) { 31 } else { u64::from(dtype.code()) };
        let len = (len as u64).min((1 << LEN_BITS) - 1);
        let head = u64::from(collective.code()) << 20 | dtype << 15 | reduction << ROOT_BITS | root;
        Self(head << LEN_BITS | len)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (head, len) = (self.0 >> LEN_BITS, self.0 & ((1 << LEN_BITS) - 1));
        let byte = |value: u64| u8::try_from(value).unwrap_or(u8::MAX);
        let name = usize::try_from(head >> 20).ok().and_then(|code| NAMES.get(code)).copied();
        let Some(name) = name else { return write!(f, "an unknown call ({:#x})", self.0) };
        f.write_str(name)?;
        let reduction = head >> ROOT_BITS & 15;
        if let Some(op) = Reduction::from_code(byte(reduction & !ORDERED)).filter(|_| reduction != NONE) {
            write!(f, " {}{}", op.name(), if reduction & ORDERED > 0 { " in rank order" } else { "" })?;
        }
        if let Some(dtype) = DType::from_code(byte(head >> 15 & 31)) {
            if len > 0 {
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
