//! Pure: which device, port and address (GID) of this host the verbs wire uses, and why.

use crate::TransportError;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// What this host has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Ports of the devices that could be opened, in the library's order.
    pub ports: Vec<Port>,
    /// Devices that could not: name and why.
    pub closed: Vec<(String, String)>,
}

/// One port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The device's name.
    pub device: String,
    /// The port's number, from 1.
    pub number: u8,
    /// Whether its state is ACTIVE.
    pub active: bool,
    /// What it is connected to.
    pub link: Link,
    /// Largest packet payload that it takes now, in bytes.
    pub mtu_bytes: u16,
    /// Its addresses, without the empty places of its table.
    pub gids: Vec<Gid>,
}

/// A kind of network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet.
    Ethernet,
    /// A code that we do not know.
    Unknown(u8),
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Its place in the port's table.
    pub index: u8,
    /// The address.
    pub bytes: [u8; 16],
    /// The kernel's word for its kind, as `RoCE v2`.
    pub kind: String,
    /// The network interface that it belongs to; empty where there is none.
    pub interface: String,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The port.
    pub port: Port,
    /// Its address.
    pub gid: Gid,
    /// What and why, for people.
    pub reason: String,
}

/// Chooses among the ports that are active and that `hca` allows: first an address that is one of `local`, by which peers
/// are reached, then InfiniBand, then an IPv4 address, then any other that is routed. On Ethernet it is of RoCE v2 and
/// never link-local. `gid_index` overrules all this within a port.
///
/// # Errors
/// `Config`, with what speaks against each port and what to do.
pub fn choose(
    listing: &Listing,
    hca: Option<&str>,
    gid_index: Option<u8>,
    local: &[IpAddr],
) -> Result<Choice, TransportError> {
    let refuse = |setting: &str, reason| Err(TransportError::Config { setting: setting.to_owned(), reason });
    let filter = hca.map(Filter::parse).transpose()?;
    let allowed = |device: &str, port: Option<u8>| filter.as_ref().is_none_or(|filter| filter.allows(device, port));
    let mut best: Option<(Order, Choice)> = None;
    let mut against: Vec<String> = listing
        .closed
        .iter()
        .filter(|(device, _)| allowed(device, None))
        .map(|(device, why)| format!("{device} cannot be opened: {why}"))
        .collect();
    for port in listing.ports.iter().filter(|port| allowed(&port.device, Some(port.number))) {
        match best_of(port, gid_index, local) {
            Ok((order, gid)) if best.as_ref().is_none_or(|(known, _)| order < *known) => {
                let reason = format!("{}: {}", Named(port, gid), order.words());
                best = Some((order, Choice { port: port.clone(), gid: gid.clone(), reason }));
            }
            Ok(_) => {}
            Err(why) => against.push(format!("{}:{} {why}", port.device, port.number)),
        }
    }
    match (best, hca) {
        (Some((_, choice)), _) => Ok(choice),
        (None, _) if listing.ports.is_empty() && listing.closed.is_empty() => refuse(
            "RDMA",
            "this host has no RDMA device: load its driver (`rdma link` lists devices), or, in a container, pass \
             /dev/infiniband and /sys/class/infiniband in"
                .to_owned(),
        ),
        (None, Some(hca)) if against.is_empty() => {
            let there: Vec<String> =
                listing.ports.iter().map(|port| format!("{}:{}", port.device, port.number)).collect();
            refuse("GRADWIRE_IB_HCA", format!("`{hca}` allows none of {}", there.join(", ")))
        }
        (None, _) => refuse("RDMA", against.join("; ")),
    }
}

/// Names a port and its address for people.
pub(super) struct Named<'a>(pub &'a Port, pub &'a Gid);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(port, gid) = self;
        write!(f, "{}:{} GID {} ({}, {}", port.device, port.number, gid.index, text(&gid.bytes), gid.kind)?;
        if gid.interface.is_empty() { f.write_str(")") } else { write!(f, ", {})", gid.interface) }
    }
}

/// An address as people write it.
pub(super) fn text(gid: &[u8; 16]) -> String {
    address(gid).to_string()
}

fn address(gid: &[u8; 16]) -> IpAddr {
    Ipv6Addr::from(*gid).to_canonical()
}

/// The better the smaller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    Asked,
    Routed,
    InfiniBand,
    Ipv4,
    Global,
}

impl Order {
    fn words(self) -> &'static str {
        match self {
            Self::Asked => "as GRADWIRE_IB_GID_INDEX says",
            Self::Routed => "peers are reached by this address",
            Self::InfiniBand => "the first address of an InfiniBand port",
            Self::Ipv4 => "an IPv4 address, though not the one by which peers are reached over TCP",
            Self::Global => "a routed address, though not the one by which peers are reached over TCP",
        }
    }
}

fn best_of<'a>(port: &'a Port, gid_index: Option<u8>, local: &[IpAddr]) -> Result<(Order, &'a Gid), String> {
    if !port.active {
        return Err("is not ACTIVE: bring its link up (`rdma link`)".to_owned());
    }
    if let Some(index) = gid_index {
        let gid = port.gids.iter().find(|gid| gid.index == index);
        let there: Vec<u8> = port.gids.iter().map(|gid| gid.index).collect();
        return gid.map(|gid| (Order::Asked, gid)).ok_or_else(|| {
            format!("has no GID {index} as GRADWIRE_IB_GID_INDEX wants, but {there:?}: choose one, or leave the choice to us")
        });
    }
    match port.link {
        Link::InfiniBand => match port.gids.iter().find(|gid| gid.index == 0) {
            Some(gid) => Ok((Order::InfiniBand, gid)),
            None => Err("has no GID 0: is a subnet manager running?".to_owned()),
        },
        Link::Ethernet => best_on_ethernet(port, local),
        Link::Unknown(code) => Err(format!("has a link layer that we do not know ({code})")),
    }
}

fn best_on_ethernet<'a>(port: &'a Port, local: &[IpAddr]) -> Result<(Order, &'a Gid), String> {
    let mut best: Option<(Order, &Gid)> = None;
    for gid in port.gids.iter().filter(|gid| gid.kind == "RoCE v2") {
        if let Some(order) = order(address(&gid.bytes), local)
            && best.is_none_or(|(known, _)| order < known)
        {
            best = Some((order, gid));
        }
    }
    best.ok_or_else(|| {
        let mut found: Vec<String> =
            port.gids.iter().map(|gid| format!("{} ({})", text(&gid.bytes), gid.kind)).collect();
        let interface = port.gids.iter().map(|gid| gid.interface.as_str()).find(|name| !name.is_empty());
        found.sort();
        format!(
            "has no RoCE v2 address that is routed, only [{}]: give its interface {} an IP address",
            found.join(", "),
            interface.unwrap_or("(see `rdma link`)")
        )
    })
}

fn order(address: IpAddr, local: &[IpAddr]) -> Option<Order> {
    let link_local = match address {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let nowhere = address.is_unspecified() || address.is_multicast();
    match address {
        _ if link_local || nowhere => None,
        _ if local.iter().any(|ip| ip.to_canonical() == address) => Some(Order::Routed),
        _ if address.is_loopback() => None,
        IpAddr::V4(_) => Some(Order::Ipv4),
        IpAddr::V6(_) => Some(Order::Global),
    }
}

/// `GRADWIRE_IB_HCA`, read.
struct Filter {
    exclude: bool,
    exact: bool,
    names: Vec<(String, Option<u8>)>,
}

impl Filter {
    fn parse(text: &str) -> Result<Self, TransportError> {
        let (exclude, rest) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
        let (exact, rest) = rest.strip_prefix('=').map_or((false, rest), |rest| (true, rest));
        let mut names = Vec::new();
        for name in rest.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            names.push(match name.split_once(':') {
                None => (name.to_owned(), None),
                Some((name, port)) => match port.parse() {
                    Ok(port) => (name.to_owned(), Some(port)),
                    Err(_) => {
                        let reason = format!("`{port}` in `{text}` is no port: write `mlx5_0:1`");
                        return Err(TransportError::Config { setting: "GRADWIRE_IB_HCA".to_owned(), reason });
                    }
                },
            });
        }
        Ok(Self { exclude, exact, names })
    }

    /// Whether the port may be used; with no port, whether any of the device's may.
    fn allows(&self, device: &str, port: Option<u8>) -> bool {
        let named = self.names.iter().any(|(name, wanted)| {
            let fits = if self.exact { device == name } else { device.starts_with(name.as_str()) };
            let port_fits = match (wanted, port) {
                (Some(wanted), Some(port)) => *wanted == port,
                (Some(_), None) => !self.exclude,
                (None, _) => true,
            };
            fits && port_fits
        });
        self.names.is_empty() || named != self.exclude
    }
}

#[cfg(test)]
mod tests;
