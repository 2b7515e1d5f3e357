//! Does: `gradwire-ps serve`: starts the shards, says where they are, stops on a signal.

use super::admin::{Both, Shards, Told};
use super::embedded::{Beginning, Carried, Embedded};
use super::log::Log;
use super::periodic::{Periodic, Whom};
use super::wire::Wires;
use super::{Certificates, Token, admin, coordinate, memory_of_machine, parse_bytes, parse_duration, show_bytes};
use clap::{ArgGroup, Args};
use gradwire_ps::{Checkpoints, ClientSettings, ClusterServers, Limits, LocalServers, Monitor, ServerSettings};
use gradwire_transport::Config;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Flags of `serve`.
#[derive(Args)]
#[command(group = ArgGroup::new("joins").args(["coordinator", "coordinate"]).multiple(true))]
pub(crate) struct Serve {
    /// TOML file with these flags as keys, without their dashes; what is typed, or in the environment, wins over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
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
    #[command(flatten)]
    embedded: Embedded,
    /// Host name or address by which others call this machine, where it is not the one listened at
    #[arg(long, value_name = "HOST", requires = "joins")]
    advertise: Option<String>,
    /// The longest that a server which is to end waits until others have taken over its shards; a second signal ends it at once
    #[arg(long, default_value = "20s", value_parser = parse_duration, value_name = "TIME", requires = "joins")]
    drain_timeout: Duration,
    #[command(flatten)]
    token: Token,
    #[command(flatten)]
    certificates: Certificates,
    #[command(flatten)]
    wires: Wires,
    /// Most memory for tables and waiting gradients, all shards together, such as 512MiB or 64GiB [default: half of what
    /// the machine has]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    max_memory: Option<u64>,
    /// Most memory for gradients of one client that wait for others, on all shards together; it is asked to come again then
    /// [default: half of --max-memory]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    max_client_memory: Option<u64>,
    /// Most clients that a shard takes at once
    #[arg(long, default_value_t = 4096, value_name = "N")]
    max_clients: usize,
    /// Listen off loopback without a token or TLS: everybody who reaches the port may read and change every table
    #[arg(long)]
    insecure: bool,
    /// Where to keep checkpoints: a folder, or s3://BUCKET/PREFIX with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for
    /// a store that is not Amazon's, AWS_ENDPOINT_URL. Servers of one map on several hosts need one that all see
    #[arg(long, value_name = "FOLDER|s3://BUCKET/PREFIX")]
    checkpoint_dir: Option<String>,
    /// Write a checkpoint so often, such as 30s, 10m or 1h; only where all shards are served here. Others: `snapshot --every`
    /// [default: only as often as a table asks for]
    #[arg(long, value_parser = parse_duration, value_name = "TIME", requires = "checkpoint_dir")]
    checkpoint_every: Option<Duration>,
    /// Whole checkpoints to keep
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    checkpoint_keep: u16,
    /// Begin with a checkpoint, `latest` or its name, at any number of shards. `latest` begins empty where there is none yet. With
    /// --coordinate, the whole cluster begins with it; one that is there already goes on with what it has
    #[arg(long, value_name = "NAME", requires = "checkpoint_dir")]
    restore: Option<String>,
    /// Address that answers /metrics for Prometheus, /healthz and /readyz, to whoever reaches it [default: none]
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    log: Log,
    /// Print addresses as JSON, a line a shard
    #[arg(long)]
    json: bool,
}

/// What was started.
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

    fn monitors(&self) -> &[Monitor] {
        match self {
            Self::Alone(servers) => servers.monitors(),
            Self::Clustered(servers) => servers.monitors(),
        }
    }

    /// What each of them is.
    fn what(&self) -> &'static str {
        match self {
            Self::Alone(_) => "shard",
            Self::Clustered(_) => "seat",
        }
    }

    /// What an admin address tells of, with the coordinator that is carried beside them, if one is.
    fn told(&self, carried: Option<&Carried>) -> Arc<dyn Told> {
        let shards = Shards(self.monitors().to_vec());
        match carried {
            Some(carried) => Arc::new(Both(shards, carried.monitor())),
            None => Arc::new(shards),
        }
    }

    /// Who is asked for checkpoints of all.
    fn asked(&self, coordinators: &[String]) -> Whom {
        match self {
            Self::Alone(servers) => Whom::These(servers.addresses().to_vec()),
            Self::Clustered(servers) => Whom::Cluster(coordinators.to_vec(), servers.monitors().to_vec()),
        }
    }

    /// Gives shards that have a copy elsewhere to whoever has it; a second signal ends this process.
    fn hand_over(&self, patience: Duration, mut signals: Signals) {
        let Self::Clustered(servers) = self else { return };
        std::thread::spawn(move || {
            if signals.forever().next().is_some() {
                tracing::warn!("a second signal: ending before all shards are handed over");
                std::process::exit(1);
            }
        });
        match servers.drain(patience) {
            Ok(()) => tracing::info!("all shards are handed over"),
            Err(error) => tracing::error!(%error, "ending with shards that nobody has taken over"),
        }
    }
}

impl Serve {
    /// The file that holds more flags.
    pub(crate) fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Whether a server could start with these flags.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.fits()?;
        let settings = self.settings()?;
        settings.check().map_err(|error| error.to_string())?;
        self.embedded.check(&settings, self.shards, self.beginning())
    }

    fn beginning(&self) -> Beginning<'_> {
        (self.checkpoint_dir.as_deref(), self.restore.as_deref())
    }

    /// Refuses flags that cannot be kept together.
    fn fits(&self) -> Result<(), String> {
        self.embedded.fits(&self.coordinator, self.advertise.as_deref())?;
        let with = match (self.embedded.is_there(), self.coordinator.is_empty()) {
            (true, _) => "--coordinate",
            (false, false) => "--coordinator",
            (false, true) => return Ok(()),
        };
        let refused = |flag: &str, remedy: &str| Err(format!("{with} with {flag}: {remedy}"));
        if self.restore.is_some() && !self.embedded.is_there() {
            return refused("--restore", "all shards begin with one checkpoint: gradwire-ps coordinate --restore");
        }
        if self.checkpoint_every.is_some() {
            return refused("--checkpoint-every", "one asks for all: gradwire-ps snapshot --coordinator ... --every");
        }
        Ok(())
    }

    /// Serves until a signal. `warnings`: what the log is to begin with.
    pub(crate) fn run(self, warnings: &[String]) -> Result<(), String> {
        self.log.begin(warnings);
        // Before anything is served, so that no signal is missed.
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| format!("watching for signals: {error}"))?;
        self.fits()?;
        let settings = self.settings()?;
        let (secured, memory) = (settings.token.is_some(), self.memory());
        let tls = settings.transport.tls.as_ref().map_or("no", |tls| if tls.is_mutual() { "mutual" } else { "yes" });
        if tls == "yes" && !secured && !settings.listen.ip().is_loopback() {
            tracing::warn!("whoever reaches the port may use the tables: set a token, or --tls-client-ca");
        }
        let (token, transport) = (settings.token.clone(), settings.transport.clone());
        let caller = ClientSettings { token, transport, ..ClientSettings::default() };
        let carried = self.embedded.start(&settings, self.shards, self.beginning())?;
        let joined = self.embedded.joined(&self.coordinator, carried.as_ref(), self.advertise.as_deref());
        let servers = self.start(settings, &joined)?;
        let ready = Arc::new(AtomicBool::new(true));
        let told = servers.told(carried.as_ref());
        let admin = self.admin.map(|listen| admin::start(listen, told, Arc::clone(&ready))).transpose()?;
        let announced = self.announce(carried.as_ref(), &servers, admin);
        announced.map_err(|error| format!("writing the addresses: {error}"))?;
        tracing::info!(shards = self.shards, memory = show_bytes(memory), token = secured, tls, "serving");
        if carried.is_some() {
            self.embedded.forewarn(&joined);
        }
        let keeps = self.checkpoint_dir.is_some();
        let periodic = keeps.then(|| Periodic::start(servers.asked(&joined), caller, self.checkpoint_every));
        let periodic = periodic.transpose()?;
        let signal = signals.forever().next();
        ready.store(false, Ordering::Release);
        tracing::info!(signal = signal.map_or("none", name_of), "stopping");
        drop(periodic);
        servers.hand_over(self.drain_timeout, signals);
        drop(servers);
        // Last: it has heard the others take over.
        drop(carried);
        tracing::info!("stopped");
        Ok(())
    }

    fn settings(&self) -> Result<ServerSettings, String> {
        let memory_bytes = self.memory() / u64::from(self.shards);
        let client_bytes = self.max_client_memory.map_or(memory_bytes / 2, |bytes| bytes / u64::from(self.shards));
        let keep = usize::from(self.checkpoint_keep);
        Ok(ServerSettings {
            listen: self.listen,
            token: self.token.read()?,
            insecure: self.insecure,
            watched: self.admin.is_some(),
            limits: Limits { memory_bytes, client_bytes, clients: self.max_clients, ..Limits::default() },
            checkpoints: self.checkpoint_dir.clone().map(|place| Checkpoints { place, keep }),
            as_wanted: true,
            transport: Config {
                tls: self.certificates.load()?,
                ..self.wires.config(ServerSettings::default().transport)?
            },
            ..ServerSettings::default()
        })
    }

    fn memory(&self) -> u64 {
        self.max_memory.unwrap_or_else(|| memory_of_machine() / 2)
    }

    /// `coordinators`: of the cluster to join, if any.
    fn start(&self, settings: ServerSettings, coordinators: &[String]) -> Result<Servers, String> {
        if !coordinators.is_empty() {
            let (coordinators, advertise) = (coordinators.to_vec(), self.advertise.as_deref());
            let joined = ClusterServers::join(self.shards, &settings, coordinators, advertise);
            return joined.map(Servers::Clustered).map_err(|error| error.to_string());
        }
        let Some(which) = &self.restore else {
            let started = LocalServers::start(self.shards, settings);
            return started.map(Servers::Alone).map_err(|error| error.to_string());
        };
        let name = Some(which.as_str()).filter(|&which| which != "latest");
        let restored = LocalServers::restore(self.shards, settings, name).map_err(|error| error.to_string())?;
        match &restored.1 {
            Some(name) => tracing::info!(name, "restored a checkpoint"),
            None => tracing::info!("there is no whole checkpoint yet: beginning empty"),
        }
        Ok(Servers::Alone(restored.0))
    }

    /// One line for the coordinator that is carried, if one is, and one a shard, or seat, at once, for whoever started us.
    fn announce(&self, carried: Option<&Carried>, servers: &Servers, admin: Option<SocketAddr>) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        if let Some(carried) = carried {
            coordinate::announce(&mut out, self.json, carried.address())?;
        }
        let what = servers.what();
        for (number, address) in servers.addresses().iter().enumerate() {
            if self.json {
                writeln!(out, "{}", serde_json::json!({ what: number, "address": address }))?;
            } else {
                writeln!(out, "{what} {number} listens at {address}")?;
            }
        }
        admin::announce(&mut out, self.json, admin)?;
        out.flush()
    }
}

fn name_of(signal: i32) -> &'static str {
    match signal {
        SIGINT => "SIGINT",
        SIGTERM => "SIGTERM",
        _ => "another",
    }
}
