//! Pure: what each rank tells the others when they first want to reach each other's devices.

use gradwire_transport::RemoteSlice;
use gradwire_transport::cuda::HANDLE_BYTES;

/// Bytes of a card.
pub(crate) const BYTES: usize = 256;
/// Where its words begin.
const WORDS: usize = HANDLE_BYTES + 40;

/// What a rank lends, or why it does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Card {
    /// A number of the process, drawn by chance: ranks of one process reach each other without a handle.
    pub(crate) process: u64,
    /// Where its slot is, as that process sees it.
    pub(crate) address: u64,
    pub(crate) handle: [u8; HANDLE_BYTES],
    /// As the network card has it for others; of no bytes where it has not.
    pub(crate) remote: RemoteSlice,
    /// Whether it can fold on its device.
    pub(crate) folds: bool,
    /// Why it takes no part, or cannot fold; empty where it does and can. Cut where it is long.
    pub(crate) words: String,
    /// Whether it takes part.
    pub(crate) willing: bool,
    /// Whether it takes part where ranks reach the devices of their own host only.
    pub(crate) near: bool,
}

impl Card {
    pub(crate) fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&self.process.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.address.to_le_bytes());
        (bytes[16], bytes[17], bytes[18]) = (u8::from(self.willing), u8::from(self.folds), u8::from(self.near));
        bytes[24..32].copy_from_slice(&self.remote.key.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.remote.bytes.to_le_bytes());
        bytes[40..WORDS].copy_from_slice(&self.handle);
        let mut end = self.words.len().min(BYTES - WORDS);
        while !self.words.is_char_boundary(end) {
            end -= 1;
        }
        bytes[WORDS..WORDS + end].copy_from_slice(&self.words.as_bytes()[..end]);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; BYTES]) -> Self {
        let number = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let words = bytes[WORDS..].split(|byte| *byte == 0).next().unwrap_or_default();
        Self {
            process: number(0),
            address: number(8),
            handle: bytes[40..].first_chunk().copied().unwrap_or([0; HANDLE_BYTES]),
            remote: RemoteSlice { key: number(24), offset: 0, bytes: number(32) },
            folds: bytes[17] == 1,
            words: String::from_utf8_lossy(words).into_owned(),
            willing: bytes[16] == 1,
            near: bytes[18] == 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_read_as_it_was_written_and_long_words_are_cut_between_letters() {
        let handle = std::array::from_fn(|i| i as u8 + 1);
        let remote = RemoteSlice { key: 5 << 60, offset: 0, bytes: 1 << 40 };
        let (process, words) = (u64::MAX, String::new());
        let card = Card { process, address: 7 << 60, handle, remote, folds: true, words, willing: false, near: true };
        assert_eq!(Card::decode(&card.encode()), card);
        let long = Card { words: "ü".repeat(300), ..card.clone() };
        assert_eq!(Card::decode(&long.encode()), Card { words: "ü".repeat(BYTES / 2 - WORDS / 2), ..card });
    }
}
