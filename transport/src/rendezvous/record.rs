//! Pure: what a rank leaves in the store for the others.

use std::net::SocketAddr;

/// Longest record.
const MAX_ADDRESSES: usize = 64;

/// Where a process runs, as exactly as it can tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostIdentity {
    /// Its host name.
    pub host: String,
    /// The boot of its host: two hosts never share one.
    pub boot_id: String,
    /// Its network namespace: within one, loopback is the same loopback.
    pub net_namespace: String,
}

/// A rank's record: who it is and where it listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it runs.
    pub home: HostIdentity,
    /// Its process id.
    pub pid: u32,
    /// Drawn for this attempt: tells a new process from a dead one at the same address.
    pub nonce: u64,
    /// Where it listens, the best first.
    pub addresses: Vec<SocketAddr>,
}

impl Record {
    /// The record as text, a line a field: a person who looks into the store can read it.
    pub fn encode(&self) -> Vec<u8> {
        let HostIdentity { host, boot_id, net_namespace } = &self.home;
        let mut out = format!("gradwire 1\n{host}\n{boot_id}\n{net_namespace}\n{}\n{}\n", self.pid, self.nonce);
        self.addresses.iter().take(MAX_ADDRESSES).for_each(|address| out.push_str(&format!("{address}\n")));
        out.into_bytes()
    }

    /// The record in `bytes`; `None` where it is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(bytes).ok()?.lines();
        if lines.next()? != "gradwire 1" {
            return None;
        }
        let mut text = || lines.next().map(str::to_owned);
        let home = HostIdentity { host: text()?, boot_id: text()?, net_namespace: text()? };
        let (pid, nonce) = (text()?.parse().ok()?, text()?.parse().ok()?);
        let addresses = lines.take(MAX_ADDRESSES + 1).map(|line| line.parse().ok()).collect::<Option<Vec<_>>>()?;
        (addresses.len() <= MAX_ADDRESSES).then_some(Self { home, pid, nonce, addresses })
    }

    /// The addresses worth trying from a process at `from`: loopback only from the same boot and network namespace, where
    /// it comes first; elsewhere it would lead to the caller itself.
    pub fn addresses_from(&self, from: &HostIdentity) -> Vec<SocketAddr> {
        let here = self.home.boot_id == from.boot_id && self.home.net_namespace == from.net_namespace;
        let (loopback, other): (Vec<_>, Vec<_>) = self.addresses.iter().partition(|address| address.ip().is_loopback());
        if here { loopback.into_iter().chain(other).collect() } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn home(boot_id: &str) -> HostIdentity {
        HostIdentity { host: "a".into(), boot_id: boot_id.into(), net_namespace: "net:[1]".into() }
    }

    fn record() -> Record {
        let addresses = ["10.0.0.1:5", "127.0.0.1:5", "[fd00::1]:5"].map(|address| address.parse().unwrap()).to_vec();
        Record { home: home("x"), pid: 4, nonce: 5, addresses }
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        assert_eq!(Record::decode(&record().encode()), Some(record()));
    }

    #[test]
    fn loopback_traps_nobody() {
        let record = record();
        assert_eq!(record.addresses_from(&home("x"))[0], record.addresses[1]);
        assert_eq!(record.addresses_from(&home("y")), [record.addresses[0], record.addresses[2]]);
        let other_namespace = HostIdentity { net_namespace: "net:[2]".into(), ..home("x") };
        assert_eq!(record.addresses_from(&other_namespace).len(), 2);
    }

    proptest! {
        #[test]
        fn hostile_records_are_refused_not_believed(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in "gradwire 1\n.*\n.*\n.*\n.*") {
            for bytes in [bytes, text.into_bytes()] {
                if let Some(record) = Record::decode(&bytes) {
                    prop_assert!(record.addresses.len() <= MAX_ADDRESSES);
                }
            }
        }
    }
}
