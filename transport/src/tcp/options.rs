//! Does: socket options, each with its reason.

use socket2::{SockRef, TcpKeepalive};
use std::net::TcpStream;
use std::time::Duration;

/// Measured best on loopback between 512 KiB and 4 MiB; a larger one only holds more bytes that nobody has asked for.
const BUFFER_BYTES: usize = 1 << 20;

/// Sets what a stream needs. Every option is best effort: a connection without it is slower, not wrong.
pub(super) fn tune(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
    let set = [
        // A frame is sent whole or not at all; waiting for more only costs latency.
        socket.set_tcp_nodelay(true),
        // bbr, the default of many hosts, paces a loopback or LAN stream to a quarter of what cubic gives.
        socket.set_tcp_congestion(b"cubic"),
        socket.set_send_buffer_size(BUFFER_BYTES),
        socket.set_recv_buffer_size(BUFFER_BYTES),
        // A host that vanishes is found though nothing is being sent to it.
        socket.set_tcp_keepalive(&keepalive),
        socket.set_tcp_user_timeout(Some(Duration::from_secs(30))),
    ];
    for error in set.into_iter().filter_map(Result::err) {
        tracing::debug!(%error, "a socket option was refused");
    }
}
