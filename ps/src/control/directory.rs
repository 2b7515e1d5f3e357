//! Does: asks the coordinator where the shards are now.

use super::ClusterMap;
use crate::body::{BadBody, Reader, Writer};
use crate::header::{FLAG_INLINE, HEADER_BYTES, Header, Kind};
use crate::protocol::{REPLY, REPLY_BYTES, REQUEST};
use crate::refusal::Refusal;
use crate::{PsError, dial};
use gradwire_transport::{Completion, Config, Envelope, PeerId, TransportError, WireChoice};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The longest that asking one coordinator may take: one that is gone must not keep us from the next.
const ASKING: Duration = Duration::from_secs(2);
const COORDINATOR: PeerId = PeerId(0);

/// Where to ask.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    addresses: Vec<String>,
    config: Config,
    /// Who answered last: asked first.
    turn: Arc<AtomicUsize>,
}

impl Directory {
    pub(crate) fn new(addresses: &[String], config: &Config) -> Self {
        let config = Config { wire: WireChoice::Tcp, credit: None, ..config.clone() };
        Self { addresses: addresses.to_vec(), config, turn: Arc::default() }
    }

    /// The coordinator's map. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// `Authentication`; `Timeout` where no coordinator answers, with where it was looked for and why.
    pub(crate) fn ask(&self, deadline: Instant) -> Result<ClusterMap, PsError> {
        self.say((Kind::Map, &[]), deadline, ClusterMap::decode)
    }

    /// Asks the coordinator to take all parts from the server at `address`; the shards that are still there.
    ///
    /// # Errors
    /// As [`Directory::ask`]; `Invalid` where no server is there.
    pub(crate) fn drain(&self, address: &str, deadline: Instant) -> Result<Vec<u32>, PsError> {
        let mut body = Writer::default();
        body.text(address);
        self.say((Kind::Drain, &body.0), deadline, |body| {
            let mut from = Reader(body);
            let shards = (0..from.count(8)?).map(|_| from.small()).collect::<Result<_, _>>()?;
            from.end().map(|()| shards)
        })
    }

    fn say<T>(
        &self,
        what: (Kind, &[u8]),
        deadline: Instant,
        decode: impl Fn(&[u8]) -> Result<T, BadBody>,
    ) -> Result<T, PsError> {
        let began = Instant::now();
        let mut why = Vec::new();
        let (first, count) = (self.turn.load(Ordering::Relaxed), self.addresses.len());
        for at in 0..count {
            let (turn, now) = ((first + at) % count, Instant::now());
            let address = &self.addresses[turn];
            // Each has its share of the time: calling one that is gone lasts as long as it may.
            let share = deadline.saturating_duration_since(now) / (count - at) as u32;
            let asked = self.ask_one(address, what, now + share.min(ASKING), &decode);
            if asked.is_ok() {
                self.turn.store(turn, Ordering::Relaxed);
            }
            match asked {
                Ok(Ok(told)) => return Ok(told),
                Ok(Err(refusal)) => {
                    return Err(PsError::invalid(format!("asking the coordinator at {address}"), refusal.to_string()));
                }
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
        // What was missing when the coordinator last answered: the last question may have had no time left.
        let mut missing: Option<(Instant, String)> = None;
        loop {
            let asked = self.ask(deadline);
            match asked {
                Ok(map) => match map.addresses() {
                    Some(addresses) => return Ok((map, addresses)),
                    None => missing = Some((Instant::now(), map.missing())),
                },
                Err(error @ PsError::Authentication { .. }) => return Err(error),
                Err(error)
                    if Instant::now() >= deadline && missing.as_ref().is_none_or(|(at, _)| at.elapsed() > ASKING) =>
                {
                    return Err(error);
                }
                Err(_) => {}
            }
            if let Some((_, missing)) = missing.as_ref().filter(|_| Instant::now() >= deadline) {
                let what = format!("the cluster to be complete: {missing}");
                return Err(PsError::Timeout { what, waited: began.elapsed() });
            }
            // Nobody tells us when it changes, and it does so seldom.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ask_one<T>(
        &self,
        address: &str,
        (kind, body): (Kind, &[u8]),
        deadline: Instant,
        decode: &impl Fn(&[u8]) -> Result<T, BadBody>,
    ) -> Result<Result<T, Refusal>, TransportError> {
        let mut wire = dial::plain_dialer(&self.config)?;
        wire.call(COORDINATOR, address, deadline)?;
        wire.post_recv_loan(COORDINATOR, REPLY, REPLY_BYTES).map_err(|refused| refused.error)?;
        if let Some(mut loan) = wire.lend(COORDINATOR, HEADER_BYTES + body.len()) {
            let header = Header { flags: FLAG_INLINE, payload_bytes: body.len() as u64, ..Header::new(kind) };
            loan[..HEADER_BYTES].copy_from_slice(&header.encode());
            loan[HEADER_BYTES..].copy_from_slice(body);
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
                        let told = answer(&arrival.loan, decode);
                        wire.shutdown(now);
                        let wrong = || std::io::Error::other("it answers, and is no coordinator of this version");
                        return told.ok_or_else(|| TransportError::io(format!("ask {address}"), wrong()));
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

fn answer<T>(bytes: &[u8], decode: &impl Fn(&[u8]) -> Result<T, BadBody>) -> Option<Result<T, Refusal>> {
    let header = Header::decode(bytes).ok()?;
    let body = bytes.get(HEADER_BYTES..)?;
    match header.kind {
        Kind::Refused => Refusal::decode(header.status, body).ok().map(Err),
        _ => decode(body).ok().map(Ok),
    }
}
