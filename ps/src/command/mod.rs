//! Does: what the commands have in common: the token, and sizes as people write them.

mod admin;
pub(crate) mod config;
pub(crate) mod coordinate;
pub(crate) mod drain;
mod embedded;
pub(crate) mod environment;
pub(crate) mod exchange;
mod log;
mod metrics;
mod periodic;
pub(crate) mod serve;
mod servers;
pub(crate) mod snapshot;
pub(crate) mod status;
mod wire;

use clap::Args;
use gradwire_transport::{Tls, TlsFiles};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where the secret comes from.
#[derive(Args)]
pub(crate) struct Token {
    /// Secret that servers and clients share; it is proved, never sent. Better given by the environment or a file, since
    /// other users of a machine see its command lines
    #[arg(long, env = "GRADWIRE_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,
    /// File that holds the secret; white space around it is left out
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Token {
    pub(crate) fn read(&self) -> Result<Option<String>, String> {
        let Some(path) = &self.token_file else { return Ok(self.token.clone()) };
        let text =
            std::fs::read_to_string(path).map_err(|error| format!("--token-file {}: {error}", path.display()))?;
        match text.trim() {
            "" => Err(format!("--token-file {}: it is empty", path.display())),
            token => Ok(Some(token.to_owned())),
        }
    }
}

/// Files that TLS is made of.
#[derive(Args)]
pub(crate) struct Certificates {
    /// Certificate to show, in PEM, with those between it and its CA: turns TLS on for all connections
    #[arg(long, env = "GRADWIRE_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert
    #[arg(long, env = "GRADWIRE_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Who must have signed the certificates of servers that are called
    #[arg(long, env = "GRADWIRE_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Who must have signed the certificates of clients: without it, they need none
    #[arg(long, env = "GRADWIRE_TLS_CLIENT_CA", value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Name that called servers must be certified for [default: the host, as it is called]
    #[arg(long, env = "GRADWIRE_TLS_SERVER_NAME", value_name = "NAME")]
    tls_server_name: Option<String>,
}

impl Certificates {
    pub(crate) fn load(&self) -> Result<Option<Arc<Tls>>, String> {
        let files = TlsFiles {
            cert: self.tls_cert.clone(),
            key: self.tls_key.clone(),
            ca: self.tls_ca.clone(),
            client_ca: self.tls_client_ca.clone(),
            server_name: self.tls_server_name.clone(),
        };
        Tls::load(&files).map_err(|error| format!("--{error}"))
    }
}

/// The machine's memory in bytes; 16 GiB where it does not say.
pub(crate) fn memory_of_machine() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map_or(16 << 30, |kib| kib * 1024)
}

const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// Reads `512MiB`, `64GiB`, `8GB` or a number of bytes.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = unit.trim();
    let factor = if unit.is_empty() { Some(1) } else { UNITS.iter().find(|(name, _)| *name == unit).map(|(_, f)| *f) };
    let bytes = number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    bytes.ok_or_else(|| "expected bytes, or a whole number with KiB, MiB, GiB, TiB, kB, MB, GB or TB".to_owned())
}

/// Reads `30s`, `10m`, `1h`, or a whole number of seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = match unit {
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    let seconds = number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    let seconds = seconds.filter(|&seconds| (1..=30 * 86_400).contains(&seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| "expected a whole number with s, m or h, up to 30 days".to_owned())
}

/// Bytes as people read them.
pub(crate) fn show_bytes(bytes: u64) -> String {
    let unit = UNITS[..4].iter().rev().find(|(_, factor)| bytes >= *factor);
    unit.map_or_else(|| format!("{bytes} B"), |(name, factor)| format!("{:.1} {name}", bytes as f64 / *factor as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown_as_people_write_them() {
        assert_eq!(parse_bytes("17"), Ok(17));
        assert_eq!(parse_bytes("2GiB"), Ok(2 << 30));
        assert_eq!(parse_bytes("3 MB"), Ok(3_000_000));
        for bad in ["", "GiB", "1.5GiB", "1gib", "99999999999999TiB", "-1"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "0s", "1d", "99999999h", "-1"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert_eq!(show_bytes(5), "5 B");
        assert_eq!(show_bytes(3 << 29), "1.5 GiB");
    }
}
