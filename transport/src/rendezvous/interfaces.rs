//! Does: lists the addresses of this host that are worth telling others, the best first.

use crate::TransportError;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Bridges that lead into containers and virtual machines of this host, not to other hosts.
const BRIDGES: [&str; 4] = ["docker", "virbr", "br-", "cni"];

/// Which interfaces may be used, in NCCL's grammar.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceFilter {
    exclude: bool,
    exact: bool,
    names: Vec<String>,
}

impl InterfaceFilter {
    /// `eth,ib`: names that begin so; `=eth0`: this name; `^docker,lo`: names that do not begin so; `^=lo`: not this name.
    pub fn parse(text: &str) -> Self {
        let (exclude, rest) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
        let (exact, rest) = rest.strip_prefix('=').map_or((false, rest), |rest| (true, rest));
        let names = rest.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect();
        Self { exclude, exact, names }
    }

    /// Whether the interface `name` may be used.
    pub fn allows(&self, name: &str) -> bool {
        let named =
            self.names.iter().any(|known| if self.exact { name == known } else { name.starts_with(known.as_str()) });
        self.names.is_empty() || named != self.exclude
    }
}

/// The addresses of this host on allowed interfaces: networks first, then bridges, then loopback.
///
/// # Errors
/// `Config` where no interface is allowed, listing those that there are.
pub fn addresses(filter: &InterfaceFilter) -> Result<Vec<IpAddr>, TransportError> {
    let all = if_addrs::get_if_addrs().map_err(|error| TransportError::io("list this host's interfaces", error))?;
    let mut allowed: Vec<(u8, IpAddr)> = all
        .iter()
        .filter(|interface| filter.allows(&interface.name) && !is_link_local(interface.ip()))
        .map(|interface| (order(&interface.name, interface.ip()), interface.ip()))
        .collect();
    allowed.sort_by_key(|(order, ip)| (*order, ip.is_ipv6()));
    if allowed.is_empty() {
        let names: Vec<&str> = all.iter().map(|interface| interface.name.as_str()).collect();
        let reason = format!("no interface matches {filter:?}; this host has {names:?}");
        return Err(TransportError::Config { setting: "GRADWIRE_SOCKET_IFNAME".to_owned(), reason });
    }
    Ok(allowed.into_iter().map(|(_, ip)| ip).collect())
}

fn order(name: &str, ip: IpAddr) -> u8 {
    match () {
        () if ip.is_loopback() => 2,
        () if BRIDGES.iter().any(|bridge| name.starts_with(bridge)) => 1,
        () => 0,
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// The address of this host from which `to` is reached; nothing is sent.
pub fn routed_address(to: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr =
        if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip().to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_nccl_s() {
        for (filter, name, allowed) in [
            ("eth,ib", "eth0", true),
            ("eth,ib", "ib1", true),
            ("eth,ib", "docker0", false),
            ("=eth0", "eth0", true),
            ("=eth0", "eth01", false),
            ("^docker,lo", "docker0", false),
            ("^docker,lo", "eth0", true),
            ("^=lo", "lo0", true),
            ("^=lo", "lo", false),
            ("", "anything", true),
        ] {
            assert_eq!(InterfaceFilter::parse(filter).allows(name), allowed, "{filter} {name}");
        }
    }

    #[test]
    fn this_host_has_loopback_and_it_comes_last() {
        let found = addresses(&InterfaceFilter::default()).unwrap();
        let first = found.iter().position(|ip| ip.is_loopback()).unwrap();
        assert!(found[first..].iter().all(|ip| ip.is_loopback()));
        assert!(addresses(&InterfaceFilter::parse("=nosuch")).unwrap_err().to_string().contains("lo"));
    }
}
