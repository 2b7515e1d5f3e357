//! Pure: the records that two ends of a verbs link exchange, and how a frame packs several. Decoding believes nothing.
//!
//! A frame is what one send carries: records one behind the other, each in multiples of eight bytes, all little-endian.

use crate::{Tag, short};

/// Bytes of the longest head of a record.
pub(super) const HEAD_BYTES: usize = 40;
/// Bytes of a record that tells of credit.
pub(super) const CREDIT_BYTES: usize = 24;
/// What an eager message takes of a frame beside its payload, padding included.
pub(super) const EAGER_BYTES: usize = 32;

/// One thing that one end tells the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// A whole message, sent before anybody asked for it.
    Eager { tag: Tag, note: u64, payload: &'a [u8] },
    /// "I have a message of so many bytes for you."
    Announce { tag: Tag, note: u64, bytes: u64, id: u64 },
    /// "Write message `id` at `address`, and say `key` when it is there."
    Grant { id: u64, address: u64, rkey: u32, key: u32 },
    /// "I do not want message `id`: it does not fit."
    Refuse { id: u64, capacity: u64 },
    /// Receives of a lane that have been posted anew, and bytes of the window that have been taken, both since the start.
    Credit { lane: u8, returned: u64, taken: u64 },
    /// Bytes of the message that was granted as `key`, where memory cannot be written remotely.
    Piece { key: u32, offset: u64, payload: &'a [u8] },
    /// Nothing follows.
    Goodbye,
}

impl Record<'_> {
    /// What the record takes of a frame.
    #[inline(always)]
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Eager { payload, .. } | Self::Piece { payload, .. } => 24 + payload.len().next_multiple_of(8),
            Self::Announce { .. } => HEAD_BYTES,
            Self::Grant { .. } => 32,
            Self::Refuse { .. } => 24,
            Self::Credit { .. } => CREDIT_BYTES,
            Self::Goodbye => 8,
        }
    }

    /// Writes the record at the beginning of `into`, which has room for it; how many bytes it took.
    #[inline(always)]
    pub(super) fn encode(&self, into: &mut [u8]) -> usize {
        match *self {
            Self::Eager { tag, note, payload } => write(into, 1, [tag.0, note], payload),
            Self::Announce { tag, note, bytes, id } => write(into, 2, [tag.0, note, bytes, id], &[]),
            Self::Grant { id, address, rkey, key } => {
                write(into, 3, [id, address, u64::from(key) << 32 | u64::from(rkey)], &[])
            }
            Self::Refuse { id, capacity } => write(into, 4, [id, capacity], &[]),
            Self::Credit { lane, returned, taken } => write(into, u64::from(lane) << 8 | 5, [returned, taken], &[]),
            Self::Piece { key, offset, payload } => write(into, 6, [key.into(), offset], payload),
            Self::Goodbye => write(into, 7, [], &[]),
        }
    }

    /// The record at the beginning of `frame`, which is moved behind it.
    ///
    /// # Errors
    /// What is wrong with it.
    #[inline(always)]
    pub(super) fn decode<'a>(frame: &mut &'a [u8]) -> Result<Record<'a>, &'static str> {
        // The usual one: a small message.
        if let Some((head, mut rest)) = frame.split_first_chunk::<24>()
            && head[0] == 1
            && let &[first, tag, note] = head.as_chunks::<8>().0
            && let Some(payload) = cut(&mut rest, (u64::from_le_bytes(first) >> 32) as usize)
        {
            *frame = rest;
            return Ok(Record::Eager { tag: Tag(u64::from_le_bytes(tag)), note: u64::from_le_bytes(note), payload });
        }
        Self::decode_any(frame)
    }

    fn decode_any<'a>(frame: &mut &'a [u8]) -> Result<Record<'a>, &'static str> {
        const SHORT: &str = "a record that ends too early";
        let mut rest = *frame;
        let first = word(&mut rest).ok_or(SHORT)?;
        let length = usize::try_from(first >> 32).map_err(|_| SHORT)?;
        let mut next = || word(&mut rest).ok_or(SHORT);
        let record = match first & 0xff {
            1 => Record::Eager { tag: Tag(next()?), note: next()?, payload: cut(&mut rest, length).ok_or(SHORT)? },
            2 => Record::Announce { tag: Tag(next()?), note: next()?, bytes: next()?, id: next()? },
            3 => {
                let (id, address, keys) = (next()?, next()?, next()?);
                Record::Grant { id, address, rkey: (keys & 0xffff_ffff) as u32, key: (keys >> 32) as u32 }
            }
            4 => Record::Refuse { id: next()?, capacity: next()? },
            5 => Record::Credit { lane: (first >> 8) as u8, returned: next()?, taken: next()? },
            6 => {
                let key = u32::try_from(next()?).map_err(|_| "a key that does not exist")?;
                Record::Piece { key, offset: next()?, payload: cut(&mut rest, length).ok_or(SHORT)? }
            }
            7 => Record::Goodbye,
            _ => return Err("a record of an unknown kind"),
        };
        *frame = rest;
        Ok(record)
    }
}

/// A record of a first word, of words and a payload, which is padded; how many bytes it took.
#[inline]
fn write<const WORDS: usize>(into: &mut [u8], first: u64, words: [u64; WORDS], payload: &[u8]) -> usize {
    let (head, rest) = into.split_at_mut(8 + WORDS * 8);
    let (places, _) = head.as_chunks_mut::<8>();
    places[0] = ((payload.len() as u64) << 32 | first).to_le_bytes();
    places[1..].iter_mut().zip(words).for_each(|(place, word)| *place = word.to_le_bytes());
    short::copy(rest, payload);
    head.len() + payload.len().next_multiple_of(8)
}

#[inline]
fn word(rest: &mut &[u8]) -> Option<u64> {
    let (head, tail) = rest.split_first_chunk::<8>()?;
    *rest = tail;
    Some(u64::from_le_bytes(*head))
}

#[inline]
fn cut<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (padded, tail) = rest.split_at_checked(length.checked_next_multiple_of(8)?)?;
    *rest = tail;
    Some(&padded[..length])
}

#[cfg(test)]
mod tests {
    use super::super::decoders::samples;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn records_of_one_frame_come_back_as_they_were() {
        for length in [0, 1, 7, 8, 9, 4000] {
            let payload: Vec<u8> = (0..length).map(|at| at as u8).collect();
            let records = samples(&payload);
            let mut frame = vec![0; records.iter().map(Record::bytes).sum()];
            let mut at = 0;
            for record in &records {
                at += record.encode(&mut frame[at..]);
            }
            let mut rest = &frame[..];
            for record in records {
                assert_eq!(Record::decode(&mut rest), Ok(record));
            }
            assert!(rest.is_empty());
        }
    }

    proptest! {
        #[test]
        fn hostile_frames_are_refused_not_believed(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            while let Ok(record) = Record::decode(&mut rest) {
                prop_assert!(record.bytes() <= bytes.len());
            }
        }

        #[test]
        fn a_record_cut_short_is_refused(which in 0usize..7, at in 1usize..60) {
            let record = samples(&[1; 30])[which];
            let mut frame = vec![0; record.bytes()];
            record.encode(&mut frame);
            let mut cut = &frame[..at.min(frame.len() - 1)];
            prop_assert!(Record::decode(&mut cut).is_err());
        }
    }
}
