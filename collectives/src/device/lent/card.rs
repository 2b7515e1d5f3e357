//! Pure: what each rank tells the others when they first want to reach each other's devices, and to fold there.

use crate::device::fold::{RATES_BYTES, Rates};
use gradwire_transport::RemoteSlice;
use gradwire_transport::cuda::HANDLE_BYTES;

/// Bytes of a card.
pub(crate) const BYTES: usize = 256;
/// Where its words begin.
const WORDS: usize = HANDLE_BYTES + 40;
/// Where rates begin.
const RATES: usize = 8;

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
    /// Why it takes no part; empty where it does. Cut where it is long.
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
        (bytes[16], bytes[17]) = (u8::from(self.willing), u8::from(self.near));
        bytes[24..32].copy_from_slice(&self.remote.key.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.remote.bytes.to_le_bytes());
        bytes[40..WORDS].copy_from_slice(&self.handle);
        put_words(&mut bytes[WORDS..], &self.words);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; BYTES]) -> Self {
        let number = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Self {
            process: number(0),
            address: number(8),
            handle: bytes[40..].first_chunk().copied().unwrap_or([0; HANDLE_BYTES]),
            remote: RemoteSlice { key: number(24), offset: 0, bytes: number(32) },
            words: words_of(&bytes[WORDS..]),
            willing: bytes[16] == 1,
            near: bytes[17] == 1,
        }
    }
}

/// Whether a rank can fold on its device, and how fast; else why not.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Told {
    pub(crate) able: Result<(), String>,
    /// Whether it was told to.
    pub(crate) insists: bool,
    /// None where they were not measured.
    pub(crate) rates: Option<Rates>,
}

impl Told {
    pub(crate) fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        (bytes[0], bytes[1], bytes[2]) =
            (u8::from(self.able.is_ok()), u8::from(self.insists), u8::from(self.rates.is_some()));
        bytes[RATES..RATES + RATES_BYTES].copy_from_slice(&self.rates.unwrap_or_default().encode());
        put_words(&mut bytes[RATES + RATES_BYTES..], self.able.as_ref().err().map_or("", String::as_str));
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; BYTES]) -> Self {
        let rates = Some(&bytes[RATES..]).filter(|_| bytes[2] == 1).and_then(Rates::decode);
        let able = if bytes[0] == 1 { Ok(()) } else { Err(words_of(&bytes[RATES + RATES_BYTES..])) };
        Self { able, insists: bytes[1] == 1, rates }
    }
}

/// As much of `words` as there is room for.
fn put_words(room: &mut [u8], words: &str) {
    let mut end = words.len().min(room.len());
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    room[..end].copy_from_slice(&words.as_bytes()[..end]);
}

fn words_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::fold::Pace;

    #[test]
    fn a_card_is_read_as_it_was_written_and_long_words_are_cut_between_letters() {
        let handle = std::array::from_fn(|i| i as u8 + 1);
        let remote = RemoteSlice { key: 5 << 60, offset: 0, bytes: 1 << 40 };
        let (process, words) = (u64::MAX, String::new());
        let card = Card { process, address: 7 << 60, handle, remote, words, willing: false, near: true };
        assert_eq!(Card::decode(&card.encode()), card);
        let pace = Pace { begin_ns: 1e4, byte_ns: 0.25 };
        let rates = Rates { host_ns: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], reach: pace, ..Rates::default() };
        let reason = "é".repeat(300);
        for told in [
            Told { able: Ok(()), insists: true, rates: None },
            Told { able: Ok(()), insists: false, rates: Some(rates) },
            Told { able: Err("no".to_owned()), insists: false, rates: None },
        ] {
            assert_eq!(Told::decode(&told.encode()), told);
        }
        let told = Told::decode(&Told { able: Err(reason.clone()), insists: false, rates: None }.encode());
        assert!(told.able.is_err_and(|words| words.len() > 100 && reason.starts_with(&words)));
        let wild = Rates { host_ns: [f64::NAN; 6], ..rates };
        assert_eq!(Told::decode(&Told { able: Ok(()), insists: false, rates: Some(wild) }.encode()).rates, None);
        let long = Card { words: "ü".repeat(300), ..card.clone() };
        assert_eq!(Card::decode(&long.encode()), Card { words: "ü".repeat(BYTES / 2 - WORDS / 2), ..card });
    }
}
