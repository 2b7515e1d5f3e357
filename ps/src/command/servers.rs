//! Does: which servers a command talks to, and as whom.

use super::{Certificates, Token};
use clap::Args;
use gradwire_ps::{Client, ClientSettings};
use gradwire_transport::Config;

/// Flags of a command that talks to servers.
#[derive(Args)]
pub(crate) struct Servers {
    /// Addresses of the servers, in the order that clients give them
    #[arg(long = "servers", value_delimiter = ',', required = true, value_name = "HOST:PORT,...")]
    pub(crate) addresses: Vec<String>,
    #[command(flatten)]
    token: Token,
    #[command(flatten)]
    certificates: Certificates,
}

impl Servers {
    /// A client of them, of which `settings` says the rest.
    pub(crate) fn connect(&self, settings: ClientSettings) -> Result<Client, String> {
        let transport = Config { tls: self.certificates.load()?, ..settings.transport };
        let settings = ClientSettings { token: self.token.read()?, transport, ..settings };
        Client::connect(&self.addresses, settings).map_err(|error| error.to_string())
    }
}
