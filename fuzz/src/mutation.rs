//! Pure: changes messages into what a broken or hostile peer might send, the same ones for the same seed.

/// Numbers that lengths, counts and offsets are rarely ready for.
const HOSTILE: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    0xffff,
    1 << 16,
    (1 << 31) - 1,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    1 << 60,
    i64::MAX as u64,
    u64::MAX,
];
/// Longest message made.
const MOST_BYTES: usize = 1 << 16;

/// A row of changes.
pub struct Mutation(u64);

impl Mutation {
    /// The changes of `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`; 0 where there is none.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % (end as u64).max(1)) as usize
    }

    /// One of `samples`, changed in a few places.
    pub fn of(&mut self, samples: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = samples[self.below(samples.len())].clone();
        for _ in 0..=self.below(5) {
            let other = &samples[self.below(samples.len())];
            self.change(&mut bytes, other);
            bytes.truncate(MOST_BYTES);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        let at = self.below(bytes.len());
        let end = bytes.len().min(at + 1 + self.below(16));
        match self.below(9) {
            0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
            2 if !bytes.is_empty() => bytes[at] = self.next() as u8,
            // A number of 1, 2, 4 or 8 bytes, at a place where one may lie or not.
            3 | 4 => {
                let number = match self.below(3) {
                    0 => (bytes.len() + self.below(3)).saturating_sub(1) as u64,
                    _ => HOSTILE[self.below(HOSTILE.len())],
                };
                let number = &number.to_le_bytes()[..1 << self.below(4)];
                bytes[at..].iter_mut().zip(number).for_each(|(byte, new)| *byte = *new);
            }
            5 => bytes.truncate(at),
            6 => drop(bytes.drain(at..end)),
            7 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            // The head of one and the tail of another.
            _ => {
                bytes.truncate(at);
                bytes.extend_from_slice(&other[self.below(other.len())..]);
            }
        }
    }
}
