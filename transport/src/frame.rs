//! Pure: the frames of the TCP wire: 48 bytes of header, then the payload. Decoding believes nothing.

use crate::Tag;

/// Bytes of an encoded header.
pub const HEADER_BYTES: usize = 48;
/// Longest text of an abort.
pub const MAX_TEXT_BYTES: usize = 2048;
const MAGIC: u32 = 0x4757_0001;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole message, sent before anybody asked for it.
    Eager,
    /// "I have a message of `total` bytes for you."
    Announce,
    /// "Send me message `id`, up to byte `total`."
    Grant,
    /// "I do not want message `id`: it does not fit `total` bytes."
    Refuse,
    /// A part of message `id`, from byte `note` on.
    Data,
    /// `total` bytes of eager messages have been taken; as many more may come.
    Credit,
    /// The sender leaves in good order.
    Goodbye,
    /// The sender gives up; the payload says why.
    Abort,
    /// "I grant what I can take: send unasked only messages of at most `note` bytes, and `total` bytes of them in all."
    Terms,
}

const KINDS: [Kind; 9] = [
    Kind::Eager,
    Kind::Announce,
    Kind::Grant,
    Kind::Refuse,
    Kind::Data,
    Kind::Credit,
    Kind::Goodbye,
    Kind::Abort,
    Kind::Terms,
];

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is for.
    pub kind: Kind,
    /// Number of the message among those announced by its sender.
    pub id: u32,
    /// The conversation.
    pub tag: Tag,
    /// The sender's note; the offset of a part.
    pub note: u64,
    /// Length of the whole message.
    pub total: u64,
    /// Payload bytes that follow this header.
    pub length: u32,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another protocol, or another version.
    #[error("it does not begin with gradwire's mark, version 1")]
    Mark,
    /// The checksum is wrong.
    #[error("its header's checksum is wrong")]
    Checksum,
    /// A kind that version 1 does not have.
    #[error("it is of the unknown kind {0}")]
    Kind(u8),
    /// Lengths that contradict each other, or are over the limit.
    #[error("its length of {length} bytes of {total} is impossible (at most {limit} are taken)")]
    Length {
        /// Payload bytes said to follow.
        length: u64,
        /// Length of the whole message as said.
        total: u64,
        /// The limit.
        limit: u64,
    },
}

impl Header {
    /// A header without payload.
    pub fn control(kind: Kind, id: u32, total: u64) -> Self {
        Self { kind, id, tag: Tag(0), note: 0, total, length: 0 }
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let kind = KINDS.iter().position(|kind| *kind == self.kind).expect("every kind is in the table");
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = u8::try_from(kind).expect("the table is short");
        out[8..12].copy_from_slice(&self.id.to_le_bytes());
        out[12..16].copy_from_slice(&self.length.to_le_bytes());
        out[16..24].copy_from_slice(&self.tag.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.note.to_le_bytes());
        out[32..40].copy_from_slice(&self.total.to_le_bytes());
        let sum = crc32c::crc32c(&out[..40]);
        out[40..44].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// The header in `bytes`, for messages of at most `max_message_bytes`.
    ///
    /// # Errors
    /// What is wrong with it; no memory has been taken.
    pub fn decode(bytes: &[u8; HEADER_BYTES], max_message_bytes: usize) -> Result<Self, FrameError> {
        if word32(bytes, 0) != MAGIC {
            return Err(FrameError::Mark);
        }
        if word32(bytes, 40) != crc32c::crc32c(&bytes[..40]) {
            return Err(FrameError::Checksum);
        }
        let kind = *KINDS.get(usize::from(bytes[4])).ok_or(FrameError::Kind(bytes[4]))?;
        let header = Self {
            kind,
            id: word32(bytes, 8),
            length: word32(bytes, 12),
            tag: Tag(word64(bytes, 16)),
            note: word64(bytes, 24),
            total: word64(bytes, 32),
        };
        let (length, total) = (u64::from(header.length), header.total);
        let limit = max_message_bytes as u64;
        let sound = match kind {
            Kind::Eager => length == total && total <= limit,
            Kind::Announce => length == 0 && total <= limit,
            Kind::Data => total <= limit && length <= total && header.note <= total - length,
            Kind::Abort => length <= MAX_TEXT_BYTES as u64,
            Kind::Grant | Kind::Refuse | Kind::Credit | Kind::Goodbye | Kind::Terms => length == 0,
        };
        if sound { Ok(header) } else { Err(FrameError::Length { length, total, limit }) }
    }
}

fn word32(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn word64(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(word32(bytes, at)) | u64::from(word32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_comes_back_as_it_was(kind in 0usize..9, id: u32, tag: u64, note in 0u64..1 << 40, total in 0u64..1 << 20) {
            let kind = KINDS[kind];
            let (length, note) = match kind {
                Kind::Eager => (total, note),
                Kind::Data => (total / 2, total / 3),
                Kind::Abort => (total.min(100), note),
                _ => (0, note),
            };
            let header = Header { kind, id, tag: Tag(tag), note, total, length: u32::try_from(length).unwrap() };
            prop_assert_eq!(Header::decode(&header.encode(), 1 << 20), Ok(header));
        }

        #[test]
        fn changed_bits_are_found(at in 0usize..352, tag: u64) {
            let header = Header { kind: Kind::Eager, id: 0, tag: Tag(tag), note: 5, total: 9, length: 9 };
            let mut bytes = header.encode();
            bytes[at / 8] ^= 1 << (at % 8);
            prop_assert!(Header::decode(&bytes, 100).is_err());
        }

        #[test]
        fn random_bytes_are_no_frame(bytes: [u8; 32]) {
            let mut frame = [0; HEADER_BYTES];
            frame[..32].copy_from_slice(&bytes);
            prop_assert!(Header::decode(&frame, 100).is_err());
        }
    }

    #[test]
    fn a_hostile_length_is_refused() {
        let header = Header { kind: Kind::Announce, id: 1, tag: Tag(1), note: 0, total: 1 << 60, length: 0 };
        let refused = Header::decode(&header.encode(), 1 << 30);
        assert_eq!(refused, Err(FrameError::Length { length: 0, total: 1 << 60, limit: 1 << 30 }));
    }
}
