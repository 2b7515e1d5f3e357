//! Does: a reliable connection of a device, from its making to its end.

#![allow(unsafe_code)]

use super::adapter::{Endpoint, Limits, Span, Work};
use super::completion_queue::CompletionQueue;
use super::context::{ProtectionDomain, answer, not_null};
use super::ffi::*;
use std::ffi::c_int;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// Packets of the answer to a reader that may be under way; InfiniBand's devices have 16 or more.
pub(super) const MOST_READS: usize = 16;
/// Wait after "no receive is posted", as the code for 0.64 ms; credits make it unused.
const RNR_TIMER: u8 = 12;
/// How often such a wait is repeated; 7 would mean for ever.
const RNR_RETRIES: u8 = 6;
/// Routers that a packet may pass.
const HOPS: u8 = 64;

/// How this end reaches the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    /// Our port.
    pub port: u8,
    /// Index of our address.
    pub gid_index: u8,
    /// Whether packets carry global addresses.
    pub global: bool,
    /// Largest packet payload of both ends, in bytes.
    pub mtu_bytes: u16,
    /// As the settings of the wire say.
    pub traffic_class: u8,
    /// Likewise.
    pub service_level: u8,
    /// Likewise.
    pub timeout: u8,
    /// Likewise.
    pub retries: u8,
    /// Reads and atomics that our port answers at once.
    pub reads_answered: u8,
    /// Reads that we may have under way.
    pub reads_asked: u8,
}

impl Path {
    /// The same to an end that may take less than we do.
    pub(super) fn to(self, end: &Endpoint) -> Self {
        let mtu_bytes = self.mtu_bytes.min(end.mtu_bytes);
        // An end that answers no reads is still connected to: none are asked of it.
        Self { mtu_bytes, reads_asked: self.reads_asked.min(end.reads), ..self }
    }
}

/// One end of a reliable connection.
pub(super) struct QueuePair {
    raw: NonNull<ibv_qp>,
    post_send: PostSend,
    post_recv: PostRecv,
    domain: Arc<ProtectionDomain>,
    _completions: Arc<CompletionQueue>,
}

// SAFETY: libibverbs lets any thread use a queue pair: its providers lock it.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair that receives may be posted to (state INIT) and that the peer may write to and read from.
    pub(super) fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        limits: &Limits,
        port: u8,
    ) -> io::Result<Self> {
        let count = |count| u32::try_from(count).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let mut wanted = ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: completions.raw.as_ptr(),
            recv_cq: completions.raw.as_ptr(),
            srq: null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: count(limits.send_depth)?,
                max_recv_wr: count(limits.recv_depth)?,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: count(limits.inline_bytes)?,
            },
            qp_type: QPT_RC,
            sq_sig_all: 0,
        };
        let context = &domain.context;
        // SAFETY: domain and queue are there, and the queue pair holds both; the structure is ours to be read and written.
        let raw = not_null(unsafe { (context.library.create_qp)(domain.raw.as_ptr(), &raw mut wanted) })?;
        let queue_pair = Self {
            raw,
            post_send: context.ops().post_send,
            post_recv: context.ops().post_recv,
            domain: Arc::clone(domain),
            _completions: Arc::clone(completions),
        };
        let access = (ACCESS_REMOTE_WRITE | ACCESS_REMOTE_READ) as u32;
        let init = ibv_qp_attr { qp_state: QPS_INIT, port_num: port, qp_access_flags: access, ..Default::default() };
        queue_pair.modify(init, QP_STATE | QP_PKEY_INDEX | QP_PORT | QP_ACCESS_FLAGS)?;
        Ok(queue_pair)
    }

    /// Its number.
    pub(super) fn number(&self) -> u32 {
        // SAFETY: the queue pair is there for as long as `self`, and its number never changes.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    /// Makes it receive from, then send to, the peer's.
    pub(super) fn connect(&self, packet: u32, to: &Endpoint, path: &Path) -> io::Result<()> {
        let route = ibv_global_route {
            dgid: ibv_gid(to.gid),
            flow_label: 0,
            sgid_index: path.gid_index,
            hop_limit: HOPS,
            traffic_class: path.traffic_class,
        };
        let address = ibv_ah_attr {
            grh: route,
            dlid: to.lid,
            sl: path.service_level,
            is_global: path.global.into(),
            port_num: path.port,
            ..Default::default()
        };
        let receive = ibv_qp_attr {
            qp_state: QPS_RTR,
            path_mtu: mtu_code(path.mtu_bytes),
            dest_qp_num: to.queue_pair,
            rq_psn: to.packet,
            ah_attr: address,
            max_dest_rd_atomic: path.reads_answered,
            min_rnr_timer: RNR_TIMER,
            ..Default::default()
        };
        let mask = QP_STATE | QP_AV | QP_PATH_MTU | QP_DEST_QPN | QP_RQ_PSN | QP_MAX_DEST_RD_ATOMIC | QP_MIN_RNR_TIMER;
        self.modify(receive, mask)?;
        let send = ibv_qp_attr {
            qp_state: QPS_RTS,
            sq_psn: packet,
            timeout: path.timeout,
            retry_cnt: path.retries,
            rnr_retry: RNR_RETRIES,
            max_rd_atomic: path.reads_asked,
            ..Default::default()
        };
        let mask = QP_STATE | QP_TIMEOUT | QP_RETRY_CNT | QP_RNR_RETRY | QP_SQ_PSN | QP_MAX_QP_RD_ATOMIC;
        self.modify(send, mask)
    }

    /// Makes all that is posted end (state ERR).
    pub(super) fn stop(&self) -> io::Result<()> {
        self.modify(ibv_qp_attr { qp_state: QPS_ERR, ..Default::default() }, QP_STATE)
    }

    /// Posts to the send queue.
    ///
    /// # Safety
    /// With `inline`, the span's memory must be readable by the processor.
    pub(super) unsafe fn post(
        &self,
        number: u64,
        span: Span,
        work: Work,
        signalled: bool,
        inline: bool,
    ) -> io::Result<()> {
        let (opcode, remote, word) = match work {
            Work::Send => (WR_SEND, None, 0),
            Work::Write(remote, None) => (WR_RDMA_WRITE, Some(remote), 0),
            Work::Write(remote, Some(word)) => (WR_RDMA_WRITE_WITH_IMM, Some(remote), word),
            Work::Read(remote) => (WR_RDMA_READ, Some(remote), 0),
        };
        let mut place = ibv_sge { addr: span.address, length: span.bytes, lkey: span.key };
        let mut request = ibv_send_wr {
            wr_id: number,
            next: null_mut(),
            sg_list: &raw mut place,
            num_sge: (span.bytes > 0).into(),
            opcode,
            send_flags: if signalled { SEND_SIGNALED } else { 0 } | if inline { SEND_INLINE } else { 0 },
            imm_data: word.to_be(),
            remote_addr: remote.map_or(0, |remote| remote.address),
            rkey: remote.map_or(0, |remote| remote.key),
            _unused: [0; 9],
        };
        let mut refused = null_mut();
        // SAFETY: the queue pair is there for as long as `self`; request and place are read during the call only. What they
        // name is reached by the device alone, which keeps to registered memory, or is readable as the caller promises.
        answer(unsafe { (self.post_send)(self.raw.as_ptr(), &raw mut request, &raw mut refused) })
    }

    /// Posts to the receive queue.
    pub(super) fn post_recv(&self, number: u64, span: Span) -> io::Result<()> {
        let mut place = ibv_sge { addr: span.address, length: span.bytes, lkey: span.key };
        let num_sge = (span.bytes > 0).into();
        let mut request = ibv_recv_wr { wr_id: number, next: null_mut(), sg_list: &raw mut place, num_sge };
        let mut refused = null_mut();
        // SAFETY: as for `post`; nothing is copied during the call.
        answer(unsafe { (self.post_recv)(self.raw.as_ptr(), &raw mut request, &raw mut refused) })
    }

    fn modify(&self, mut attributes: ibv_qp_attr, mask: c_int) -> io::Result<()> {
        // SAFETY: the queue pair is there for as long as `self`, and the structure is ours.
        answer(unsafe { (self.domain.context.library.modify_qp)(self.raw.as_ptr(), &raw mut attributes, mask) })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let context = &self.domain.context;
        // SAFETY: made by the library and freed once; each event that named it was acknowledged as it was read.
        if let Err(error) = answer(unsafe { (context.library.destroy_qp)(self.raw.as_ptr()) }) {
            tracing::error!(device = context.name, %error, "a queue pair could not be freed");
        }
    }
}

/// The code of the largest path MTU of at most so many bytes.
fn mtu_code(bytes: u16) -> u32 {
    (1..=5).rev().find(|code| mtu_bytes(*code) <= bytes).unwrap_or(1)
}

/// The path MTU of a code, in bytes.
pub(super) fn mtu_bytes(code: u32) -> u16 {
    128 << code.clamp(1, 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_path_mtus_are_the_library_s() {
        for (code, bytes) in (1..).zip([256, 512, 1024, 2048, 4096]) {
            assert_eq!((mtu_bytes(code), mtu_code(bytes)), (bytes, code));
        }
        assert_eq!((mtu_code(1500), mtu_code(9000), mtu_code(100)), (3, 5, 1));
    }

    #[test]
    fn no_more_is_asked_of_the_other_end_than_it_can_do() {
        let ours = Path {
            port: 1,
            gid_index: 3,
            global: true,
            mtu_bytes: 4096,
            traffic_class: 0,
            service_level: 0,
            timeout: 14,
            retries: 6,
            reads_answered: 16,
            reads_asked: 16,
        };
        let end = |mtu_bytes, reads| Endpoint { queue_pair: 9, packet: 0, lid: 0, mtu_bytes, reads, gid: [0; 16] };
        let to = |end: Endpoint| (ours.to(&end).mtu_bytes, ours.to(&end).reads_asked, ours.to(&end).reads_answered);
        assert_eq!(to(end(1024, 4)), (1024, 4, 16));
        assert_eq!(to(end(4096, 128)), (4096, 16, 16));
        assert_eq!(to(end(4096, 0)), (4096, 0, 16));
    }
}
