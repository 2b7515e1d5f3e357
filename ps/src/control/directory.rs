//! Does: asks the coordinator where the shards are now.

use super::ClusterMap;
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::protocol::{REPLY, REPLY_BYTES, REQUEST};
use crate::{PsError, dial};
use gradwire_transport::{Completion, Config, Envelope, PeerId, TransportError, WireChoice};
use std::time::{Duration, Instant};

/// The longest that asking one coordinator may take: one that is gone must not keep us from the next.
const ASKING: Duration = Duration::from_secs(2);
const COORDINATOR: PeerId = PeerId(0);

/// Where to ask.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    addresses: Vec<String>,
    config: Config,
}

impl Directory {
    pub(crate) fn new(addresses: &[String], config: &Config) -> Self {
        let config = Config { wire: WireChoice::Tcp, credit: None, ..config.clone() };
        Self { addresses: addresses.to_vec(), config }
    }

    /// The coordinator's map. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// `Authentication`; `Timeout` where no coordinator answers, with where it was looked for and why.
    pub(crate) fn ask(&self, deadline: Instant) -> Result<ClusterMap, PsError> {
        let began = Instant::now();
        let mut why = Vec::new();
        for address in &self.addresses {
            match self.ask_one(address, deadline.min(Instant::now() + ASKING)) {
                Ok(map) => return Ok(map),
                Err(TransportError::Authentication { reason, .. }) => {
                    return Err(PsError::Authentication { address: address.clone(), reason });
                }
                Err(error) => why.push(format!("{address}: {error}")),
            }
        }
        let why = why.join("; ");
        let what = format!("the coordinator to tell where the shards are ({why}); see that it runs there");
        Err(PsError::Timeout { what, waited: began.elapsed() })
    }

    /// The map, once clients may come to all shards.
    ///
    /// # Errors
    /// As [`Directory::ask`]; `Timeout` with what is missing.
    pub(crate) fn wait(&self, deadline: Instant) -> Result<(ClusterMap, Vec<String>), PsError> {
        let began = Instant::now();
        loop {
            let asked = self.ask(deadline);
            match asked {
                Ok(map) => match map.addresses() {
                    Some(addresses) => return Ok((map, addresses)),
                    None if Instant::now() >= deadline => {
                        let what = format!("the cluster to be complete: {}", map.missing());
                        return Err(PsError::Timeout { what, waited: began.elapsed() });
                    }
                    None => {}
                },
                Err(error @ PsError::Authentication { .. }) => return Err(error),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => {}
            }
            // Nobody tells us when it changes, and it does so seldom.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ask_one(&self, address: &str, deadline: Instant) -> Result<ClusterMap, TransportError> {
        let mut wire = dial::plain_dialer(&self.config)?;
        wire.call(COORDINATOR, address, deadline)?;
        wire.post_recv_loan(COORDINATOR, REPLY, REPLY_BYTES).map_err(|refused| refused.error)?;
        if let Some(mut loan) = wire.lend(COORDINATOR, HEADER_BYTES) {
            loan.copy_from_slice(&Header::new(Kind::Map).encode());
            let envelope = Envelope { peer: COORDINATOR, tag: REQUEST, note: 0 };
            wire.post_loan(envelope, loan).map_err(|refused| refused.error)?;
        }
        let mut done = Vec::new();
        loop {
            let now = Instant::now();
            wire.poll(now, &mut done);
            for completion in done.drain(..) {
                match completion {
                    Completion::Arrived(arrival) => {
                        let map = arrival.loan.get(HEADER_BYTES..).map(ClusterMap::decode);
                        wire.shutdown(now);
                        let wrong = || std::io::Error::other("it answers, and is no coordinator of this version");
                        return map
                            .and_then(Result::ok)
                            .ok_or_else(|| TransportError::io(format!("ask {address}"), wrong()));
                    }
                    Completion::PeerDown { error, .. } => return Err(error),
                    _ => {}
                }
            }
            if now >= deadline {
                return Err(TransportError::io(
                    format!("ask {address}"),
                    std::io::Error::from(std::io::ErrorKind::TimedOut),
                ));
            }
            wire.park(deadline);
        }
    }
}
