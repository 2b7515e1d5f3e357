//! Does: asks the kernel about this process's TCP connections (`TCP_INFO`, by `sock_diag`).

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::io;
use std::ops::Sub;

/// What one answer of the kernel may hold; it sends at most 32 KiB at once.
const ANSWER_BYTES: usize = 64 << 10;

/// What this process's IPv4 connections have sent since they were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sent {
    /// Segments, those sent again included.
    pub(crate) segments: u64,
    /// Segments sent again.
    pub(crate) retransmits: u64,
}

impl Sub for Sent {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            segments: self.segments.saturating_sub(before.segments),
            retransmits: self.retransmits.saturating_sub(before.retransmits),
        }
    }
}

/// What this process's connections have sent by now.
pub(crate) fn sent() -> io::Result<Sent> {
    let ours = own_sockets()?;
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let request = InetRequest {
        family: AF_INET,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::INFO,
        states: StateFlags::all(),
        socket_id: SocketId::new_v4(),
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut sent = Sent::default();
    let mut answer = vec![0; ANSWER_BYTES];
    loop {
        let length = socket.recv(&mut &mut answer[..], 0)?;
        if add(&answer[..length], &ours, &mut sent)? {
            return Ok(sent);
        }
    }
}

/// Adds what an answer tells of our sockets; whether it was the last.
fn add(mut answer: &[u8], ours: &HashSet<u32>, sent: &mut Sent) -> io::Result<bool> {
    while !answer.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(answer).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response))
                if ours.contains(&response.header.inode) =>
            {
                for nla in &response.nlas {
                    if let Nla::TcpInfo(info) = nla {
                        sent.segments += u64::from(info.segs_out);
                        sent.retransmits += u64::from(info.total_retrans);
                    }
                }
            }
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            _ => {}
        }
        answer = answer.get((message.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The numbers of this process's sockets.
fn own_sockets() -> io::Result<HashSet<u32>> {
    let mut ours = HashSet::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        // The descriptor of the folder itself is gone by now.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let number = target.to_str().and_then(|name| name.strip_prefix("socket:[")?.strip_suffix(']'));
        ours.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    Ok(ours)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn segments_that_this_process_sends_are_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let before = sent().unwrap();
        let mut byte = [0];
        for _ in 0..100 {
            near.write_all(&byte).unwrap();
            far.read_exact(&mut byte).unwrap();
        }
        assert!((sent().unwrap() - before).segments >= 100);
    }
}
