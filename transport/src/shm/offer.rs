//! Does: how two processes come to share memory: one offers, the other opens what was offered, and that is the proof that
//! both are on one host and of one user.
//!
//! Each side's bell is a pipe, opened by the other through `/proc`, not a futex: a wire with many peers must sleep on one
//! thing, next to sockets, and must notice the death of a process (a `pidfd`). All of these are descriptors.

use super::ring;
use super::segment::{Segment, SegmentOffer};
use crate::TransportError;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags};

const MARK: [u8; 4] = *b"GWS1";
/// Bytes of an encoded offer.
pub const OFFER_BYTES: usize = 28;

/// How a peer finds the memory that is offered to it; sent over a connection that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShmOffer(SegmentOffer);

/// One end of shared memory, to be attached to a wire once both have it.
pub struct ShmEnd {
    pub(super) segment: Segment,
    /// 0 for who made it, 1 for who opened it.
    pub(super) side: usize,
    /// The process at the other end, and its bell, where it is known already.
    other: Option<(u32, OwnedFd)>,
}

impl ShmOffer {
    /// The offer as bytes.
    pub fn encode(&self) -> [u8; OFFER_BYTES] {
        let mut out = [0; OFFER_BYTES];
        out[0..4].copy_from_slice(&MARK);
        out[4..8].copy_from_slice(&self.0.pid.to_le_bytes());
        out[8..12].copy_from_slice(&self.0.fd.to_le_bytes());
        out[12..20].copy_from_slice(&self.0.nonce.to_le_bytes());
        out[20..28].copy_from_slice(&self.0.bytes.to_le_bytes());
        out
    }

    /// The offer in `bytes`.
    ///
    /// # Errors
    /// `BadFrame` for what is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, TransportError> {
        let bad = || TransportError::BadFrame {
            peer: "a peer".to_owned(),
            reason: "it is not an offer of shared memory, version 1".to_owned(),
        };
        let bytes: &[u8; OFFER_BYTES] = bytes.try_into().map_err(|_| bad())?;
        let (mark, rest) = bytes.split_first_chunk::<4>().ok_or_else(bad)?;
        let (pid, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        let (fd, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        let (nonce, rest) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
        let size = rest.first_chunk::<8>().ok_or_else(bad)?;
        if *mark != MARK {
            return Err(bad());
        }
        Ok(Self(SegmentOffer {
            pid: u32::from_le_bytes(*pid),
            fd: i32::from_le_bytes(*fd),
            nonce: u64::from_le_bytes(*nonce),
            bytes: u64::from_le_bytes(*size),
        }))
    }
}

/// Makes memory for one pair, and the offer of it.
pub(super) fn make(bell: u32) -> Result<(ShmOffer, ShmEnd), TransportError> {
    let segment = ring::create()?;
    ring::introduce(&segment, 0, bell);
    Ok((ShmOffer(segment.offer()), ShmEnd { segment, side: 0, other: None }))
}

/// Opens what is offered.
pub(super) fn take(offer: &ShmOffer, bell: u32) -> Result<ShmEnd, TransportError> {
    let segment = ring::open(&offer.0)?;
    let other = find_other(&segment, 1)?;
    ring::introduce(&segment, 1, bell);
    Ok(ShmEnd { segment, side: 1, other: Some(other) })
}

/// The process at the other end, and its bell.
pub(super) fn other(end: &mut ShmEnd) -> Result<(u32, OwnedFd), TransportError> {
    match end.other.take() {
        Some(other) => Ok(other),
        None => find_other(&end.segment, end.side),
    }
}

fn find_other(segment: &Segment, side: usize) -> Result<(u32, OwnedFd), TransportError> {
    let Some((pid, bell)) = ring::introduced(segment, 1 - side) else {
        let what = "the other process to open the shared memory that it was offered".to_owned();
        return Err(TransportError::Timeout { what, waited: std::time::Duration::ZERO });
    };
    let path = format!("/proc/{pid}/fd/{bell}");
    let refused = |error: rustix::io::Errno| TransportError::io(format!("open the bell {path}"), error);
    // Read and write, so that we never write to a pipe that nobody reads, which would be answered by a signal.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let bell = rustix::fs::open(&path, flags, Mode::empty()).map_err(refused)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&bell).map_err(refused)?.st_mode);
    if kind != FileType::Fifo {
        let reason = format!("{path} is not the pipe that it was said to be");
        return Err(TransportError::BadFrame { peer: format!("process {pid}"), reason });
    }
    Ok((pid, bell))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_comes_back_as_it_was_and_nothing_else_is_one() {
        let offer = ShmOffer(SegmentOffer { pid: 7, fd: 9, nonce: u64::MAX - 3, bytes: 1 << 40 });
        let bytes = offer.encode();
        assert_eq!(ShmOffer::decode(&bytes).unwrap(), offer);
        for end in 0..OFFER_BYTES {
            assert!(ShmOffer::decode(&bytes[..end]).is_err());
        }
        assert!(ShmOffer::decode(&[0; OFFER_BYTES]).is_err());
    }

    #[test]
    fn memory_of_another_layout_or_nonce_is_refused() {
        let (_near, far) = rustix::pipe::pipe().unwrap();
        let far = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&far)).unwrap();
        let (offer, _end) = make(far).unwrap();
        assert!(take(&offer, 0).is_ok());
        assert!(take(&ShmOffer(SegmentOffer { nonce: offer.0.nonce ^ 1, ..offer.0 }), 0).is_err());
        assert!(take(&ShmOffer(SegmentOffer { pid: u32::MAX, ..offer.0 }), 0).is_err());
        let other = Segment::create(4096).unwrap();
        assert!(take(&ShmOffer(other.offer()), 0).is_err());
    }
}
