//! Does: the bytes of one connection: those of its socket, or sealed by TLS. Which of both is decided once, when it is made.

use super::watch::Watched;
use rustix::fd::{AsFd, BorrowedFd};
use rustls::Connection;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

/// Sealed bytes that wait for the socket: four records, so that a large write fills the socket in one go.
const SEALED_BYTES: usize = 64 << 10;

/// One connection.
pub(super) struct Stream {
    socket: TcpStream,
    seal: Option<Box<Seal>>,
    /// Until when its reads wait, while they do.
    deadline: Option<Instant>,
    /// Its place among the connections that the system watches.
    pub(super) watched: Option<Watched>,
}

/// TLS over it.
struct Seal {
    session: Connection,
    /// Whether the last read found bytes: there may be more that the socket knows nothing of.
    ahead: bool,
}

impl Stream {
    pub(super) fn plain(socket: TcpStream) -> Self {
        Self { socket, seal: None, deadline: None, watched: None }
    }

    /// From now on all bytes are those of `session`.
    pub(super) fn begin_tls(&mut self, mut session: Connection) {
        session.set_buffer_limit(Some(SEALED_BYTES));
        self.seal = Some(Box::new(Seal { session, ahead: false }));
    }

    /// Until when reads of a socket that blocks wait, however little comes at a time; `None`: for ever.
    pub(super) fn wait_until(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// The socket itself, for its options and addresses.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether a read that fills less than it may means that nothing is left to read.
    pub(super) fn reads_whole(&self) -> bool {
        self.seal.is_none()
    }

    /// Whether there may be bytes to read though the socket has none.
    pub(super) fn is_ahead(&self) -> bool {
        self.seal.as_ref().is_some_and(|seal| seal.ahead)
    }

    /// Whether bytes that were taken still wait for the socket.
    pub(super) fn holds_back(&self) -> bool {
        self.seal.as_ref().is_some_and(|seal| seal.session.wants_write())
    }

    /// Whether the system tells when it has room to write.
    pub(super) fn wait_for_room(&mut self, room: bool) {
        if let Some(watched) = &mut self.watched {
            watched.wait_for_room(self.socket.as_fd(), room);
        }
    }

    /// Moves bytes that were taken into the socket, as far as it takes them now.
    pub(super) fn send(&mut self) -> io::Result<()> {
        self.seal.as_mut().map_or(Ok(()), |seal| seal.send(&mut self.socket))
    }

    /// Tells the peer that nothing more will come.
    pub(super) fn end_writing(&mut self) {
        if let Some(seal) = &mut self.seal {
            seal.session.send_close_notify();
            // As below.
            let _ = seal.send(&mut self.socket);
        }
        // Already gone: nothing to close.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// What a connection begins with: whether it is TLS; `None`: too little has come to tell.
    pub(super) fn begins_with_tls(&self) -> io::Result<Option<bool>> {
        let mut begin = [0; 2];
        match self.socket.peek(&mut begin) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(1) => Ok(None),
            Ok(_) => Ok(Some(begin == TLS_HANDSHAKE)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The first bytes of a TLS connection: a record of the handshake. No hello of ours is as long as that would make it.
const TLS_HANDSHAKE: [u8; 2] = [0x16, 0x03];

impl Seal {
    fn send(&mut self, socket: &mut TcpStream) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(socket) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&mut self, socket: &mut Timed<'_>, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.reader().read(into) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.ahead = false,
                result => {
                    self.ahead = result.is_ok();
                    return result;
                }
            }
            // While hands are shaken, an answer comes to what we have said. Where nothing can be said any more, what the peer said
            // last is still read: it may tell why.
            let sent = self.send(socket.0);
            if let Err(error) = self.session.read_tls(socket) {
                return Err(sent.err().unwrap_or(error));
            }
            let opened = self.session.process_new_packets();
            // Also after a failure: the peer is told why. Where it cannot be told, the next turn finds that out again.
            let _ = self.send(socket.0);
            opened.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
    }

    fn write(&mut self, socket: &mut TcpStream, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut taken = self.session.writer().write_vectored(bytes)?;
        self.send(socket)?;
        if taken == 0 {
            taken = self.session.writer().write_vectored(bytes)?;
            self.send(socket)?;
        }
        let full = taken == 0 && bytes.iter().any(|slice| !slice.is_empty());
        if full { Err(ErrorKind::WouldBlock.into()) } else { Ok(taken) }
    }
}

/// A socket of which each read waits until a deadline at most, where it blocks.
struct Timed<'a>(&'a mut TcpStream, Option<Instant>);

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.1 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.0.set_read_timeout(Some(left))?;
        }
        self.0.read(into)
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.seal {
            None => Timed(&mut self.socket, self.deadline).read(into),
            Some(seal) => seal.read(&mut Timed(&mut self.socket, self.deadline), into),
        }
    }

    fn read_vectored(&mut self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match &mut self.seal {
            None => self.socket.read_vectored(into),
            Some(seal) => match into.iter_mut().find(|slice| !slice.is_empty()) {
                Some(first) => seal.read(&mut Timed(&mut self.socket, self.deadline), first),
                None => Ok(0),
            },
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.seal {
            None => self.socket.write(bytes),
            Some(seal) => seal.write(&mut self.socket, &[IoSlice::new(bytes)]),
        }
    }

    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.seal {
            None => self.socket.write_vectored(bytes),
            Some(seal) => seal.write(&mut self.socket, bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(watched) = &self.watched {
            watched.forget(self.socket.as_fd());
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
