//! Does: which servers a command talks to, and as whom.

use super::{Certificates, Token};
use clap::Args;
use gradwire_ps::{Client, ClientSettings, ClusterMap};
use gradwire_transport::Config;

/// Flags of a command that talks to servers.
#[derive(Args)]
pub(crate) struct Servers {
    /// Addresses of the servers, in the order that clients give them
    #[arg(
        long = "servers",
        value_delimiter = ',',
        required_unless_present = "coordinator",
        value_name = "HOST:PORT,..."
    )]
    pub(crate) addresses: Vec<String>,
    /// Coordinators of a cluster: it says where the servers are
    #[arg(long, value_delimiter = ',', conflicts_with = "addresses", value_name = "HOST:PORT,...")]
    coordinator: Vec<String>,
    #[command(flatten)]
    token: Token,
    #[command(flatten)]
    certificates: Certificates,
}

impl Servers {
    /// A client of them, of which `settings` says the rest.
    pub(crate) fn connect(&self, settings: ClientSettings) -> Result<Client, String> {
        let settings = self.settings(settings)?;
        let client = match self.coordinator.is_empty() {
            true => Client::connect(&self.addresses, settings),
            false => Client::through(&self.coordinator, settings),
        };
        client.map_err(|error| error.to_string())
    }

    /// The coordinator's map, where there is a coordinator.
    pub(crate) fn map(&self, settings: ClientSettings) -> Result<Option<ClusterMap>, String> {
        if self.coordinator.is_empty() {
            return Ok(None);
        }
        let map = Client::map_of(&self.coordinator, self.settings(settings)?);
        map.map(Some).map_err(|error| error.to_string())
    }

    fn settings(&self, settings: ClientSettings) -> Result<ClientSettings, String> {
        let transport = Config { tls: self.certificates.load()?, ..settings.transport };
        Ok(ClientSettings { token: self.token.read()?, transport, ..settings })
    }
}
