//! Does: socket options, each with its reason.

use socket2::{SockRef, TcpKeepalive};
use std::net::TcpStream;
use std::time::Duration;

/// Measured best on loopback between 512 KiB and 4 MiB; a larger one only holds more bytes that nobody has asked for.
const BUFFER_BYTES: usize = 1 << 20;

/// Sets what a stream needs. Every option is best effort: a connection without it is slower, not wrong.
pub(super) fn tune(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5)).with_retries(4);
    let set = [
        // A frame is sent whole or not at all; waiting for more only costs latency.
        socket.set_tcp_nodelay(true),
        // bbr, the default of many hosts, paces a loopback or LAN stream to a quarter of what cubic gives.
        socket.set_tcp_congestion(b"cubic"),
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
    use std::net::TcpListener;

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
