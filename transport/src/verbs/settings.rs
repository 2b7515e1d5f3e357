//! Pure: every setting of the verbs wire, with default, unit and reason.

/// Settings of the verbs wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerbsConfig {
    /// Devices to use, in NCCL's grammar: `mlx5_0:1,mlx5_1` prefixes, `=mlx5_0` exact, `^mlx5_2` not (`GRADWIRE_IB_HCA`).
    pub hca: Option<String>,
    /// Index of the port's GID (`GRADWIRE_IB_GID_INDEX`). Default: the RoCE v2 one of the routed address.
    pub gid_index: Option<u8>,
    /// Queue pairs per peer. Default 1; several take several paths through a fabric that spreads by flow.
    pub queue_pairs: usize,
    /// Traffic class of all packets: the operator's DSCP and ECN bits. Default 0.
    pub traffic_class: u8,
    /// Service level. Default 0.
    pub service_level: u8,
    /// Time that a packet waits for its acknowledgement, 4.096 µs times 2 to this power. Default 14, 67 ms.
    pub timeout: u8,
    /// How often it is sent again before the queue pair fails. Default 6: 7 is for ever on soft-RoCE.
    pub retries: u8,
    /// Longest message sent before the receiver has asked for it, in bytes. Default 8,128: what a frame holds.
    pub eager_bytes: usize,
    /// Frames in flight per peer and direction, of 8 KiB each. Default 64: half a megabyte, more than a round trip carries.
    pub slots: usize,
    /// Bytes of callers' memory that stay registered while nobody uses them. Default 512 MiB; what is registered is kept alive.
    pub cache_bytes: usize,
    /// Bytes of the wire's own registered memory at most. Default 256 MiB.
    pub pool_bytes: usize,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self {
            hca: None,
            gid_index: None,
            queue_pairs: 1,
            traffic_class: 0,
            service_level: 0,
            timeout: 14,
            retries: 6,
            eager_bytes: 8128,
            slots: 64,
            cache_bytes: 512 << 20,
            pool_bytes: 256 << 20,
        }
    }
}
