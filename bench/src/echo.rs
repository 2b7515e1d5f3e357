//! Does: the plainest peer there is: bytes over one TCP connection and bytes back, blocking, without any protocol but two lengths.

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

/// Lengths of a request and of its answer.
const HEAD_BYTES: usize = 16;
/// The longest message taken.
const MOST_BYTES: u64 = 1 << 30;
/// As the wires have it, so that the kernels' work is the same.
const BUFFER_BYTES: usize = 1 << 20;

/// Serves whoever connects, one after the other, for as long as the process lives.
pub(crate) fn serve(listener: &TcpListener) -> io::Result<()> {
    choose(&SockRef::from(listener));
    loop {
        let (stream, _) = listener.accept()?;
        // Whoever leaves ends its own connection only.
        if let Err(error) = converse(stream)
            && error.kind() != io::ErrorKind::UnexpectedEof
        {
            eprintln!("an echo ended: {error}");
        }
    }
}

fn converse(mut stream: TcpStream) -> io::Result<()> {
    tune(&stream)?;
    let mut buffer = Vec::new();
    loop {
        let mut head = [0; HEAD_BYTES];
        stream.read_exact(&mut head)?;
        let [ask, answer] = [0, 8].map(|at| head[at..at + 8].try_into().map_or(u64::MAX, u64::from_le_bytes));
        let most = ask.max(answer);
        let most = usize::try_from(most).ok().filter(|_| most <= MOST_BYTES).ok_or(io::ErrorKind::InvalidData)?;
        if buffer.len() < most {
            buffer.resize(most, 0);
        }
        // Both are at most `most`.
        stream.read_exact(&mut buffer[..ask as usize])?;
        stream.write_all(&buffer[..answer as usize])?;
    }
}

/// A connection to an echo.
pub(crate) struct Echo(TcpStream);

impl Echo {
    /// Connects.
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        choose(&socket);
        socket.connect(&address.into())?;
        let stream = TcpStream::from(socket);
        tune(&stream)?;
        Ok(Self(stream))
    }

    /// Sends `message` and waits for `answer` bytes of what the peer last heard.
    pub(crate) fn call(&mut self, message: &[u8], answer: &mut [u8]) -> io::Result<()> {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&(message.len() as u64).to_le_bytes());
        head[8..].copy_from_slice(&(answer.len() as u64).to_le_bytes());
        let whole = [io::IoSlice::new(&head), io::IoSlice::new(message)];
        let written = self.0.write_vectored(&whole)?;
        if written < HEAD_BYTES {
            self.0.write_all(&head[written..])?;
        }
        self.0.write_all(&message[written.saturating_sub(HEAD_BYTES)..])?;
        self.0.read_exact(answer)
    }
}

/// As the wires choose it, and as early: a connection that began with bbr would stay paced. A kernel without it has another, and
/// so have they.
fn choose(socket: &Socket) {
    let _ = socket.set_tcp_congestion(b"cubic");
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    socket.set_recv_buffer_size(BUFFER_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_comes_back_in_whatever_length_is_asked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener));
        let mut echo = Echo::connect(address).unwrap();
        let message: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        for (ask, answer) in [(300_000, 300_000), (16, 300_000), (300_000, 8), (0, 5), (7, 0)] {
            let mut got = vec![0; answer];
            echo.call(&message[..ask], &mut got).unwrap();
            assert!(got == message[..answer], "{ask} there, {answer} back");
        }
    }
}
