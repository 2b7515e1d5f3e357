//! Does: one TCP connection: the frame that is being written, and what has been read but not yet taken.

use super::stream::Stream;
use crate::frame::{HEADER_BYTES, Header};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::ops::Deref;

/// Bytes read ahead: headers and small messages come in one system call, and little of a large one is copied.
const STAGING_BYTES: usize = 16 << 10;

/// Frames that go in one system call. What is written in one goes to and fro between processors less than what is written in several:
/// on loopback 1 MiB takes 130 us in one call and 215 in calls of 128 KiB.
pub(super) const MOST_FRAMES: usize = 16;

/// What a lane is writing: a header and where its payload lies.
pub(super) struct Writing<P> {
    pub(super) frame: Header,
    header: [u8; HEADER_BYTES],
    pub(super) payload: P,
    pub(super) written: usize,
}

impl<P: Deref<Target = [u8]>> Writing<P> {
    pub(super) fn new(frame: Header, payload: P) -> Self {
        Self { frame, header: frame.encode(), payload, written: 0 }
    }

    /// Bytes still to be written.
    pub(super) fn left(&self) -> usize {
        HEADER_BYTES + self.payload.len() - self.written
    }
}

/// The payload that a lane is reading.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    /// Which message.
    pub(super) landing: u64,
    /// Where in it.
    pub(super) offset: usize,
    /// How much is still to come.
    pub(super) left: usize,
}

/// One connection.
pub(super) struct Lane<P> {
    pub(super) stream: Stream,
    pub(super) writing: Option<Writing<P>>,
    pub(super) reading: Option<Reading>,
    /// Whether the peer has closed it after its goodbye.
    pub(super) ended: bool,
    /// Whether the last read found less than it had room for: asking again would find nothing.
    pub(super) drained: bool,
    staging: Box<[u8]>,
    head: usize,
    tail: usize,
}

impl<P: Deref<Target = [u8]>> Lane<P> {
    pub(super) fn new(stream: Stream) -> Self {
        let staging = vec![0; STAGING_BYTES].into_boxed_slice();
        Self { stream, writing: None, reading: None, ended: false, drained: false, staging, head: 0, tail: 0 }
    }

    /// Writes what the socket takes of `frames`, at most [`MOST_FRAMES`]; how many bytes, `None` where the socket is full.
    pub(super) fn write(&mut self, frames: &VecDeque<Writing<P>>) -> io::Result<Option<usize>> {
        let mut slices = [IoSlice::new(&[]); 2 * MOST_FRAMES];
        for (Writing { header, payload, written, .. }, two) in frames.iter().zip(slices.as_chunks_mut::<2>().0) {
            let (header, payload) =
                (&header[*written.min(&HEADER_BYTES)..], &payload[written.saturating_sub(HEADER_BYTES)..]);
            *two = [IoSlice::new(header), IoSlice::new(payload)];
        }
        match self.stream.write_vectored(&slices[..2 * frames.len().min(MOST_FRAMES)]) {
            Ok(0) => Err(ErrorKind::WriteZero.into()),
            Ok(written) => Ok(Some(written)),
            Err(error) if error.kind() == ErrorKind::WouldBlock || error.kind() == ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next header, if it is there whole.
    pub(super) fn next_header(&mut self) -> Option<[u8; HEADER_BYTES]> {
        let header = *self.staging[self.head..self.tail].first_chunk::<HEADER_BYTES>()?;
        self.head += HEADER_BYTES;
        Some(header)
    }

    /// Moves bytes that were read ahead into `into`; how many.
    pub(super) fn take_ahead(&mut self, into: &mut [u8]) -> usize {
        let bytes = into.len().min(self.tail - self.head);
        into[..bytes].copy_from_slice(&self.staging[self.head..self.head + bytes]);
        self.head += bytes;
        bytes
    }

    /// Passes over bytes that were read ahead; how many.
    pub(super) fn skip_ahead(&mut self, most: usize) -> usize {
        let bytes = most.min(self.tail - self.head);
        self.head += bytes;
        bytes
    }

    /// Reads into `into`, and ahead behind it. `None`: nothing is there. An error of kind `UnexpectedEof`: the end.
    ///
    /// Tells how many bytes of `into` were filled.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        if self.head == self.tail {
            (self.head, self.tail) = (0, 0);
        } else if self.head > 0 {
            self.staging.copy_within(self.head..self.tail, 0);
            (self.head, self.tail) = (0, self.tail - self.head);
        }
        let free = &mut self.staging[self.tail..];
        let room = into.len() + free.len();
        let result = if into.is_empty() {
            self.stream.read(free)
        } else {
            self.stream.read_vectored(&mut [IoSliceMut::new(into), IoSliceMut::new(free)])
        };
        match result {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                self.drained = bytes < room && self.stream.reads_whole();
                let filled = bytes.min(into.len());
                self.tail += bytes - filled;
                Ok(Some(filled))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock || error.kind() == ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }
}
