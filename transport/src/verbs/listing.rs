//! Does: lists this host's RDMA devices, ports and addresses, by libibverbs and sysfs.

use super::context::{Context, DeviceList};
use super::ffi::{LINK_ETHERNET, LINK_INFINIBAND, PORT_ACTIVE, ibv_port_attr};
use super::gid::{Gid, Link, Listing, Port};
use super::queue_pair::mtu_bytes;
use std::io;

/// Everything that `devices` has. A device that cannot be opened is listed as such.
pub(super) fn list(devices: &DeviceList) -> Listing {
    let mut listing = Listing::default();
    for name in devices.names() {
        match devices.open(&name).and_then(|context| ports(&context)) {
            Ok(ports) => listing.ports.extend(ports),
            Err(error) => listing.closed.push((name, error.to_string())),
        }
    }
    listing
}

fn ports(context: &Context) -> io::Result<Vec<Port>> {
    let count = context.attributes()?.phys_port_cnt;
    (1..=count).map(|number| Ok(port(context, number, &context.port(number)?))).collect()
}

fn port(context: &Context, number: u8, attributes: &ibv_port_attr) -> Port {
    let link = match attributes.link_layer {
        LINK_INFINIBAND => Link::InfiniBand,
        LINK_ETHERNET => Link::Ethernet,
        code => Link::Unknown(code),
    };
    // An address handle's index has eight bits.
    let length = u8::try_from(attributes.gid_tbl_len).unwrap_or(u8::MAX);
    Port {
        device: context.name.clone(),
        number,
        active: attributes.state == PORT_ACTIVE,
        link,
        mtu_bytes: mtu_bytes(attributes.active_mtu),
        gids: (0..length).filter_map(|index| gid(context, number, index)).collect(),
    }
}

/// An entry of the table; `None` where it is empty, which the kernel says by an error, the library sometimes by zeros.
fn gid(context: &Context, port: u8, index: u8) -> Option<Gid> {
    let bytes = context.gid(port, index).ok().filter(|bytes| *bytes != [0; 16])?;
    let attribute = |what: &str| {
        let path = format!("/sys/class/infiniband/{}/ports/{port}/gid_attrs/{what}/{index}", context.name);
        std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    };
    Some(Gid { index, bytes, kind: attribute("types")?, interface: attribute("ndevs").unwrap_or_default() })
}
