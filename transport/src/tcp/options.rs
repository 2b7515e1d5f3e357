//! Does: socket options, each with its reason.

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::time::Duration;

/// Measured best on loopback between 512 KiB and 4 MiB; a larger one only holds more bytes that nobody has asked for.
const BUFFER_BYTES: usize = 1 << 20;

/// What all connections use, and what has them paced, also where the other one takes over.
const CUBIC: &[u8] = b"cubic";
const BBR: &[u8] = b"bbr";
/// Connections that may wait to be accepted, where the system lets them: more than the hellos that are read at once.
const WAITING: i32 = 1024;

/// A connection to `address`, made within `left`.
pub(super) fn connect(address: SocketAddr, left: Duration) -> io::Result<TcpStream> {
    let socket = unpaced(address)?;
    socket.connect_timeout(&address.into(), left)?;
    Ok(socket.into())
}

/// Listens at `address`.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = unpaced(address)?;
    // As in `TcpListener::bind`: connections that were closed lately do not keep the port.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(WAITING)?;
    Ok(socket.into())
}

/// A socket whose connections are not paced. bbr, the default of many hosts, has each of them paced by a timer from the moment it is
/// made, also where another algorithm takes over later; so that comes first. Connections of a listener have its algorithm.
fn unpaced(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if let Err(error) = socket.set_tcp_congestion(CUBIC) {
        tracing::debug!(%error, "a socket option was refused");
    }
    Ok(socket)
}

/// Whether what is sent by `stream` is to be paced: where the host's own default does it, and there is a network that bursts could
/// overrun. Within a host they overrun nothing, and timers cost a sixth of its cores.
fn is_to_be_paced(stream: &TcpStream) -> bool {
    static USUAL: LazyLock<bool> = LazyLock::new(|| {
        let usual = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).and_then(|new| new.tcp_congestion());
        usual.is_ok_and(|name| name.starts_with(BBR))
    });
    let ends =
        stream.local_addr().and_then(|here| Ok((here.ip().to_canonical(), stream.peer_addr()?.ip().to_canonical())));
    *USUAL && ends.is_ok_and(|(here, there)| here != there && !there.is_loopback())
}

/// Sets what a stream needs. Every option is best effort: a connection without it is slower, not wrong.
pub(super) fn tune(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5)).with_retries(4);
    if is_to_be_paced(stream) {
        // bbr paces what takes over from it, too; by itself it gives a LAN's stream a quarter of what cubic does.
        let paced = socket.set_tcp_congestion(BBR).and_then(|()| socket.set_tcp_congestion(CUBIC));
        paced.unwrap_or_else(|error| tracing::debug!(%error, "a socket option was refused"));
    }
    let set = [
        // A frame is sent whole or not at all; waiting for more only costs latency.
        socket.set_tcp_nodelay(true),
        socket.set_send_buffer_size(BUFFER_BYTES),
        socket.set_recv_buffer_size(BUFFER_BYTES),
        // A host that vanishes is found, after 30 s, though nothing is being sent to it; while something is, by `silence.rs`. No
        // TCP_USER_TIMEOUT does that: Linux also ends a peer by it that answers, and only does not read for so long.
        socket.set_tcp_keepalive(&keepalive),
    ];
    for error in set.into_iter().filter_map(Result::err) {
        tracing::debug!(%error, "a socket option was refused");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_a_connection_within_a_host_have_never_had_an_algorithm_that_paces() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let here = connect(listener.local_addr().unwrap(), Duration::from_secs(5)).unwrap();
        let (there, _) = listener.accept().unwrap();
        for stream in [&here, &there] {
            let algorithm = SockRef::from(stream).tcp_congestion().unwrap();
            assert!(algorithm.starts_with(CUBIC), "{}", String::from_utf8_lossy(&algorithm));
            assert!(!is_to_be_paced(stream));
        }
    }

    #[test]
    fn a_host_that_vanishes_is_found_within_half_a_minute_and_one_that_does_not_read_never_counts_as_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        tune(&stream);
        let socket = SockRef::from(&stream);
        let (idle, every, times) =
            (socket.tcp_keepalive_time(), socket.tcp_keepalive_interval(), socket.tcp_keepalive_retries());
        assert!(socket.keepalive().unwrap());
        assert_eq!(idle.unwrap() + every.unwrap() * times.unwrap(), Duration::from_secs(30));
        // Linux counts from a window's closing to its opening, answers or none.
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
    }
}
