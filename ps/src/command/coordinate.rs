//! Does: `gradwire-ps coordinate`: keeps the map of a cluster until it is stopped by a signal.

use super::log::Log;
use super::{Certificates, Token, admin};
use clap::Args;
use gradwire_ps::{Checkpoints, Coordinator, CoordinatorSettings, EtcdSettings};
use gradwire_transport::Config;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Flags of `coordinate`.
#[derive(Args)]
pub(crate) struct Coordinate {
    /// TOML file with these flags as keys, without their dashes; what is typed, or in the environment, wins over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen at; servers and clients are given it. Port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// Shards that tables are cut over
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    shards: u32,
    /// Copies of each shard beside the first, 0 to 7, each in a server process of its own: so many servers may die at once. It
    /// begins once servers offer enough seats for all
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=7))]
    replicas: u32,
    /// Begin with a checkpoint, `latest` or its name, of any number of shards; each server needs the same --checkpoint-dir.
    /// `latest` begins empty where there is none yet. A cluster that is there already goes on with what it has
    #[arg(long, value_name = "NAME", requires = "checkpoint_dir")]
    restore: Option<String>,
    /// Where checkpoints are kept: a folder that all servers see, or s3://BUCKET/PREFIX; see `gradwire-ps serve --help`
    #[arg(long, value_name = "FOLDER|s3://BUCKET/PREFIX", requires = "restore")]
    checkpoint_dir: Option<String>,
    #[command(flatten)]
    etcd: Etcd,
    #[command(flatten)]
    token: Token,
    #[command(flatten)]
    certificates: Certificates,
    /// Listen off loopback without a token or TLS: everybody who reaches the port may join
    #[arg(long)]
    insecure: bool,
    /// Address that answers /metrics for Prometheus, /healthz and /readyz, to whoever reaches it [default: none]
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    log: Log,
    /// Print the address as JSON
    #[arg(long)]
    json: bool,
}

/// Where several coordinators agree which of them leads.
#[derive(Args)]
pub(super) struct Etcd {
    /// Keep the map in this etcd. Several coordinators may then run: one leads, and where it dies another goes on. Servers and
    /// clients are given the addresses of all. A client address each, http:// or https://
    #[arg(long, env = "GRADWIRE_ETCD", value_name = "ADDRESS,...", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Name of this cluster there: its keys are gradwire/NAME/...
    #[arg(long, default_value = "default", value_name = "NAME", requires = "etcd", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    cluster: String,
    /// Who must have signed etcd's certificate [default: those that browsers trust]
    #[arg(long, value_name = "FILE", requires = "etcd")]
    etcd_ca: Option<PathBuf>,
    /// Certificate to show to etcd, in PEM
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// Private key of --etcd-cert
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
}

impl Etcd {
    /// Where it is, if there is one.
    pub(super) fn settings(&self) -> Option<EtcdSettings> {
        let identity = self.etcd_cert.clone().zip(self.etcd_key.clone());
        let there = !self.etcd.is_empty();
        let (endpoints, cluster, ca) = (self.etcd.clone(), self.cluster.clone(), self.etcd_ca.clone());
        there.then_some(EtcdSettings { endpoints, cluster, ca, identity })
    }
}

impl Coordinate {
    /// The file that holds more flags.
    pub(crate) fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Whether a coordinator could start with these flags.
    pub(crate) fn check(&self) -> Result<(), String> {
        // What the checkpoint is called is looked up when it starts.
        self.settings(self.restore.clone())?.check().map_err(|error| error.to_string())
    }

    fn settings(&self, restore: Option<String>) -> Result<CoordinatorSettings, String> {
        Ok(CoordinatorSettings {
            restore,
            listen: self.listen,
            token: self.token.read()?,
            insecure: self.insecure,
            shards: self.shards,
            replicas: self.replicas,
            etcd: self.etcd.settings(),
            transport: Config { tls: self.certificates.load()?, ..Config::default() },
        })
    }

    /// Coordinates until a signal. `warnings`: what the log is to begin with.
    pub(crate) fn run(self, warnings: &[String]) -> Result<(), String> {
        self.log.begin(warnings);
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| format!("watching for signals: {error}"))?;
        let restore = beginning(self.checkpoint_dir.as_deref(), self.restore.as_deref())?;
        let mut coordinator = Coordinator::bind(self.settings(restore)?).map_err(|error| error.to_string())?;
        let ready = Arc::new(AtomicBool::new(true));
        let told = Arc::new(coordinator.monitor());
        let admin = self.admin.map(|listen| admin::start(listen, told, Arc::clone(&ready))).transpose()?;
        self.announce(coordinator.address(), admin).map_err(|error| format!("writing the address: {error}"))?;
        let stopper = coordinator.stopper();
        let waiting = std::thread::spawn(move || {
            signals.forever().next();
            ready.store(false, Ordering::Release);
            stopper.stop();
        });
        coordinator.run().map_err(|error| error.to_string())?;
        tracing::info!("stopped");
        waiting.join().map_err(|_| "the thread that waits for signals panicked".to_owned())
    }

    fn announce(&self, address: SocketAddr, admin: Option<SocketAddr>) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        announce(&mut out, self.json, address)?;
        admin::announce(&mut out, self.json, admin)?;
        out.flush()
    }
}

/// The checkpoint at `place` that a cluster begins with: `which`, or the latest whole one, which may be none yet.
pub(super) fn beginning(place: Option<&str>, which: Option<&str>) -> Result<Option<String>, String> {
    let Some((place, which)) = place.zip(which) else { return Ok(None) };
    let found = Checkpoints::find(place, which).map_err(|error| error.to_string())?;
    tracing::info!(checkpoint = found.as_deref().unwrap_or("none yet"), "a cluster that begins restores");
    Ok(found)
}

/// Tells where a coordinator listens, for people or for programs.
pub(super) fn announce(out: &mut impl Write, json: bool, address: SocketAddr) -> std::io::Result<()> {
    match json {
        true => writeln!(out, "{}", serde_json::json!({ "coordinator": address.to_string() })),
        false => writeln!(out, "the coordinator listens at {address}"),
    }
}
