//! Does: one process of a many-to-one measurement: what it is told, and how it meets the others.

use super::row::Cc;
use crate::collective::Way;
use crate::verbs;
use clap::Args;
use gradwire_transport::{
    Acceptance, Completion, Config, CreditSettings, FileStore, GroupSpec, Identity, Mesh, PeerId, Rank, ShmOffer,
    ShmWire, Store, Tag, TcpWire, Wire, WireChoice, WorldSize, form_group,
};
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long processes may take to find each other: 65 of them start at once.
pub(super) const MEETING: Duration = Duration::from_secs(60);
/// The longest sleep of whoever waits.
pub(super) const NAP: Duration = Duration::from_millis(100);

/// Pushes; the receiver's word that one has come; its word of what is next.
pub(super) const PUSH: Tag = Tag(1);
pub(super) const TAKEN: Tag = Tag(2);
pub(super) const PHASE: Tag = Tag(3);
/// In a push's note: every byte of it is to be checked.
pub(super) const WHOLE: u64 = 1 << 63;
/// Notes of [`PHASE`].
pub(super) const START: u64 = 1;
pub(super) const MEASURE: u64 = 2;
pub(super) const STOP: u64 = 3;

#[derive(Args)]
pub(crate) struct MemberOptions {
    /// 0 receives, the others send
    #[arg(long, env = "CLUSTER_RANK")]
    pub(super) rank: u32,
    /// This process's address
    #[arg(long, env = "CLUSTER_IP")]
    pub(super) ip: IpAddr,
    #[arg(long)]
    pub(super) senders: u32,
    #[arg(long)]
    pub(super) folder: PathBuf,
    #[arg(long, value_enum)]
    pub(super) wire: Way,
    #[arg(long, value_enum)]
    pub(super) cc: Cc,
    #[arg(long)]
    pub(super) bytes: usize,
    #[arg(long)]
    pub(super) depth: usize,
    /// Buffers that a sender pushes from, in turns
    #[arg(long)]
    pub(super) buffers: usize,
    #[arg(long)]
    pub(super) seconds: f64,
    #[arg(long)]
    pub(super) warm_up: f64,
}

impl MemberOptions {
    /// When everything must be over.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + MEETING + Duration::from_secs_f64(self.seconds + self.warm_up)
    }

    /// Leaves this process's result for whoever started it.
    pub(super) fn leave(&self, result: &impl serde::Serialize) -> Result<(), Box<dyn Error>> {
        let path = self.folder.join(format!("result-{}.json", self.rank));
        Ok(std::fs::write(path, serde_json::to_vec(result)?)?)
    }

    fn config(&self) -> Config {
        // More processes than cores: who waits sleeps.
        let credit = CreditSettings { loopback: true, ..CreditSettings::default() };
        Config { credit: (self.cc == Cc::Credit).then_some(credit), ..Config::default() }
    }

    fn tcp(&self) -> Result<TcpWire, Box<dyn Error>> {
        let home = gradwire_transport::home();
        let identity = Identity {
            rank: Some(Rank(self.rank)),
            host: home.host,
            pid: std::process::id(),
            boot_id: home.boot_id,
            nonce: u64::from(self.rank) + 1,
            rdma: false,
            memory: false,
        };
        let size = WorldSize::new(self.senders + 1).ok_or("no senders")?;
        let accept = if self.rank == 0 { Acceptance::Ranks(size) } else { Acceptance::Nobody };
        Ok(TcpWire::new(&self.config(), identity, accept)?)
    }

    /// The wire of a group of all: queue pairs are proposed over its sockets.
    fn meet_by_verbs(&self) -> Result<Box<dyn Wire>, Box<dyn Error>> {
        let config = Config { wire: WireChoice::Verbs, verbs: verbs::settings()?, ..self.config() };
        let spec = GroupSpec {
            name: "many-to-one".to_owned(),
            rank: Rank(self.rank),
            world_size: WorldSize::new(self.senders + 1).ok_or("no senders")?,
            store: Arc::new(FileStore::new(&self.folder)?),
            config,
        };
        Ok(form_group(spec, Instant::now() + MEETING)?.wire)
    }

    /// The receiver's wire, once all senders are on it.
    pub(super) fn meet_senders(&self) -> Result<Box<dyn Wire>, Box<dyn Error>> {
        if self.wire == Way::Verbs {
            return self.meet_by_verbs();
        }
        let (store, deadline) = (FileStore::new(&self.folder)?, Instant::now() + MEETING);
        let mut tcp = self.tcp()?;
        let address = tcp.listen(SocketAddr::new(self.ip, 0))?;
        store.set("receiver", address.to_string().as_bytes())?;
        let (mut here, mut done) = (0, Vec::new());
        while here < self.senders {
            tcp.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                match completion {
                    Completion::PeerUp(_) => here += 1,
                    Completion::PeerDown { error, .. } => return Err(error.into()),
                    _ => {}
                }
            }
            if Instant::now() > deadline {
                return Err(format!("only {here} of {} senders came to {address}", self.senders).into());
            }
            tcp.park(Instant::now() + NAP);
        }
        if self.wire == Way::Tcp {
            return Ok(Box::new(tcp));
        }
        let mut shm = ShmWire::new(&self.config())?;
        let mut ends = Vec::new();
        for rank in 1..=self.senders {
            let (offer, end) = shm.offer()?;
            store.set(&format!("offer-{rank}"), &offer.encode())?;
            ends.push((rank, end));
        }
        for (rank, end) in ends {
            store.get(&format!("taken-{rank}"), deadline)?;
            shm.attach(PeerId(rank), tcp.name(PeerId(rank)), end)?;
        }
        Ok(Box::new(Mesh::new(tcp, vec![Box::new(shm)], (1..=self.senders).map(PeerId), Vec::new())))
    }

    /// A sender's wire, with the receiver as peer 0.
    pub(super) fn meet_receiver(&self) -> Result<Box<dyn Wire>, Box<dyn Error>> {
        if self.wire == Way::Verbs {
            return self.meet_by_verbs();
        }
        let (store, deadline) = (FileStore::new(&self.folder)?, Instant::now() + MEETING);
        let mut tcp = self.tcp()?;
        let address = String::from_utf8(store.get("receiver", deadline)?)?.parse()?;
        tcp.dial(PeerId(0), Some(1), &[address], deadline)?;
        if self.wire == Way::Tcp {
            return Ok(Box::new(tcp));
        }
        let mut shm = ShmWire::new(&self.config())?;
        let offer = store.get(&format!("offer-{}", self.rank), deadline)?;
        let end = shm.accept(&ShmOffer::decode(&offer)?)?;
        shm.attach(PeerId(0), tcp.name(PeerId(0)), end)?;
        store.set(&format!("taken-{}", self.rank), b"yes")?;
        Ok(Box::new(Mesh::new(tcp, vec![Box::new(shm)], [PeerId(0)], Vec::new())))
    }
}
