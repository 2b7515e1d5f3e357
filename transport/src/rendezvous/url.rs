//! Does: opens the store that a URL names, and finds this process's rank and world size.

use super::{FileStore, Store, TcpStore};
use crate::{Rank, TransportError, WorldSize};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;

/// What launchers call the rank and the world size, in the order in which they are asked.
const RANKS: [&str; 4] = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"];
const SIZES: [&str; 4] = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"];

/// A process's way into a group: where to meet, and as whom.
pub type Meeting = (Arc<dyn Store>, Rank, WorldSize);

/// Opens `url`: `env://` (as torchrun, mpirun and srun set the environment), `tcp://host:port` (rank 0 serves it) or
/// `file:///folder`. `rank` and `world_size` come from the arguments, the URL's `?rank=0&world_size=2`, or the environment,
/// which `env` reads.
///
/// # Errors
/// `Config` naming what is missing or makes no sense; `Io` when rank 0 cannot serve.
pub fn open_store(
    url: &str,
    rank: Option<u32>,
    world_size: Option<u32>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Meeting, TransportError> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("init_method", format!("`{url}` is not a URL")))?;
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let asked = |name: &str| {
        query
            .split('&')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
            .map(|(_, value)| value.to_owned())
    };
    let number = |given: Option<u32>, name: &str, names: &[&str]| -> Result<u32, TransportError> {
        let text = match given {
            Some(given) => return Ok(given),
            None => asked(name).or_else(|| names.iter().find_map(|name| env(name))),
        };
        let missing =
            || wrong(name, format!("give it as an argument, in the URL (`?{name}=0`), or as one of {names:?}"));
        text.ok_or_else(missing)?.trim().parse().map_err(|_| wrong(name, "is not a number".to_owned()))
    };
    let rank = Rank(number(rank, "rank", &RANKS)?);
    let size = number(world_size, "world_size", &SIZES)?;
    let world_size = WorldSize::new(size)
        .filter(|size| size.contains(rank))
        .ok_or_else(|| wrong("rank", format!("{rank} is not one of a group of {size}")))?;
    let store: Arc<dyn Store> = match scheme {
        "file" => Arc::new(FileStore::new(Path::new(place))?),
        "tcp" => {
            let (host, port) =
                place.rsplit_once(':').ok_or_else(|| wrong("init_method", format!("`{url}` has no port")))?;
            tcp(host, port, rank)?
        }
        "env" => {
            let need = |name: &str| env(name).ok_or_else(|| wrong(name, "is not set, and env:// needs it".to_owned()));
            tcp(&need("MASTER_ADDR")?, &need("MASTER_PORT")?, rank)?
        }
        other => return Err(wrong("init_method", format!("`{other}://` is not known: use env://, tcp:// or file://"))),
    };
    Ok((store, rank, world_size))
}

fn tcp(host: &str, port: &str, rank: Rank) -> Result<Arc<dyn Store>, TransportError> {
    let port: u16 = port.trim().parse().map_err(|_| wrong("port", format!("`{port}` is not a port")))?;
    let host = host.trim_matches(['[', ']']);
    if rank.0 > 0 {
        return Ok(Arc::new(TcpStore::client(host, port)?));
    }
    let first = (host, port).to_socket_addrs().ok().and_then(|mut all| all.next());
    // Where the master's name leads to loopback on the master itself, the others come from elsewhere: listen everywhere.
    let everywhere = SocketAddr::from(([0, 0, 0, 0], port));
    let address =
        first.filter(|address| !address.ip().is_loopback() || host.starts_with("127.") || host == "localhost");
    Ok(Arc::new(TcpStore::serve(address.unwrap_or(everywhere))?))
}

fn wrong(setting: &str, reason: String) -> TransportError {
    TransportError::Config { setting: setting.to_owned(), reason }
}
