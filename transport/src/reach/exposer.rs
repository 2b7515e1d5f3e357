//! Does: the side whose memory is reached: listens, offers memory, and has a thread that serves it.

use super::SPIN_TURNS;
use super::request::RemoteMemory;
use super::serving::{Serving, Wish};
use crate::rendezvous::{InterfaceFilter, Record, addresses};
use crate::{
    Acceptance, Config, Identity, Mesh, Region, RegisterError, TcpWire, TransportError, VerbsWire, Wake, Wire,
    WireChoice, home, open_verbs,
};
use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Who may reach our memory at once.
const MAX_PEERS: usize = 256;
/// Longest sleep of the thread.
const NAP: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Inbox {
    wishes: VecDeque<Wish>,
    /// When the thread is to be gone.
    closing: Option<Instant>,
}

/// Offers memory to whoever is told of it.
pub struct Exposer {
    inbox: Arc<Mutex<Inbox>>,
    waker: Arc<dyn Wake>,
    thread: Mutex<Option<JoinHandle<()>>>,
    url: Vec<u8>,
    device: Option<String>,
}

impl Exposer {
    /// Listens, on the interfaces that `config` allows.
    ///
    /// # Errors
    /// `Config` where no interface may be used, or where verbs were asked for by name and cannot be had; `Io`.
    pub fn bind(config: &Config) -> Result<Self, TransportError> {
        Self::over(config, open_verbs(config, &[])?)
    }

    /// As [`Exposer::bind`], with this device.
    ///
    /// # Errors
    /// As [`Exposer::bind`].
    pub fn over(config: &Config, verbs: Option<(VerbsWire, String)>) -> Result<Self, TransportError> {
        let all = addresses(&config.socket_ifname.as_deref().map(InterfaceFilter::parse).unwrap_or_default())?;
        let (home, nonce) = (home(), nonce());
        let identity = Identity {
            rank: None,
            host: home.host.clone(),
            pid: std::process::id(),
            boot_id: home.boot_id.clone(),
            nonce,
            rdma: verbs.is_some(),
            memory: false,
        };
        let mut tcp = TcpWire::new(config, identity, Acceptance::Anyone { max_peers: MAX_PEERS })?;
        let (port, only_four) = match tcp.listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))) {
            Ok(address) => (address.port(), false),
            Err(_) => (tcp.listen(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))?.port(), true),
        };
        let usable = all.into_iter().filter(|ip| ip.is_ipv4() || !only_four);
        let addresses = usable.map(|ip| SocketAddr::new(ip, port)).collect();
        let url = Record { home, pid: std::process::id(), nonce, addresses }.encode();
        let device = verbs.as_ref().map(|(_, reason)| reason.clone());
        let mesh = match verbs {
            Some((verbs, _)) => Mesh::meeting(tcp, vec![Box::new(verbs)], WireChoice::Auto),
            None => Mesh::new(tcp, Vec::new(), [], Vec::new()),
        };
        let (inbox, waker) = (Arc::new(Mutex::new(Inbox::default())), mesh.waker());
        let (shared, serving) = (Arc::clone(&inbox), Serving::new(mesh, nonce));
        let thread = std::thread::Builder::new().name("gradwire-expose".to_owned());
        let thread =
            thread.spawn(move || run(serving, &shared)).map_err(|error| TransportError::io("start a thread", error))?;
        Ok(Self { inbox, waker, thread: Mutex::new(Some(thread)), url, device })
    }

    /// What others connect by, to be sent to them.
    pub fn url(&self) -> &[u8] {
        &self.url
    }

    /// The device that reads and writes memory here, and why it; `None`: messages do.
    pub fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// Lets whoever is told of it read and write `region`, until [`Exposer::withdraw`].
    ///
    /// # Errors
    /// `None` where the exposer is closed, or did not come to it within `timeout`; else the device's.
    pub fn expose(&self, region: Arc<Region>, timeout: Duration) -> Result<RemoteMemory, Option<RegisterError>> {
        let (answer, told) = sync_channel(1);
        self.wish(Wish::Expose(region, answer));
        told.recv_timeout(timeout).map_err(|_| None)?.map_err(Some)
    }

    /// Ends an exposure; whether all accesses under way have ended too, within `timeout`.
    pub fn withdraw(&self, memory: RemoteMemory, timeout: Duration) -> bool {
        let (answer, ended) = sync_channel(1);
        self.wish(Wish::Withdraw(memory.key, answer));
        ended.recv_timeout(timeout).is_ok() || self.inbox().closing.is_some()
    }

    /// Takes leave of all who are connected, within `timeout`; nothing of the memory is reached afterwards. Idempotent.
    pub fn close(&self, timeout: Duration) {
        self.inbox().closing.get_or_insert(Instant::now() + timeout);
        self.waker.wake();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic of the thread has been printed; there is nothing to add.
            let _ = thread.join();
        }
        // Who waits for a wish that nobody grants any more is told by the end of its channel.
        self.inbox().wishes.clear();
    }

    fn wish(&self, wish: Wish) {
        let mut inbox = self.inbox();
        if inbox.closing.is_none() {
            inbox.wishes.push_back(wish);
            drop(inbox);
            self.waker.wake();
        }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Exposer {
    fn drop(&mut self) {
        self.close(Duration::from_millis(500));
    }
}

fn run(mut serving: Serving, inbox: &Mutex<Inbox>) {
    let mut idle = 0;
    loop {
        let (wishes, closing) = {
            let mut inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
            (std::mem::take(&mut inbox.wishes), inbox.closing)
        };
        idle = if wishes.is_empty() { idle + 1 } else { 0 };
        wishes.into_iter().for_each(|wish| serving.grant(wish));
        if let Some(until) = closing {
            return serving.mesh.shutdown(until);
        }
        if serving.turn() {
            idle = 0;
        }
        if idle > SPIN_TURNS {
            serving.mesh.park(Instant::now() + NAP);
        }
    }
}

/// A number that no other process draws.
pub(super) fn nonce() -> u64 {
    let mut nonce = [0; 8];
    getrandom::fill(&mut nonce).expect("the system gives random bytes");
    u64::from_le_bytes(nonce) | 1
}
