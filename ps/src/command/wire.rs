//! Does: the flags of the wires, which the environment may set as well.

use clap::{Args, ValueEnum};
use gradwire_transport::{Config, VerbsConfig, WireChoice};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Transport {
    /// Shared memory to clients on this host, RDMA to others that have it too, else TCP
    Auto,
    /// Shared memory to clients on this host, TCP to all others
    Shm,
    /// RDMA, also on one host: no start without a device
    Verbs,
    /// TCP only
    Tcp,
}

/// Flags about wires.
#[derive(Args)]
pub(crate) struct Wires {
    /// Which wire clients may use
    #[arg(long, env = "GRADWIRE_TRANSPORT", default_value = "auto", ignore_case = true)]
    transport: Transport,
    /// RDMA devices to use, in NCCL's grammar: `mlx5_0:1,mlx5_1` names that begin so, `=mlx5_0` exactly, `^mlx5_2` not these
    #[arg(long, env = "GRADWIRE_IB_HCA", value_name = "DEVICES")]
    ib_hca: Option<String>,
    /// Index of the RDMA port's GID [default: the RoCE v2 one of the routed address]
    #[arg(long, env = "GRADWIRE_IB_GID_INDEX", value_name = "INDEX")]
    ib_gid_index: Option<u8>,
    /// Queue pairs per client, 1 to 8
    #[arg(long, env = "GRADWIRE_IB_QUEUE_PAIRS", default_value_t = 1, value_name = "N")]
    ib_queue_pairs: usize,
    /// Traffic class of every RDMA packet: 4 x DSCP + ECN bits
    #[arg(long, env = "GRADWIRE_IB_TRAFFIC_CLASS", default_value_t = 0, value_name = "CLASS")]
    ib_traffic_class: u8,
    /// Service level, 0 to 15
    #[arg(long, env = "GRADWIRE_IB_SERVICE_LEVEL", default_value_t = 0, value_name = "LEVEL")]
    ib_service_level: u8,
    /// Wait for an acknowledgement, as the exponent n in 4.096 us x 2^n, 1 to 31
    #[arg(long, env = "GRADWIRE_IB_TIMEOUT", default_value_t = 14, value_name = "N")]
    ib_timeout: u8,
    /// How often a packet is sent again, 0 to 6
    #[arg(long, env = "GRADWIRE_IB_RETRIES", default_value_t = 6, value_name = "N")]
    ib_retries: u8,
}

impl Wires {
    /// `base`, with what the flags say.
    pub(crate) fn config(&self, base: Config) -> Result<Config, String> {
        let verbs = VerbsConfig {
            hca: self.ib_hca.clone(),
            gid_index: self.ib_gid_index,
            queue_pairs: self.ib_queue_pairs,
            traffic_class: self.ib_traffic_class,
            service_level: self.ib_service_level,
            timeout: self.ib_timeout,
            retries: self.ib_retries,
            ..base.verbs
        };
        verbs.check().map_err(|error| error.to_string())?;
        let wire = match self.transport {
            Transport::Auto => WireChoice::Auto,
            Transport::Shm => WireChoice::Shm,
            Transport::Verbs => WireChoice::Verbs,
            Transport::Tcp => WireChoice::Tcp,
        };
        Ok(Config { wire, verbs, ..base })
    }
}
