//! Pure: settings as Python names them, turned into those of the crates.

use gradwire_collectives::Settings;
use gradwire_transport::{Config, WireChoice};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::path::PathBuf;
use std::time::Duration;

/// What Python's `Config` holds; None: the default.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Options {
    transport: Option<String>,
    lanes: Option<usize>,
    socket_ifname: Option<String>,
    port_range: Option<(u16, u16)>,
    token: Option<String>,
    algorithms: Option<String>,
    trace: Option<PathBuf>,
    cores: usize,
}

impl Options {
    /// Settings of the wires and of the communicator.
    ///
    /// # Errors
    /// `ValueError` for a transport that there is not, or for no lanes.
    pub(crate) fn parse(self, timeout: Duration) -> PyResult<(Config, Settings)> {
        let mut config = Config {
            wire: wire_of(self.transport.as_deref().unwrap_or("auto"))?,
            socket_ifname: self.socket_ifname,
            port_range: self.port_range,
            token: self.token,
            timeout,
            ..Config::default()
        };
        if let Some(lanes) = self.lanes {
            config.lanes = lanes;
        }
        if !(1..=64).contains(&config.lanes) {
            let text = format!("lanes: {} is not a number of TCP connections per peer from 1 to 64", config.lanes);
            return Err(PyValueError::new_err(text));
        }
        let (algorithms, trace, cores) = (self.algorithms, self.trace, self.cores.max(1));
        let settings = Settings { timeout, algorithms, same_host: true, cores, trace };
        Ok((config, settings))
    }
}

fn wire_of(name: &str) -> PyResult<WireChoice> {
    match name {
        "auto" => Ok(WireChoice::Auto),
        "tcp" => Ok(WireChoice::Tcp),
        "shm" => Ok(WireChoice::Shm),
        other => Err(PyValueError::new_err(format!("transport: `{other}` is not known; use auto, tcp or shm"))),
    }
}
