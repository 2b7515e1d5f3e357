//! Pure: which message goes under which tag, and how long each may be.
//!
//! A request is one message (header, and a short payload behind it), or two: the header, then the payload straight from
//! the caller's memory. An answer without elements is one message; elements come under a tag of their own, straight into
//! the caller's memory.

use crate::header::{HEADER_BYTES, Header};
use crate::shard_map::MAX_PART_BYTES;
use gradwire_transport::Tag;

/// Requests: a header, and a payload of at most [`INLINE_BYTES`].
pub(crate) const REQUEST: Tag = Tag(1);
/// Payloads that are too long to be worth copying, in the order of their requests.
pub(crate) const PAYLOAD: Tag = Tag(2);
/// Answers without elements.
pub(crate) const REPLY: Tag = Tag(3);

/// Entries of a primary's log.
pub(crate) const LOG: Tag = Tag(4);

/// The longest payload that travels behind its header: about where copying costs as much as another message.
pub(crate) const INLINE_BYTES: usize = 8 << 10;
/// The longest request.
pub(crate) const REQUEST_BYTES: usize = HEADER_BYTES + INLINE_BYTES;
/// The longest payload of its own.
pub(crate) const PAYLOAD_BYTES: usize = MAX_PART_BYTES;
/// The longest reply: a page of status, with the longest names there may be.
pub(crate) const REPLY_BYTES: usize = HEADER_BYTES + (2 << 20);

/// Receives of requests, payloads and replies that are kept posted: enough that a peer need not wait for one.
pub(crate) const POSTED_REQUESTS: usize = 16;
pub(crate) const POSTED_PAYLOADS: usize = 8;
pub(crate) const POSTED_REPLIES: usize = 16;
pub(crate) const POSTED_ENTRIES: usize = 16;
/// Payloads, or values, that are posted to one peer and not yet sent: more would only lengthen a queue.
pub(crate) const POSTED_SENDS: usize = 16;

/// Elements for the request in `slot`.
pub(crate) const fn value(slot: u32) -> Tag {
    Tag(1 << 32 | slot as u64)
}

/// The slot of a tag of elements.
pub(crate) const fn slot_of(tag: Tag) -> Option<u32> {
    if tag.0 >> 32 == 1 { Some(tag.0 as u32) } else { None }
}

/// What is wrong with a request of `bytes` in all, judged before its payload is awaited.
pub(crate) fn check_lengths(header: &Header, bytes: usize) -> Result<(), String> {
    let behind = (bytes - HEADER_BYTES) as u64;
    if header.is_inline() && behind != header.payload_bytes {
        return Err(format!("a header of {} payload bytes with {behind} behind it", header.payload_bytes));
    }
    if !header.is_inline() && behind != 0 {
        return Err(format!("{behind} bytes behind a header that announces them elsewhere"));
    }
    if header.payload_bytes > PAYLOAD_BYTES as u64 {
        return Err(format!("a payload of {} bytes, of which {PAYLOAD_BYTES} are taken", header.payload_bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::{FLAG_INLINE, Kind};

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let header = |flags, payload_bytes| Header { flags, payload_bytes, ..Header::new(Kind::Push) };
        assert!(check_lengths(&header(FLAG_INLINE, 5), HEADER_BYTES + 5).is_ok());
        assert!(check_lengths(&header(FLAG_INLINE, 1 << 60), HEADER_BYTES + 5).is_err());
        assert!(check_lengths(&header(0, 1 << 60), HEADER_BYTES).is_err());
        assert!(check_lengths(&header(0, 5), HEADER_BYTES + 5).is_err());
        assert!(check_lengths(&header(0, PAYLOAD_BYTES as u64), HEADER_BYTES).is_ok());
        assert_eq!((slot_of(value(7)), slot_of(value(u32::MAX)), slot_of(REPLY)), (Some(7), Some(u32::MAX), None));
    }
}
