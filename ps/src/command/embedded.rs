//! Does: the coordinator that a server process carries: its flags, whom the server joins then, its thread, its end.

use super::coordinate::{Etcd, beginning};
use clap::Args;
use gradwire_ps::{Coordinator, CoordinatorReport, CoordinatorSettings, Monitor, ServerSettings, Stopper};
use gradwire_transport::Config;
use std::net::SocketAddr;
use std::thread::JoinHandle;

/// Flags of `serve` for a coordinator of its own.
#[derive(Args)]
pub(crate) struct Embedded {
    /// Carry a coordinator at this address too, and join it, as the cluster's other servers do by --coordinator. Without --etcd it is
    /// the only one: when this process dies, no backup takes over before a coordinator is back at this address; what has a part here
    /// waits for that, and the rest is served on. With --etcd every server may carry one, and the death of any stops nothing
    #[arg(long, value_name = "ADDRESS:PORT")]
    coordinate: Option<SocketAddr>,
    /// Shards that the cluster's tables are cut over [default: as --shards]
    #[arg(long, requires = "coordinate", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    cluster_shards: Option<u32>,
    /// Copies of each shard beside the first, 0 to 7, each in a server process of its own: so many servers may die at once. The
    /// cluster begins once servers offer enough seats for all
    #[arg(long, default_value_t = 1, requires = "coordinate", value_parser = clap::value_parser!(u32).range(0..=7))]
    replicas: u32,
    #[command(flatten)]
    etcd: Etcd,
}

/// What a cluster begins with, by its flags: where checkpoints are, and which.
pub(crate) type Beginning<'a> = (Option<&'a str>, Option<&'a str>);

impl Embedded {
    /// Whether there shall be one.
    pub(crate) fn is_there(&self) -> bool {
        self.coordinate.is_some()
    }

    /// Refuses what this server and the cluster's others could not both join. `coordinators`: whom --coordinator names.
    pub(crate) fn fits(&self, coordinators: &[String], advertise: Option<&str>) -> Result<(), String> {
        let Some(listen) = self.coordinate else { return Ok(()) };
        let refused = |what: &str, remedy: String| Err(format!("--coordinate {listen}{what}: {remedy}"));
        if listen.ip().is_unspecified() && advertise.is_none() {
            return refused(
                "",
                "servers join it by a name or an address: listen at one, or --advertise one".to_owned(),
            );
        }
        let own = called(listen, advertise);
        match self.etcd.settings() {
            None if coordinators.is_empty() => Ok(()),
            None => {
                let remedy = "this server joins the coordinator that it carries, which without --etcd is the only one: leave \
                              --coordinator out, or let several agree by --etcd";
                refused(" with --coordinator", remedy.to_owned())
            }
            Some(_) if listen.port() == 0 => {
                refused(" with --etcd", "all servers are told its port: choose one".into())
            }
            Some(_) if coordinators.contains(&own) => Ok(()),
            Some(_) => {
                let remedy = "this server joins whichever leads: name all coordinators of the cluster by --coordinator, this one";
                refused(" with --etcd", format!("{remedy} among them as {own}"))
            }
        }
    }

    /// Whether one could start so, in a server with these settings.
    pub(crate) fn check(&self, server: &ServerSettings, seats: u32, begin: Beginning<'_>) -> Result<(), String> {
        // What the checkpoint is called is looked up when it starts.
        let settings = self.settings(server, seats, begin.1.map(str::to_owned));
        settings.map_or(Ok(()), |settings| settings.check()).map_err(|error| error.to_string())
    }

    fn settings(&self, server: &ServerSettings, seats: u32, restore: Option<String>) -> Option<CoordinatorSettings> {
        Some(CoordinatorSettings {
            listen: self.coordinate?,
            token: server.token.clone(),
            insecure: server.insecure,
            shards: self.cluster_shards.unwrap_or(seats),
            replicas: self.replicas,
            etcd: self.etcd.settings(),
            restore,
            transport: Config { tls: server.transport.tls.clone(), ..Config::default() },
        })
    }

    /// Starts it, where there shall be one, for a server of so many seats.
    pub(crate) fn start(
        &self,
        server: &ServerSettings,
        seats: u32,
        begin: Beginning<'_>,
    ) -> Result<Option<Carried>, String> {
        if !self.is_there() {
            return Ok(None);
        }
        self.check(server, seats, begin)?;
        let restore = beginning(begin.0, begin.1)?;
        self.settings(server, seats, restore).map(Carried::start).transpose()
    }

    /// Whom this server joins. `named`: by --coordinator.
    pub(crate) fn joined(&self, named: &[String], carried: Option<&Carried>, advertise: Option<&str>) -> Vec<String> {
        match carried {
            Some(carried) if named.is_empty() => vec![called(carried.address, advertise)],
            _ => named.to_vec(),
        }
    }

    /// Says what the death of this process means.
    pub(crate) fn forewarn(&self, joined: &[String]) {
        if self.etcd.settings().is_some() {
            return;
        }
        let at = joined.join(",");
        let what = "this process carries the cluster's only coordinator: when it dies, other servers serve on, but no backup takes \
                    over before a coordinator is back at this address";
        if self.replicas == 0 {
            tracing::info!(at, "{what}");
        } else {
            let copies = "what has a part here waits for that, though others have copies; with --etcd every server may carry one";
            tracing::warn!(at, "{what}; {copies}");
        }
    }
}

/// How servers call a coordinator that listens there.
fn called(listen: SocketAddr, advertise: Option<&str>) -> String {
    advertise.map_or_else(|| listen.to_string(), |host| format!("{host}:{}", listen.port()))
}

/// A coordinator on a thread of this process. It stops when this is dropped.
pub(crate) struct Carried {
    address: SocketAddr,
    monitor: Monitor<CoordinatorReport>,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Carried {
    fn start(settings: CoordinatorSettings) -> Result<Self, String> {
        let listen = settings.listen;
        let bound = Coordinator::bind(settings);
        let mut coordinator = bound.map_err(|error| format!("--coordinate {listen}: {error}"))?;
        let (address, monitor, stopper) = (coordinator.address(), coordinator.monitor(), coordinator.stopper());
        let run = move || {
            if let Err(error) = coordinator.run() {
                // Data is worth more than a coordinator, of which others may be there.
                tracing::error!(%error, "the coordinator has ended; what is served here goes on being served");
            }
        };
        let thread = std::thread::Builder::new().name("gradwire-coordinator".to_owned()).spawn(run);
        let thread = thread.map_err(|error| format!("starting the coordinator's thread: {error}"))?;
        Ok(Self { address, monitor, stopper, thread: Some(thread) })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What tells of it.
    pub(crate) fn monitor(&self) -> Monitor<CoordinatorReport> {
        self.monitor.clone()
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.stopper.stop();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the coordinator's thread panicked");
        }
    }
}
