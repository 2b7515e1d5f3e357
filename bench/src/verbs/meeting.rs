//! Does: how the two ends of a measurement find each other and keep step, through a store, away from what is measured.

use super::deadline;
use gradwire_transport::{GroupSpec, MemoryStore, Rank, Store, TcpStore, TransportError, WorldSize, home};
use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;

/// Whether a value follows, or an error's text.
const WELL: u8 = 1;
const UNWELL: u8 = 0;

/// One end of two.
pub(super) struct Meeting {
    /// The first says what is measured, and begins.
    pub(super) is_first: bool,
    /// How many of the two run in this process.
    pub(super) ends_here: usize,
    store: Arc<dyn Store>,
    turn: u64,
}

impl Meeting {
    /// Both, within this process.
    pub(super) fn within() -> (Self, Self) {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let end = |is_first, store| Self { is_first, ends_here: 2, store, turn: 0 };
        (end(true, Arc::clone(&store)), end(false, store))
    }

    /// The end that the other finds at `address`.
    pub(super) fn listen(address: SocketAddr) -> Result<Self, TransportError> {
        Ok(Self { is_first: false, ends_here: 1, store: Arc::new(TcpStore::serve(address)?), turn: 0 })
    }

    /// The end that finds the other at `address`, a host and a port.
    pub(super) fn connect(address: &str) -> Result<Self, TransportError> {
        let wrong = || TransportError::Config {
            setting: "--connect".to_owned(),
            reason: format!("`{address}` is not HOST:PORT"),
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        Ok(Self {
            is_first: true,
            ends_here: 1,
            store: Arc::new(TcpStore::client(host.trim_matches(['[', ']']), port)?),
            turn: 0,
        })
    }

    /// This host's name.
    pub(super) fn host(&self) -> String {
        home().host
    }

    /// Leaves a value for the other end.
    pub(super) fn tell(&self, key: &str, value: &[u8]) -> Result<(), TransportError> {
        self.store.set(&format!("bench/{key}"), value)
    }

    /// Waits for a value that the other end leaves.
    pub(super) fn hear(&self, key: &str) -> Result<Vec<u8>, TransportError> {
        self.store.get(&format!("bench/{key}"), deadline())
    }

    /// Gives the other end a value for one of its own; both go on at about the same time.
    pub(super) fn swap(&mut self, value: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
        self.turn += 1;
        self.tell(&self.key(self.is_first), &[&[WELL], value].concat())?;
        let theirs = self.hear(&self.key(!self.is_first))?;
        match theirs.split_first() {
            Some((&WELL, value)) => Ok(value.to_vec()),
            _ => Err(format!("the other end: {}", String::from_utf8_lossy(&theirs[1.min(theirs.len())..])).into()),
        }
    }

    /// Tells the other end of a failure, in place of the next value.
    pub(super) fn fail(&mut self, error: &str) {
        self.turn += 1;
        // Where this fails too, the other end finds out by itself.
        let _ = self.tell(&self.key(self.is_first), &[&[UNWELL], error.as_bytes()].concat());
    }

    fn key(&self, is_first: bool) -> String {
        format!("{}/{}", self.turn, u8::from(!is_first))
    }

    /// The end that serves the store leaves last.
    pub(super) fn end(&self) {
        // Whichever is refused, the other has left already.
        if self.is_first {
            let _ = self.tell("over", b"");
        } else {
            let _ = self.hear("over");
        }
    }

    /// What forms a group of the two.
    pub(super) fn group(&mut self, config: gradwire_transport::Config) -> GroupSpec {
        self.turn += 1;
        let world_size = WorldSize::new(2).expect("two are some");
        let rank = Rank(u32::from(!self.is_first));
        GroupSpec { name: format!("bench-{}", self.turn), rank, world_size, store: Arc::clone(&self.store), config }
    }
}
