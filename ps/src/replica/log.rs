//! Pure: an entry of the log that a primary sends its first backup, and each backup the next one. Fixed head, little-endian; a request's header and payload behind.
//!
//! | bytes | field |
//! |---|---|
//! | 0 | kind |
//! | 4..8 | connection that the request came by |
//! | 8..16 | term of the primary |
//! | 16..24 | number of the entry; of what is none, the number of the last one |
//! | 24..32 | when, in microseconds since who takes it began to follow |

use crate::Epoch;
use crate::header::{HEADER_BYTES, Header};
use crate::protocol::PAYLOAD_BYTES;
use crate::state::MAX_CHUNK_BYTES;
use gradwire_transport::PeerId;
use std::time::Duration;

const HEAD_BYTES: usize = 32;
/// The longest entry.
pub(crate) const MAX_ENTRY_BYTES: usize = HEAD_BYTES + MAX_CHUNK_BYTES;
/// Bytes of the log that may come while a copy is made.
pub(super) const MAX_EARLY_BYTES: usize = 256 << 20;
/// How long two whose neighbour is gone may take to find each other: clients wait for it. Then each says that the other is gone.
pub(super) const TURN: Duration = Duration::from_secs(1);
const _: () = assert!(HEADER_BYTES + PAYLOAD_BYTES <= MAX_CHUNK_BYTES);

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum What<'a> {
    /// The log begins: what was before follows in pieces, among the entries. The key of the shard.
    Welcome(u64),
    /// A piece of what was before.
    Piece(&'a [u8]),
    /// That was all of it.
    Whole,
    /// A request was taken.
    Request(Header, &'a [u8]),
    /// A connection was closed.
    Gone,
    /// Requests that had waited too long were refused, and rows evicted whose time was up.
    Expire,
    /// Nothing has happened.
    Beat,
    /// The log goes on, for one whose copy is whole, after the entry of this number.
    Resume,
    /// What waited uncounted was sent back, so that this seat can be given a copy by the last one that has one.
    Prepare(u64),
    /// Another has become the primary: all connections were its predecessor's.
    TookOver,
}

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Entry<'a> {
    pub(crate) term: Epoch,
    pub(crate) sequence: u64,
    pub(crate) peer: PeerId,
    pub(crate) at_us: u64,
    pub(crate) what: What<'a>,
}

impl<'a> Entry<'a> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let number;
        let (kind, header, payload): (u8, Option<&Header>, &[u8]) = match &self.what {
            What::Welcome(key) => {
                number = key.to_le_bytes();
                (1, None, &number)
            }
            What::Prepare(seat) => {
                number = seat.to_le_bytes();
                (9, None, &number)
            }
            What::Piece(bytes) => (6, None, bytes),
            What::Whole => (7, None, &[]),
            What::Request(header, payload) => (2, Some(header), payload),
            What::Gone => (3, None, &[]),
            What::Expire => (4, None, &[]),
            What::Beat => (5, None, &[]),
            What::Resume => (8, None, &[]),
            What::TookOver => (10, None, &[]),
        };
        let mut out = Vec::with_capacity(HEAD_BYTES + header.map_or(0, |_| HEADER_BYTES) + payload.len());
        out.extend([kind, 0, 0, 0]);
        out.extend(self.peer.0.to_le_bytes());
        [self.term.0, self.sequence, self.at_us].into_iter().for_each(|number| out.extend(number.to_le_bytes()));
        if let Some(header) = header {
            out.extend(header.encode());
        }
        out.extend(payload);
        out
    }

    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Self, String> {
        let (head, rest) = bytes.split_at_checked(HEAD_BYTES).ok_or("an entry that is too short")?;
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("the head holds it"));
        let what = match head[0] {
            1 => What::Welcome(u64::from_le_bytes(rest.try_into().map_err(|_| "a welcome without a key")?)),
            6 => What::Piece(rest),
            7 => What::Whole,
            2 => {
                let header = Header::decode(rest).map_err(|error| error.to_string())?;
                What::Request(header, &rest[HEADER_BYTES..])
            }
            3 => What::Gone,
            4 => What::Expire,
            5 => What::Beat,
            8 => What::Resume,
            9 => What::Prepare(u64::from_le_bytes(rest.try_into().map_err(|_| "no seat to prepare for")?)),
            10 => What::TookOver,
            kind => return Err(format!("an entry of kind {kind}")),
        };
        let peer = PeerId(u32::from_le_bytes(head[4..8].try_into().expect("the head holds it")));
        Ok(Self { term: Epoch(number(8)), sequence: number(16), peer, at_us: number(24), what })
    }
}

/// The same entry, for whoever counts its time from elsewhere.
pub(super) fn passed_on(entry: &[u8], term: Epoch, at_us: u64) -> Vec<u8> {
    let mut out = entry.to_vec();
    out[8..16].copy_from_slice(&term.0.to_le_bytes());
    out[24..32].copy_from_slice(&at_us.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Kind;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_entry_comes_back_as_it_was_and_other_bytes_do_no_harm(
            numbers in any::<(u64, u64, u64, u32)>(), kind in 0u8..10,
            payload in proptest::collection::vec(any::<u8>(), 0..300), noise in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let what = match kind {
                0 => What::Welcome(7),
                5 => What::Piece(&payload),
                6 => What::Whole,
                1 => What::Request(Header { sequence: 7, ..Header::new(Kind::Push) }, &payload),
                2 => What::Gone,
                3 => What::Expire,
                _ => What::Beat,
            };
            let (term, sequence, at_us, peer) = numbers;
            let entry = Entry { term: Epoch(term), sequence, at_us, peer: PeerId(peer), what };
            let bytes = entry.encode();
            prop_assert_eq!(Entry::decode(&bytes), Ok(entry));
            prop_assert!(bytes.len() <= MAX_ENTRY_BYTES && Entry::decode(&bytes[..HEAD_BYTES - 1]).is_err());
            let _ = Entry::decode(&noise);
            let later = Entry { term: Epoch(term ^ 1), at_us: at_us ^ 2, ..entry };
            prop_assert_eq!(passed_on(&bytes, Epoch(term ^ 1), at_us ^ 2), later.encode());
        }
    }
}
