//! Pure: what travels between the two ends: where memory is, told by its owner, and requests for its bytes. Decoding believes
//! nothing.

use crate::RemoteSlice;

/// Memory of another process, or part of it, as its owner tells of it. Who has it may read and write the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteMemory {
    /// The exposer, by a number that it drew.
    pub owner: u64,
    /// The memory, by a number that the exposer drew.
    pub key: u64,
    /// First byte of this part.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// How a device finds it; 0 where the exposer has none.
    pub device: u64,
}

const MARK: [u8; 4] = *b"gwm1";

impl RemoteMemory {
    /// Length as bytes.
    pub const ENCODED: usize = 44;

    /// The memory as bytes, to be sent to who may use it.
    pub fn encode(&self) -> [u8; Self::ENCODED] {
        let mut out = [0; Self::ENCODED];
        out[..4].copy_from_slice(&MARK);
        let words = [self.owner, self.key, self.offset, self.bytes, self.device];
        out[4..].chunks_exact_mut(8).zip(words).for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
        out
    }

    /// The memory in `bytes`; `None` where there is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let words = bytes.strip_prefix(&MARK).filter(|words| words.len() == Self::ENCODED - 4)?;
        let word = |at: usize| words[8 * at..8 * at + 8].try_into().map(u64::from_le_bytes).unwrap_or_default();
        let [owner, key, offset, bytes, device] = [0, 1, 2, 3, 4].map(word);
        offset.checked_add(bytes)?;
        Some(Self { owner, key, offset, bytes, device })
    }

    /// `bytes` bytes from byte `offset` of this on; `None` outside of it.
    pub fn part(&self, offset: u64, bytes: u64) -> Option<Self> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        inside.then(|| Self { offset: self.offset.saturating_add(offset), bytes, ..*self })
    }

    /// As the device's waist wants it.
    pub(super) fn slice(&self) -> RemoteSlice {
        RemoteSlice { key: self.device, offset: self.offset, bytes: self.bytes }
    }
}

/// A part that is asked for by message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Whether it is written; else it is read.
    pub(super) is_put: bool,
    /// Which of the asker's slots it is in.
    pub(super) slot: u8,
    pub(super) key: u64,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Request {
    pub(super) const ENCODED: usize = 26;

    pub(super) fn encode(&self) -> [u8; Self::ENCODED] {
        let mut out = [0; Self::ENCODED];
        (out[0], out[1]) = (u8::from(self.is_put), self.slot);
        let words = [self.key, self.offset, self.bytes];
        out[2..].chunks_exact_mut(8).zip(words).for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::ENCODED] = bytes.try_into().ok()?;
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or_default();
        let slot = Some(bytes[1]).filter(|&slot| usize::from(slot) < super::OPEN)?;
        let is_put = matches!(bytes[0], 1);
        let sound = bytes[0] <= 1 && (1..=super::PART_BYTES).contains(&word(18));
        sound.then_some(Self { is_put, slot, key: word(2), offset: word(10), bytes: word(18) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_told_comes_back_and_parts_stay_inside(words in any::<[u64; 5]>(), first: u64, length: u64) {
            let [owner, key, offset, bytes, device] = words;
            let memory = RemoteMemory { owner, key, offset, bytes, device };
            let back = RemoteMemory::decode(&memory.encode());
            prop_assert_eq!(back, offset.checked_add(bytes).map(|_| memory));
            if let Some(part) = back.and_then(|memory| memory.part(first, length)) {
                prop_assert!(part.offset >= offset && part.offset + part.bytes <= offset + bytes);
            }
        }

        #[test]
        fn hostile_bytes_are_refused_not_believed(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = RemoteMemory::decode(&bytes);
            if let Some(request) = Request::decode(&bytes) {
                prop_assert!(usize::from(request.slot) < super::super::OPEN && request.bytes <= super::super::PART_BYTES);
                prop_assert_eq!(&request.encode()[..], &bytes[..]);
            }
        }
    }

    #[test]
    fn a_request_comes_back_as_it_was() {
        for is_put in [true, false] {
            let request = Request { is_put, slot: 3, key: 1 << 63, offset: 5, bytes: 6 };
            assert_eq!(Request::decode(&request.encode()), Some(request));
            assert_eq!(Request::decode(&Request { bytes: 0, ..request }.encode()), None);
            assert_eq!(Request::decode(&Request { slot: 16, ..request }.encode()), None);
        }
    }
}
