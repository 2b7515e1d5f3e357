//! Does: settings as Python names them, turned into those of the crates; reads the certificates that they name.

use crate::on_signal;
use gradwire_collectives::{FoldPlace, Settings};
use gradwire_transport::{Config, CreditSettings, Tls, TlsFiles, VerbsConfig, WireChoice};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Ranks of a group send each other tensors whole, whatever their size; nothing is kept of one that nobody waits for.
const MOST_MESSAGE_BYTES: usize = 1 << 40;

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
    deterministic: Option<bool>,
    check_nan: Option<bool>,
    trace: Option<PathBuf>,
    trace_signal: Option<String>,
    cuda_direct: Option<bool>,
    cuda_reduce: Option<String>,
    cuda_alike: Option<usize>,
    nvrtc: Option<PathBuf>,
    cores: usize,
    ib: Ib,
    tls: Files,
}

/// What Python's `Config` holds of TLS.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Files {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    server_name: Option<String>,
}

impl Files {
    fn load(self) -> PyResult<Option<Arc<Tls>>> {
        let Self { cert, key, ca, client_ca, server_name } = self;
        let loaded = Tls::load(&TlsFiles { cert, key, ca, client_ca, server_name });
        loaded.map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

/// What Python's `Config` holds of RDMA.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Ib {
    hca: Option<String>,
    gid_index: Option<u8>,
    queue_pairs: Option<usize>,
    traffic_class: Option<u8>,
    service_level: Option<u8>,
    timeout: Option<u8>,
    retries: Option<u8>,
}

impl Ib {
    fn parse(self) -> PyResult<VerbsConfig> {
        let default = VerbsConfig::default();
        let config = VerbsConfig {
            hca: self.hca,
            gid_index: self.gid_index,
            queue_pairs: self.queue_pairs.unwrap_or(default.queue_pairs),
            traffic_class: self.traffic_class.unwrap_or(default.traffic_class),
            service_level: self.service_level.unwrap_or(default.service_level),
            timeout: self.timeout.unwrap_or(default.timeout),
            retries: self.retries.unwrap_or(default.retries),
            ..default
        };
        config.check().map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(config)
    }
}

impl Options {
    /// The signal on which the records of the process's groups are written, where one was given.
    ///
    /// # Errors
    /// `ValueError` for what is no signal that can be had for this.
    pub(crate) fn trace_signal(&self) -> PyResult<Option<i32>> {
        let parsed = self.trace_signal.as_deref().map(on_signal::parse).transpose();
        parsed.map_err(|reason| PyValueError::new_err(format!("GRADWIRE_TRACE_SIGNAL: {reason}")))
    }

    /// Settings of the wires and of the communicator.
    ///
    /// # Errors
    /// `ValueError` for a transport that there is not, for no lanes, or for RDMA settings that no device takes.
    pub(crate) fn parse(self, timeout: Duration) -> PyResult<(Config, Settings)> {
        let mut config = Config {
            wire: wire_of(self.transport.as_deref().unwrap_or("auto"))?,
            socket_ifname: self.socket_ifname,
            port_range: self.port_range,
            token: self.token,
            tls: self.tls.load()?,
            timeout,
            max_message_bytes: MOST_MESSAGE_BYTES,
            verbs: self.ib.parse()?,
            // A gather sends many to one.
            credit: Some(CreditSettings { marked: true, ..CreditSettings::default() }),
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
        let deterministic = self.deterministic.unwrap_or_default();
        let check_nan = self.check_nan.unwrap_or_default();
        let (cuda_direct, nvrtc) = (self.cuda_direct.unwrap_or(true), self.nvrtc);
        let cuda_alike = self.cuda_alike.unwrap_or(Settings::default().cuda_alike);
        let cuda_reduce = place_of(self.cuda_reduce.as_deref().unwrap_or("auto"))?;
        let settings = Settings {
            timeout,
            algorithms,
            deterministic,
            check_nan,
            cores,
            trace,
            cuda_direct,
            cuda_reduce,
            cuda_alike,
            nvrtc,
            ..Settings::default()
        };
        Ok((config, settings))
    }

    /// `base`, with the wires that these say.
    ///
    /// # Errors
    /// As for [`Options::parse`].
    pub(crate) fn wires(self, base: Config) -> PyResult<Config> {
        let wire = wire_of(self.transport.as_deref().unwrap_or("auto"))?;
        Ok(Config { wire, verbs: self.ib.parse()?, tls: self.tls.load()?, ..base })
    }
}

fn place_of(name: &str) -> PyResult<Option<FoldPlace>> {
    match name {
        "auto" | "" => Ok(None),
        "device" => Ok(Some(FoldPlace::Device)),
        "host" => Ok(Some(FoldPlace::Host)),
        other => {
            let text = format!("GRADWIRE_CUDA_REDUCE: `{other}` is no place to sum at: auto, device or host");
            Err(PyValueError::new_err(text))
        }
    }
}

fn wire_of(name: &str) -> PyResult<WireChoice> {
    match name {
        "auto" => Ok(WireChoice::Auto),
        "tcp" => Ok(WireChoice::Tcp),
        "shm" => Ok(WireChoice::Shm),
        "verbs" => Ok(WireChoice::Verbs),
        other => Err(PyValueError::new_err(format!("transport: `{other}` is not known; use auto, verbs, tcp or shm"))),
    }
}
