//! Pure: the rules of the choice of an address, one by one.

use super::*;
use std::net::Ipv4Addr;

const LINK_LOCAL: &str = "fe80::5054:ff:fe12:3456";
const IPV4: &str = "::ffff:10.0.0.7";
const IPV6: &str = "2001:db8::7";

fn gid(index: u8, address: &str, kind: &str) -> Gid {
    let bytes = address.parse::<Ipv6Addr>().unwrap().octets();
    Gid { index, bytes, kind: kind.to_owned(), interface: "eth2".to_owned() }
}

fn port(device: &str, link: Link, gids: &[Gid]) -> Port {
    Port { device: device.to_owned(), number: 1, active: true, link, mtu_bytes: 4096, gids: gids.to_vec() }
}

fn ethernet(device: &str, addresses: &[&str]) -> Port {
    let gids: Vec<Gid> = (0..).zip(addresses).map(|(index, address)| gid(index, address, "RoCE v2")).collect();
    port(device, Link::Ethernet, &gids)
}

fn listing(ports: &[Port]) -> Listing {
    Listing { ports: ports.to_vec(), closed: Vec::new() }
}

fn chosen(ports: &[Port], hca: Option<&str>, index: Option<u8>, local: &[IpAddr]) -> Result<(String, u8), String> {
    let choice = choose(&listing(ports), hca, index, local).map_err(|error| error.to_string())?;
    assert!(choice.reason.contains(&format!("GID {}", choice.gid.index)), "{}", choice.reason);
    Ok((format!("{}:{}", choice.port.device, choice.port.number), choice.gid.index))
}

fn at(place: &str, index: u8) -> Result<(String, u8), String> {
    Ok((place.to_owned(), index))
}

#[test]
fn the_address_by_which_peers_are_reached_comes_first_on_whatever_port() {
    let ports = [ethernet("a", &[LINK_LOCAL, IPV4, IPV6]), ethernet("b", &[LINK_LOCAL, "::ffff:10.1.0.7", IPV6])];
    let local = |text: &str| [text.parse::<IpAddr>().unwrap()];
    assert_eq!(chosen(&ports, None, None, &local("10.1.0.7")), at("b:1", 1));
    assert_eq!(chosen(&ports, None, None, &local("10.0.0.7")), at("a:1", 1));
    assert_eq!(chosen(&ports, None, None, &local("2001:db8::7")), at("a:1", 2));
    let choice = choose(&listing(&ports), None, None, &local("10.1.0.7")).unwrap();
    assert_eq!(choice.reason, "b:1 GID 1 (10.1.0.7, RoCE v2, eth2): peers are reached by this address");
}

#[test]
fn without_it_infiniband_then_ipv4_then_other_routed_addresses_serve() {
    let ib = port("ib", Link::InfiniBand, &[gid(0, "fe80::2", "IB/RoCE v1")]);
    let (v4, v6) = (ethernet("v4", &[LINK_LOCAL, IPV6, IPV4]), ethernet("v6", &[LINK_LOCAL, IPV6]));
    assert_eq!(chosen(&[v6.clone(), v4.clone(), ib.clone()], None, None, &[]), at("ib:1", 0));
    assert_eq!(chosen(&[v6.clone(), v4.clone()], None, None, &[]), at("v4:1", 2));
    assert_eq!(chosen(std::slice::from_ref(&v6), None, None, &[]), at("v6:1", 1));
    assert_eq!(chosen(&[v4, ib], None, None, &[Ipv4Addr::new(10, 0, 0, 7).into()]), at("v4:1", 2));
}

#[test]
fn the_first_of_equals_serves() {
    let ports = [ethernet("a", &["::ffff:10.0.0.1", "::ffff:10.0.0.2"]), ethernet("b", &["::ffff:10.0.0.3"])];
    assert_eq!(chosen(&ports, None, None, &[]), at("a:1", 0));
}

#[test]
fn link_local_and_nowhere_are_never_chosen_even_if_peers_are_reached_so() {
    for address in [LINK_LOCAL, "::ffff:169.254.3.4", "::", "ff02::1", "::ffff:224.0.0.1"] {
        let local = [address.parse::<Ipv6Addr>().unwrap().to_canonical()];
        let refusal = chosen(&[ethernet("rxe0", &[address])], None, None, &local).unwrap_err();
        assert!(refusal.contains("rxe0:1 has no RoCE v2 address that is routed"), "{refusal}");
        assert!(refusal.contains("give its interface eth2 an IP address"), "{refusal}");
    }
}

#[test]
fn loopback_serves_only_where_peers_are_reached_by_it() {
    let ports = [ethernet("rxe0", &["::ffff:127.0.0.1"])];
    assert!(chosen(&ports, None, None, &[]).is_err());
    assert_eq!(chosen(&ports, None, None, &[Ipv4Addr::LOCALHOST.into()]), at("rxe0:1", 0));
}

#[test]
fn only_version_two_serves_on_ethernet() {
    let both = port("m", Link::Ethernet, &[gid(2, IPV4, "IB/RoCE v1"), gid(3, IPV4, "RoCE v2")]);
    assert_eq!(chosen(&[both], None, None, &[]), at("m:1", 3));
    let old = port("m", Link::Ethernet, &[gid(2, IPV4, "IB/RoCE v1")]);
    assert!(chosen(&[old], None, None, &[]).unwrap_err().contains("only [10.0.0.7 (IB/RoCE v1)]"));
}

#[test]
fn a_port_that_is_down_is_passed_over_and_named() {
    let mut down = ethernet("a", &[IPV4]);
    down.active = false;
    assert_eq!(chosen(&[down.clone(), ethernet("b", &[IPV6])], None, None, &[]), at("b:1", 0));
    assert!(chosen(&[down], None, None, &[]).unwrap_err().contains("a:1 is not ACTIVE"));
}

#[test]
fn an_infiniband_port_without_its_address_is_named() {
    let refusal = chosen(&[port("ib", Link::InfiniBand, &[])], None, None, &[]).unwrap_err();
    assert!(refusal.contains("subnet manager"), "{refusal}");
    let refusal = chosen(&[port("x", Link::Unknown(9), &[])], None, None, &[]).unwrap_err();
    assert!(refusal.contains("(9)"), "{refusal}");
}

#[test]
fn the_index_that_was_asked_for_overrules_the_rules_of_addresses() {
    let ports = [ethernet("rxe0", &[LINK_LOCAL, IPV4])];
    assert_eq!(chosen(&ports, None, Some(0), &[]), at("rxe0:1", 0));
    let refusal = chosen(&ports, None, Some(5), &[]).unwrap_err();
    assert!(refusal.contains("has no GID 5") && refusal.contains("[0, 1]"), "{refusal}");
}

#[test]
fn devices_are_named_in_the_grammar_of_nccl() {
    let mut second = ethernet("mlx5_0", &[IPV4]);
    second.number = 2;
    let ports = [ethernet("mlx5_0", &[IPV4]), second, ethernet("mlx5_1", &[IPV4]), ethernet("mlx5_10", &[IPV4])];
    for (hca, place) in [
        ("", "mlx5_0:1"),
        ("mlx5", "mlx5_0:1"),
        ("mlx5_0:2", "mlx5_0:2"),
        ("mlx5_1:1,mlx5_7", "mlx5_1:1"),
        ("=mlx5_10", "mlx5_10:1"),
        ("^mlx5_0", "mlx5_1:1"),
        ("^mlx5_0:1", "mlx5_0:2"),
        ("^=mlx5_0,mlx5_1", "mlx5_10:1"),
    ] {
        assert_eq!(chosen(&ports, Some(hca), None, &[]), at(place, 0), "{hca}");
    }
    let refusal = chosen(&ports, Some("=mlx5"), None, &[]).unwrap_err();
    assert_eq!(refusal, "GRADWIRE_IB_HCA: `=mlx5` allows none of mlx5_0:1, mlx5_0:2, mlx5_1:1, mlx5_10:1");
    assert!(chosen(&ports, Some("mlx5_0:x"), None, &[]).unwrap_err().contains("`x` in `mlx5_0:x` is no port"));
}

#[test]
fn a_host_without_devices_and_devices_that_do_not_open_are_told_apart() {
    assert!(chosen(&[], None, None, &[]).unwrap_err().contains("this host has no RDMA device"));
    let closed = Listing { ports: Vec::new(), closed: vec![("m0".to_owned(), "Permission denied".to_owned())] };
    let refusal = choose(&closed, None, None, &[]).unwrap_err().to_string();
    assert!(refusal.contains("m0 cannot be opened: Permission denied"), "{refusal}");
}
