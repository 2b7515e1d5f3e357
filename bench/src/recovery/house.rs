//! Does: a coordinator and servers with seats, each a process of its own.

use clap::Args;
use gradwire_ps::{Client, ClientSettings, ClusterServers, Coordinator, CoordinatorSettings, PsError, ServerSettings};
use gradwire_transport::Config;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// The coordinator, or a server.
#[derive(Args)]
pub(crate) struct PeerOptions {
    /// Shards of the cluster, or seats of the server
    #[arg(long)]
    shards: u32,
    /// Copies of each shard
    #[arg(long)]
    copies: u32,
    /// The coordinator of a server
    #[arg(long)]
    coordinator: Option<String>,
}

/// Runs until its standard input ends: with whoever started it.
pub(crate) fn peer(options: &PeerOptions) -> Result<(), Box<dyn Error>> {
    let say = |address: &str| {
        let mut out = std::io::stdout();
        writeln!(out, "{address}").and_then(|()| out.flush())
    };
    let shards = options.shards;
    if let Some(coordinator) = &options.coordinator {
        let servers = ClusterServers::join(shards, &ServerSettings::default(), vec![coordinator.clone()], None)?;
        say(&servers.addresses().join(" "))?;
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
        servers.stop();
        return Ok(());
    }
    let mut coordinator = Coordinator::bind(CoordinatorSettings {
        listen: ([127, 0, 0, 1], 0).into(),
        token: None,
        insecure: false,
        restore: None,
        shards,
        replicas: options.copies,
        etcd: None,
        transport: Config::default(),
    })?;
    say(&coordinator.address().to_string())?;
    let stopper = coordinator.stopper();
    std::thread::spawn(move || {
        // However its input ends, it is the end.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        stopper.stop();
    });
    Ok(coordinator.run()?)
}

/// Processes that end when this does: the coordinator first of them.
pub(super) struct House {
    coordinator: String,
    running: Vec<Child>,
}

impl House {
    /// Starts a coordinator of `shards` shards with `copies` of each, and as many servers as that takes, with room for all.
    pub(super) fn start(shards: u32, copies: u32) -> Result<Self, Box<dyn Error>> {
        let mut house = Self { coordinator: String::new(), running: Vec::new() };
        house.coordinator = house.begin((shards, copies), &[])?;
        let at = house.coordinator.clone();
        for _ in 0..=copies {
            house.begin((shards, copies), &["--coordinator", &at])?;
        }
        Ok(house)
    }

    fn begin(&mut self, (shards, copies): (u32, u32), more: &[&str]) -> Result<String, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["recovery-peer", "--shards", &shards.to_string(), "--copies", &copies.to_string()]).args(more);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().ok_or("a process without an output")?;
        self.running.push(child);
        let mut said = String::new();
        BufReader::new(out).read_line(&mut said)?;
        match said.trim() {
            "" => Err("a process of the cluster ended before it told its address".into()),
            address => Ok(address.to_owned()),
        }
    }

    pub(super) fn client(&self, worker: Option<u32>) -> Result<Client, PsError> {
        let settings =
            ClientSettings { worker, timeout: PATIENCE, reconnect: PATIENCE / 2, ..ClientSettings::default() };
        Client::through(std::slice::from_ref(&self.coordinator), settings)
    }

    /// Kills all servers but one at once, as machines that lose their power would.
    pub(super) fn kill_but(&mut self, stays: usize) -> std::io::Result<()> {
        let servers = (0..).zip(&mut self.running[1..]);
        let mut victims: Vec<_> = servers.filter(|(at, _)| *at != stays).map(|(_, child)| child).collect();
        victims.iter_mut().try_for_each(|child| child.kill())?;
        victims.into_iter().try_for_each(|child| child.wait().map(drop))
    }
}

impl Drop for House {
    fn drop(&mut self) {
        for child in &mut self.running {
            // It may have ended just now.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
