//! Does: reaches servers and is reached by clients: what the waist leaves to each wire.

use crate::PsError;
use gradwire_transport::{
    Acceptance, Beside, Config, Identity, Mesh, PeerId, ShmWire, TcpWire, TransportError, Wire, WireChoice, home,
    open_verbs, routed_address,
};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::Instant;

/// A wire that can call a server by its address.
pub trait Dialer: Wire {
    /// Connects to the server at `address` and makes it `peer`; blocks until the deadline at most.
    ///
    /// # Errors
    /// `Authentication`; `Tls`; `Unreachable`; `Config` for a wire that was asked for by name and cannot be had.
    fn call(&mut self, peer: PeerId, address: &str, deadline: Instant) -> Result<(), TransportError>;
}

impl Dialer for TcpWire {
    fn call(&mut self, peer: PeerId, address: &str, deadline: Instant) -> Result<(), TransportError> {
        self.dial_host(peer, None, Some(host_of(address)), &look_up(address)?, deadline)
    }
}

impl Dialer for Mesh {
    fn call(&mut self, peer: PeerId, address: &str, deadline: Instant) -> Result<(), TransportError> {
        Self::call(self, peer, Some(host_of(address)), &look_up(address)?, deadline)
    }
}

/// The host of `host:port`, which its certificate is to be for.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn look_up(address: &str) -> Result<Vec<SocketAddr>, TransportError> {
    let found = address.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
    found.map_err(|error| TransportError::io(format!("look up the server {address:?}"), error))
}

type Better = Vec<Box<dyn Beside>>;

/// What goes beside sockets: shared memory to processes of this host, and RDMA where this host has a device, as `config` allows
/// it; with the device and why it.
fn beside(config: &Config, local: &[IpAddr]) -> Result<(Better, Option<String>), PsError> {
    let mut better = Better::new();
    if matches!(config.wire, WireChoice::Auto | WireChoice::Shm) {
        better.push(Box::new(ShmWire::new(config)?));
    }
    let mut device = None;
    if let Some((verbs, reason)) = open_verbs(config, local)? {
        better.push(Box::new(verbs));
        device = Some(reason);
    }
    Ok((better, device))
}

/// What a client calls `addresses` by: sockets, and what [`beside`] finds.
pub(crate) fn dialer(config: &Config, addresses: &[String]) -> Result<Box<dyn Dialer>, PsError> {
    let found = addresses.iter().filter_map(|address| look_up(address).ok()).flatten();
    let local: Vec<IpAddr> = found.filter_map(routed_address).collect();
    let (better, device) = beside(config, &local)?;
    let tcp = TcpWire::new(config, identity(random()?, config, device.is_some()), Acceptance::Nobody)?;
    Ok(if better.is_empty() { Box::new(tcp) } else { Box::new(Mesh::meeting(tcp, better, config.wire)) })
}

/// What asks one question, by sockets.
pub(crate) fn plain_dialer(config: &Config) -> Result<Box<dyn Dialer>, TransportError> {
    let nonce = random().map_err(|error| TransportError::io("draw a random number", std::io::Error::other(error)))?;
    let config = Config { wire: WireChoice::Tcp, ..config.clone() };
    Ok(Box::new(TcpWire::new(&config, identity(nonce, &config, false), Acceptance::Nobody)?))
}

/// Refuses to listen off loopback where the port is `open` to everybody.
///
/// # Errors
/// `Invalid`, with the remedies.
pub(crate) fn check_open(listen: SocketAddr, open: bool) -> Result<(), PsError> {
    if listen.ip().is_loopback() || !open {
        return Ok(());
    }
    let reason = "off loopback everybody who reaches the port could read and change the tables: set a token \
                  (GRADWIRE_TOKEN), give certificates (--tls-cert), or say that you want it insecure";
    Err(PsError::invalid(format!("listening at {listen}"), reason))
}

/// What a server answers by, and where it listens.
pub(crate) fn listener(
    config: &Config,
    listen: SocketAddr,
    (instance, max_peers): (u64, usize),
) -> Result<(Box<dyn Dialer>, SocketAddr), PsError> {
    let local: Vec<IpAddr> = Some(listen.ip()).filter(|ip| !ip.is_unspecified()).into_iter().collect();
    let (better, device) = beside(config, &local)?;
    let who = identity(instance, config, device.is_some());
    let mut tcp = TcpWire::new(config, who, Acceptance::Anyone { max_peers })?;
    let address = tcp.listen(listen)?;
    if let Some(device) = device {
        tracing::info!(%address, device, "RDMA is offered to clients");
    }
    let wire: Box<dyn Dialer> =
        if better.is_empty() { Box::new(tcp) } else { Box::new(Mesh::meeting(tcp, better, WireChoice::Auto)) };
    Ok((wire, address))
}

/// What this process tells of itself.
fn identity(nonce: u64, config: &Config, rdma: bool) -> Identity {
    let (home, memory) = (home(), matches!(config.wire, WireChoice::Auto | WireChoice::Shm));
    Identity { rank: None, host: home.host, pid: std::process::id(), boot_id: home.boot_id, nonce, rdma, memory }
}

/// A number that no other process draws.
pub(crate) fn random() -> Result<u64, PsError> {
    getrandom::u64().map_err(|error| {
        let source = std::io::Error::other(error.to_string());
        PsError::Transport(TransportError::io("draw a random number", source))
    })
}
