//! Pure: every setting of the transport, with default, unit and reason.

use crate::CreditSettings;
use crate::tcp::Tls;
use crate::verbs::VerbsConfig;
use std::sync::Arc;
use std::time::Duration;

/// Which wire a pair of peers may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WireChoice {
    /// The best that both ends have: shared memory on one host, else RDMA verbs, else TCP.
    #[default]
    Auto,
    /// TCP only, also on one host.
    Tcp,
    /// Shared memory only; a peer on another host is an error.
    Shm,
    /// RDMA verbs only, also on one host; a peer without them is an error.
    Verbs,
}

/// Settings of the wires. Binaries and Python's `init` fill it from flags and the environment; below that, it is passed.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which wire to use (`GRADWIRE_TRANSPORT`).
    pub wire: WireChoice,
    /// TCP connections per peer (`GRADWIRE_LANES`); more than 2 hurt on few cores, a fast NIC wants 4 to 8. Default 1.
    pub lanes: usize,
    /// Interfaces to use, in NCCL's grammar: `eth,ib` prefixes, `=eth0` exact, `^docker` not (`GRADWIRE_SOCKET_IFNAME`).
    pub socket_ifname: Option<String>,
    /// Ports that listeners may take, both ends included (`GRADWIRE_PORT_RANGE`, `first-last`). Default: any.
    pub port_range: Option<(u16, u16)>,
    /// Shared secret of the peers (`GRADWIRE_TOKEN`); proved by HMAC, never sent.
    pub token: Option<String>,
    /// TLS on all TCP connections, of certificates that were read (`GRADWIRE_TLS_*`). RDMA is not encrypted: it is left out.
    /// Default: none.
    pub tls: Option<Arc<Tls>>,
    /// Silence after which a peer counts as lost (`GRADWIRE_TIMEOUT`, seconds). Default 300 s.
    pub timeout: Duration,
    /// Longest message taken from a peer. Default 1 GiB: larger tensors are cut by the layers above.
    pub max_message_bytes: usize,
    /// Longest message sent before the receiver has asked for it. Default 64 KiB: it stays in cache.
    pub eager_bytes: usize,
    /// Bytes one peer may have sent us that no receive has met. Default 2 MiB: what collectives have under way, 8 segments of
    /// 128 KiB, and as much again that was taken and of which the sender has not heard.
    pub window_bytes: usize,
    /// Lets large messages come as the receiver grants them, so that many senders do not overrun the network: in portions over
    /// TCP, whole over queue pairs and shared memory. Default: none, messages are asked for at once; a parameter server and its
    /// clients have it.
    pub credit: Option<CreditSettings>,
    /// Operations queued per peer and direction. Default 65,536.
    pub queue_depth: usize,
    /// Settings of the verbs wire.
    pub verbs: VerbsConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            wire: WireChoice::Auto,
            lanes: 1,
            socket_ifname: None,
            port_range: None,
            token: None,
            tls: None,
            timeout: Duration::from_secs(300),
            max_message_bytes: 1 << 30,
            eager_bytes: 64 << 10,
            window_bytes: 2 << 20,
            credit: None,
            queue_depth: 1 << 16,
            verbs: VerbsConfig::default(),
        }
    }
}
