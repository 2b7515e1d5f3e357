//! Does: `gradwire-ps drain`: has a server hand its shards over to their backups, and waits until it has none.

use super::parse_duration;
use super::servers::Cluster;
use clap::Args;
use gradwire_ps::{Client, ClientSettings};
use std::time::Duration;

/// Flags of `drain`.
#[derive(Args)]
pub(crate) struct Drain {
    #[command(flatten)]
    cluster: Cluster,
    /// One of the server's addresses, as `status` prints it; all shards that its process serves are handed over
    #[arg(long, value_name = "HOST:PORT")]
    server: String,
    /// The longest that it may take: where a shard has no backup, another server must come and get a copy first
    #[arg(long, default_value = "60s", value_parser = parse_duration, value_name = "TIME")]
    timeout: Duration,
}

impl Drain {
    pub(crate) fn run(self) -> Result<(), String> {
        let settings = ClientSettings { timeout: self.timeout, ..ClientSettings::default() };
        let settings = self.cluster.settings(settings)?;
        Client::drain(&self.cluster.coordinators, &self.server, settings).map_err(|error| error.to_string())?;
        println!("{} serves no shard any more, and gets none: it may be stopped", self.server);
        Ok(())
    }
}
