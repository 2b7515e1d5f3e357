//! Pure: compares our reading of libibverbs' binary interface with bindgen's reading of the installed headers.
//!
//! `cargo test -p gradwire-transport --lib --features abi-check abi_check`; the codes of link layers have no name there.

use super::{async_events, ffi, status};
use rdma_sys as theirs;
use std::ffi::c_int;
use std::mem::{align_of, offset_of, size_of};

/// The same size and alignment, where we name every member.
macro_rules! same_size {
    ($($name:ident)*) => {$(
        assert_eq!(size_of::<ffi::$name>(), size_of::<theirs::$name>(), stringify!($name));
        assert_eq!(align_of::<ffi::$name>(), align_of::<theirs::$name>(), stringify!($name));
    )*};
}

/// The same places of members of the same name.
macro_rules! same_places {
    ($($name:ident: $($member:ident)*;)*) => {$($(
        let (ours, theirs) = (offset_of!(ffi::$name, $member), offset_of!(theirs::$name, $member));
        assert_eq!(ours, theirs, concat!(stringify!($name), ".", stringify!($member)));
    )*)*};
}

#[test]
fn structures_are_as_long_as_the_headers_say() {
    same_size! {
        ibv_context_ops ibv_comp_channel ibv_pd ibv_mr ibv_sge ibv_send_wr ibv_recv_wr ibv_wc ibv_gid ibv_global_route
        ibv_ah_attr ibv_qp_cap ibv_qp_attr ibv_qp_init_attr ibv_port_attr ibv_device_attr ibv_async_event
    }
    // The library makes these, and we know their beginnings only.
    assert!(size_of::<ffi::ibv_context>() <= size_of::<theirs::ibv_context>());
    assert!(size_of::<ffi::ibv_cq>() <= size_of::<theirs::ibv_cq>());
    assert!(size_of::<ffi::ibv_qp>() <= size_of::<theirs::ibv_qp>());
}

#[test]
fn members_are_where_the_headers_say() {
    same_places! {
        ibv_context: device ops cmd_fd async_fd num_comp_vectors;
        ibv_context_ops: poll_cq req_notify_cq post_send post_recv;
        ibv_pd: context handle;
        ibv_comp_channel: context fd refcnt;
        ibv_cq: context channel cq_context handle cqe;
        ibv_mr: context pd addr length handle lkey rkey;
        ibv_qp: context qp_context pd send_cq recv_cq srq handle qp_num;
        ibv_sge: addr length lkey;
        ibv_send_wr: wr_id next sg_list num_sge opcode send_flags;
        ibv_recv_wr: wr_id next sg_list num_sge;
        ibv_wc: wr_id status opcode vendor_err byte_len qp_num src_qp wc_flags pkey_index slid sl dlid_path_bits;
        ibv_global_route: dgid flow_label sgid_index hop_limit traffic_class;
        ibv_ah_attr: grh dlid sl src_path_bits static_rate is_global port_num;
        ibv_qp_cap: max_send_wr max_recv_wr max_send_sge max_recv_sge max_inline_data;
        ibv_qp_attr: qp_state cur_qp_state path_mtu path_mig_state qkey rq_psn sq_psn dest_qp_num qp_access_flags cap ah_attr
            alt_ah_attr pkey_index alt_pkey_index en_sqd_async_notify sq_draining max_rd_atomic max_dest_rd_atomic
            min_rnr_timer port_num timeout retry_cnt rnr_retry alt_port_num alt_timeout rate_limit;
        ibv_qp_init_attr: qp_context send_cq recv_cq srq cap qp_type sq_sig_all;
        ibv_port_attr: state max_mtu active_mtu gid_tbl_len port_cap_flags max_msg_sz bad_pkey_cntr qkey_viol_cntr
            pkey_tbl_len lid sm_lid lmc max_vl_num sm_sl subnet_timeout init_type_reply active_width active_speed phys_state
            link_layer flags port_cap_flags2;
        ibv_device_attr: fw_ver node_guid max_qp max_qp_wr device_cap_flags max_cqe max_qp_rd_atom max_qp_init_rd_atom
            max_pkeys local_ca_ack_delay phys_port_cnt;
        ibv_async_event: element event_type;
    }
    // Members of unions, which have other names there.
    let word = offset_of!(theirs::ibv_send_wr, imm_data_invalidated_rkey_union);
    assert_eq!(offset_of!(ffi::ibv_send_wr, imm_data), word);
    let write = offset_of!(theirs::ibv_send_wr, wr);
    assert_eq!(offset_of!(ffi::ibv_send_wr, remote_addr), write + offset_of!(theirs::rdma_t, remote_addr));
    assert_eq!(offset_of!(ffi::ibv_send_wr, rkey), write + offset_of!(theirs::rdma_t, rkey));
    let word = offset_of!(theirs::ibv_wc, imm_data_invalidated_rkey_union);
    assert_eq!(offset_of!(ffi::ibv_wc, imm_data), word);
}

#[test]
fn codes_are_those_of_the_headers() {
    use theirs::{ibv_access_flags as access, ibv_qp_attr_mask as mask, ibv_send_flags as send, ibv_wc_flags as flags};
    use theirs::{ibv_qp_state as state, ibv_wc_opcode, ibv_wc_status, ibv_wr_opcode as work};
    for (ours, theirs) in [
        (ffi::PORT_ACTIVE, theirs::ibv_port_state::IBV_PORT_ACTIVE),
        (ffi::ACCESS_LOCAL_WRITE as u32, access::IBV_ACCESS_LOCAL_WRITE.0),
        (ffi::ACCESS_REMOTE_WRITE as u32, access::IBV_ACCESS_REMOTE_WRITE.0),
        (ffi::ACCESS_REMOTE_READ as u32, access::IBV_ACCESS_REMOTE_READ.0),
        (ffi::QPT_RC, theirs::ibv_qp_type::IBV_QPT_RC),
        (ffi::QPS_INIT, state::IBV_QPS_INIT),
        (ffi::QPS_RTR, state::IBV_QPS_RTR),
        (ffi::QPS_RTS, state::IBV_QPS_RTS),
        (ffi::QPS_ERR, state::IBV_QPS_ERR),
        (ffi::QP_STATE as u32, mask::IBV_QP_STATE.0),
        (ffi::QP_ACCESS_FLAGS as u32, mask::IBV_QP_ACCESS_FLAGS.0),
        (ffi::QP_PKEY_INDEX as u32, mask::IBV_QP_PKEY_INDEX.0),
        (ffi::QP_PORT as u32, mask::IBV_QP_PORT.0),
        (ffi::QP_AV as u32, mask::IBV_QP_AV.0),
        (ffi::QP_PATH_MTU as u32, mask::IBV_QP_PATH_MTU.0),
        (ffi::QP_TIMEOUT as u32, mask::IBV_QP_TIMEOUT.0),
        (ffi::QP_RETRY_CNT as u32, mask::IBV_QP_RETRY_CNT.0),
        (ffi::QP_RNR_RETRY as u32, mask::IBV_QP_RNR_RETRY.0),
        (ffi::QP_RQ_PSN as u32, mask::IBV_QP_RQ_PSN.0),
        (ffi::QP_MAX_QP_RD_ATOMIC as u32, mask::IBV_QP_MAX_QP_RD_ATOMIC.0),
        (ffi::QP_MIN_RNR_TIMER as u32, mask::IBV_QP_MIN_RNR_TIMER.0),
        (ffi::QP_SQ_PSN as u32, mask::IBV_QP_SQ_PSN.0),
        (ffi::QP_MAX_DEST_RD_ATOMIC as u32, mask::IBV_QP_MAX_DEST_RD_ATOMIC.0),
        (ffi::QP_DEST_QPN as u32, mask::IBV_QP_DEST_QPN.0),
        (ffi::WR_RDMA_WRITE, work::IBV_WR_RDMA_WRITE),
        (ffi::WR_RDMA_WRITE_WITH_IMM, work::IBV_WR_RDMA_WRITE_WITH_IMM),
        (ffi::WR_SEND, work::IBV_WR_SEND),
        (ffi::WR_RDMA_READ, work::IBV_WR_RDMA_READ),
        (ffi::SEND_SIGNALED, send::IBV_SEND_SIGNALED.0),
        (ffi::SEND_INLINE, send::IBV_SEND_INLINE.0),
        (ffi::WC_SUCCESS, ibv_wc_status::IBV_WC_SUCCESS),
        (ffi::WC_RECV, ibv_wc_opcode::IBV_WC_RECV),
        (ffi::WC_RECV, ffi::WC_RECV & ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM),
        (ffi::WC_WITH_IMM, flags::IBV_WC_WITH_IMM.0),
        (status::FLUSHED, ibv_wc_status::IBV_WC_WR_FLUSH_ERR),
        (status::REMOTE_ACCESS, ibv_wc_status::IBV_WC_REM_ACCESS_ERR),
        (status::RETRIES, ibv_wc_status::IBV_WC_RETRY_EXC_ERR),
        (super::queue_pair::mtu_bytes(theirs::ibv_mtu::IBV_MTU_4096).into(), 4096),
    ] {
        assert_eq!(ours, theirs);
    }
}

#[test]
fn the_function_that_is_wanted_is_as_the_headers_say() {
    type Theirs = unsafe extern "C" fn(*mut theirs::ibv_pd, u64, usize, u64, c_int, c_int) -> *mut theirs::ibv_mr;
    // Compiles only where the headers declare it so; ours differs in the names of the structures alone.
    let theirs: Theirs = theirs::ibv_reg_dmabuf_mr;
    assert_eq!(size_of_val(&theirs), size_of::<super::library::RegDmaBuf>());
}

#[test]
fn events_and_statuses_have_the_words_of_their_names() {
    use theirs::ibv_event_type as event;
    for (code, word) in [
        (event::IBV_EVENT_CQ_ERR, "completion queue"),
        (event::IBV_EVENT_QP_FATAL, "failed in the device"),
        (event::IBV_EVENT_QP_REQ_ERR, "no sense"),
        (event::IBV_EVENT_QP_ACCESS_ERR, "may not access"),
        (event::IBV_EVENT_PATH_MIG, "another path"),
        (event::IBV_EVENT_DEVICE_FATAL, "the device has failed"),
        (event::IBV_EVENT_PORT_ACTIVE, "active again"),
        (event::IBV_EVENT_PORT_ERR, "lost its link"),
        (event::IBV_EVENT_LID_CHANGE, "LID"),
        (event::IBV_EVENT_PKEY_CHANGE, "partition keys"),
        (event::IBV_EVENT_SM_CHANGE, "subnet manager"),
        (event::IBV_EVENT_SRQ_ERR, "shared receive queue"),
        (event::IBV_EVENT_CLIENT_REREGISTER, "registered anew"),
        (event::IBV_EVENT_GID_CHANGE, "addresses"),
        (event::IBV_EVENT_WQ_FATAL, "work queue"),
    ] {
        let what = async_events::words(code as u32).2.unwrap_or_default();
        assert!(what.contains(word), "{what}");
    }
    use theirs::ibv_wc_status as code;
    for (code, word) in [
        (code::IBV_WC_LOC_LEN_ERR, "longer"),
        (code::IBV_WC_LOC_PROT_ERR, "registered"),
        (code::IBV_WC_WR_FLUSH_ERR, "in the queue"),
        (code::IBV_WC_LOC_ACCESS_ERR, "locally"),
        (code::IBV_WC_REM_INV_REQ_ERR, "invalid"),
        (code::IBV_WC_REM_ACCESS_ERR, "does not allow"),
        (code::IBV_WC_REM_OP_ERR, "the peer's device failed"),
        (code::IBV_WC_RETRY_EXC_ERR, "did not answer"),
        (code::IBV_WC_RNR_RETRY_EXC_ERR, "no receive posted"),
        (code::IBV_WC_GENERAL_ERR, "general failure"),
    ] {
        let what = status::Status { code, vendor: 0 }.to_string();
        assert!(what.contains(word), "{what}");
    }
}
