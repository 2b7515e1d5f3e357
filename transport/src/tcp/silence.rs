//! Does: asks the system whether a peer's host still answers while bytes are under way to it.
//!
//! `TCP_USER_TIMEOUT` does not tell: Linux counts it from the closing of a window to its opening, so that a peer which answers every
//! probe, and only does not read for so long, is taken for gone.

#![allow(unsafe_code)]

use rustix::fd::AsRawFd;
use std::mem::{MaybeUninit, size_of};
use std::net::TcpStream;
use std::time::Duration;

/// How often the system is asked.
pub(super) const EVERY: Duration = Duration::from_secs(5);
/// Within so long of silence a host that is there has answered something.
const PATIENCE: Duration = Duration::from_secs(30);
/// Packets sent again in that time, or probes of a closed window, that were not answered. Probes are up to two minutes apart, and
/// one may be on its way.
const RETRANSMITS: u8 = 3;
const PROBES: u8 = 2;
/// Who has been asked something for longer than this, and has let it be sent again so often, does not acknowledge.
const SOON: Duration = Duration::from_secs(3);
const SOON_RETRANSMITS: u8 = 2;

/// What the system says of a connection.
#[derive(Clone, Copy, Debug)]
struct Heard {
    /// Since when nothing has come that acknowledges, or answers a probe.
    silent: Duration,
    /// How often the oldest packet has been sent again.
    retransmits: u8,
    /// Probes that have not been answered.
    probes: u8,
}

/// For how long nothing has been heard from the other host, where it must have answered if it were there.
pub(super) fn of(socket: &TcpStream) -> Option<Duration> {
    heard(socket).filter(is_too_long).map(|heard| heard.silent)
}

/// Whether the other host acknowledges what was sent to it some seconds ago. It does where nothing is under way.
pub(super) fn acknowledges(socket: &TcpStream) -> bool {
    heard(socket).as_ref().is_none_or(is_acknowledged)
}

fn is_acknowledged(heard: &Heard) -> bool {
    heard.silent < SOON || (heard.retransmits < SOON_RETRANSMITS && heard.probes < PROBES)
}

fn is_too_long(heard: &Heard) -> bool {
    heard.silent >= PATIENCE && (heard.retransmits >= RETRANSMITS || heard.probes >= PROBES)
}

fn heard(socket: &TcpStream) -> Option<Heard> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut bytes = size_of::<libc::tcp_info>() as libc::socklen_t;
    let fd = socket.as_raw_fd();
    // SAFETY: `info` has `bytes` bytes that may be written, and the descriptor is open for as long as `socket` is.
    let status =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut bytes) };
    if status != 0 {
        return None;
    }
    // SAFETY: zeroed, which is a value of each of its fields, and overwritten by the system as far as it knows them.
    let info = unsafe { info.assume_init() };
    let silent = Duration::from_millis(u64::from(info.tcpi_last_ack_recv));
    Some(Heard { silent, retransmits: info.tcpi_retransmits, probes: info.tcpi_probes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::time::Instant;

    #[test]
    fn only_who_leaves_what_it_must_answer_unanswered_for_long_is_gone() {
        let heard = |seconds, retransmits, probes| Heard { silent: Duration::from_secs(seconds), retransmits, probes };
        for here in [heard(1000, 0, 0), heard(29, 9, 9), heard(90, 0, 1), heard(90, 2, 1)] {
            assert!(!is_too_long(&here), "{here:?}");
        }
        for gone in [heard(30, 3, 0), heard(30, 0, 2), heard(600, 12, 0)] {
            assert!(is_too_long(&gone) && !is_acknowledged(&gone), "{gone:?}");
        }
        for soon in [heard(3, 2, 0), heard(5, 0, 2)] {
            assert!(!is_acknowledged(&soon) && !is_too_long(&soon), "{soon:?}");
        }
        // It rests; a packet was lost; it has just answered.
        for there in [heard(1000, 0, 0), heard(5, 1, 1), heard(2, 9, 9)] {
            assert!(is_acknowledged(&there), "{there:?}");
        }
    }

    #[test]
    fn the_system_tells_that_a_peer_which_does_not_read_answers_its_probes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_peer, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        // Until its window is closed.
        while socket.write(&[0; 1 << 16]).is_ok() {}
        std::thread::sleep(Duration::from_millis(1500));
        let began = Instant::now();
        let heard = heard(&socket).unwrap();
        assert!(heard.probes < PROBES && heard.retransmits < RETRANSMITS, "{heard:?}");
        assert!(acknowledges(&socket));
        // Probes are 0.2 s apart at first, then twice that, and so on.
        assert!(heard.silent < Duration::from_millis(1400) + began.elapsed(), "{heard:?}");
    }
}
