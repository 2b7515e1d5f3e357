//! Does: `gradwire-ps serve`: starts the shards, says where they are, stops on a signal.

use super::wire::Wires;
use super::{Token, parse_bytes, show_bytes};
use clap::Args;
use gradwire_ps::{ClusterServers, Limits, LocalServers, PsError, ServerSettings};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::Write;
use std::net::SocketAddr;
use tracing_subscriber::filter::LevelFilter;

/// Flags of `serve`.
#[derive(Args)]
pub(crate) struct Serve {
    /// Address to listen at. Port 0 takes a free one for each shard; otherwise shards take this port and the following ones
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// Shards to serve, each with a thread and an address of its own. One for each core that may be busy is a good number
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    shards: u32,
    /// Coordinators of the cluster to join, such as 10.0.0.1:7000: it says which shards are served here, and which are
    /// copied here for the case that their server dies; --shards is how many there is room for
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT,...")]
    coordinator: Vec<String>,
    /// Host name or address by which others call this machine, where it is not the one listened at
    #[arg(long, value_name = "HOST", requires = "coordinator")]
    advertise: Option<String>,
    #[command(flatten)]
    token: Token,
    #[command(flatten)]
    wires: Wires,
    /// Most memory for tables and waiting gradients, all shards together, such as 512MiB or 64GiB [default: half of what
    /// the machine has]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    max_memory: Option<u64>,
    /// Most clients that a shard takes at once
    #[arg(long, default_value_t = 4096, value_name = "N")]
    max_clients: usize,
    /// Listen off loopback without a token: everybody who reaches the port may read and change every table
    #[arg(long)]
    insecure: bool,
    /// How much to log to standard error: off, error, warn, info, debug or trace
    #[arg(long, env = "GRADWIRE_LOG", default_value = "info", value_name = "LEVEL")]
    log: LevelFilter,
    /// Print addresses as JSON, a line a shard
    #[arg(long)]
    json: bool,
}

impl Serve {
    pub(crate) fn run(self) -> Result<(), String> {
        tracing_subscriber::fmt().with_max_level(self.log).with_writer(std::io::stderr).init();
        // Before anything is served, so that no signal is missed.
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| format!("watching for signals: {error}"))?;
        let memory = self.max_memory.unwrap_or_else(half_of_memory);
        let limits =
            Limits { memory_bytes: memory / u64::from(self.shards), clients: self.max_clients, ..Limits::default() };
        let settings = ServerSettings {
            listen: self.listen,
            token: self.token.read()?,
            insecure: self.insecure,
            limits,
            transport: self.wires.config(ServerSettings::default().transport)?,
        };
        let secured = settings.token.is_some();
        let servers = self.start(settings).map_err(|error| error.to_string())?;
        self.announce(servers.addresses()).map_err(|error| format!("writing the addresses: {error}"))?;
        tracing::info!(shards = self.shards, memory = show_bytes(memory), token = secured, "serving");
        let signal = signals.forever().next();
        tracing::info!(signal = signal.map_or("none", name_of), "stopping");
        drop(servers);
        tracing::info!("stopped");
        Ok(())
    }

    fn start(&self, settings: ServerSettings) -> Result<Servers, PsError> {
        if self.coordinator.is_empty() {
            return LocalServers::start(self.shards, settings).map(Servers::Alone);
        }
        let (coordinators, advertise) = (self.coordinator.clone(), self.advertise.as_deref());
        ClusterServers::join(self.shards, &settings, coordinators, advertise).map(Servers::Clustered)
    }

    /// One line a shard, or seat, at once, for whoever started us.
    fn announce(&self, addresses: &[String]) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        let what = if self.coordinator.is_empty() { "shard" } else { "seat" };
        for (number, address) in addresses.iter().enumerate() {
            if self.json {
                writeln!(out, "{}", serde_json::json!({ what: number, "address": address }))?;
            } else {
                writeln!(out, "{what} {number} listens at {address}")?;
            }
        }
        out.flush()
    }
}

/// What runs: servers by themselves, or seats of a cluster.
enum Servers {
    Alone(LocalServers),
    Clustered(ClusterServers),
}

impl Servers {
    fn addresses(&self) -> &[String] {
        match self {
            Self::Alone(servers) => servers.addresses(),
            Self::Clustered(servers) => servers.addresses(),
        }
    }
}

fn name_of(signal: i32) -> &'static str {
    match signal {
        SIGINT => "SIGINT",
        SIGTERM => "SIGTERM",
        _ => "another",
    }
}

/// Half of the machine's memory; 8 GiB where it does not say.
fn half_of_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map_or(8 << 30, |kib| kib * 1024 / 2)
}
