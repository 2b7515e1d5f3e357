//! Does: an RDMA device through libibverbs: one port, one completion queue, reliable connections.

#![allow(unsafe_code)]

use super::adapter::{Access, Adapter, Endpoint, Event, Foreign, Key, Limits, Span, Trouble, What, Work};
use super::async_events;
use super::completion_queue::{BATCH, CompletionQueue, never_blocks};
use super::context::{Context, DeviceList, ProtectionDomain};
use super::ffi::*;
use super::gid::{self, Choice, Named};
use super::library::Library;
use super::listing;
use super::memory_region::MemoryRegion;
use super::queue_pair::{MOST_READS, Path, QueuePair};
use super::settings::VerbsConfig;
use super::status::Status;
use crate::slab::Recent;
use crate::{RegisterError, TransportError};
use rustix::event::epoll;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

/// What is asked to go inline, until the device agrees.
const INLINE_BYTES: [usize; 4] = [256, 128, 64, 0];
/// Work requests of a send queue for each slot of the wire: a frame, and the writes that go before and after it.
const SENDS_PER_SLOT: usize = 4;
/// Receives for each slot: one for a frame, one for a word that a write carries.
const RECEIVES_PER_SLOT: usize = 2;
/// Queue pairs that the completion queue has room for at first.
const QUEUE_PAIRS_AT_FIRST: usize = 8;

/// A device, opened. Its parts are freed in the order of the fields, and each holds what it hangs on.
pub struct Device {
    queue_pairs: Recent<Open>,
    /// By their local keys.
    regions: Recent<MemoryRegion>,
    sleep: OwnedFd,
    completions: Arc<CompletionQueue>,
    domain: Arc<ProtectionDomain>,
    context: Arc<Context>,
    choice: Choice,
    lid: u16,
    limits: Limits,
    path: Path,
    batch: Box<[ibv_wc; BATCH]>,
    // What `close` took from the queue and had to keep.
    kept: Vec<Event>,
    troubles: Vec<Trouble>,
    broken: bool,
}

/// A queue pair and the first packet number that it sends.
struct Open {
    queue_pair: QueuePair,
    packet: u32,
}

impl Device {
    /// Opens the device that fits best, and tells which and why. `local` are addresses by which peers are reached.
    ///
    /// # Errors
    /// `Config`, with why verbs cannot be used and what to do, or `Io` when the device refuses.
    pub fn open(config: &VerbsConfig, local: &[IpAddr]) -> Result<(Self, String), TransportError> {
        config.check()?;
        let unusable = |reason| TransportError::Config { setting: "RDMA".to_owned(), reason };
        let library = Library::load().map_err(unusable)?;
        let devices = DeviceList::read(library).map_err(|error| {
            unusable(format!("this host has no RDMA device ({error}): load its driver, or pass /dev/infiniband in"))
        })?;
        let choice = gid::choose(&listing::list(&devices), config.hca.as_deref(), config.gid_index, local)?;
        let reason = choice.reason.clone();
        let name = choice.port.device.clone();
        let context = devices.open(&name).map_err(|error| TransportError::io(format!("open {name}"), error))?;
        let device = Self::with(context, config, choice)
            .map_err(|error| TransportError::io(format!("prepare {name} for work"), error))?;
        Ok((device, reason))
    }

    fn with(context: Arc<Context>, config: &VerbsConfig, choice: Choice) -> io::Result<Self> {
        let number = choice.port.number;
        let (attributes, port) = (context.attributes()?, context.port(number)?);
        let size = |value: i32| usize::try_from(value).unwrap_or(0);
        let deepest = size(attributes.max_qp_wr);
        let reads = |most: i32| size(most).clamp(1, MOST_READS) as u8;
        let mut limits = Limits {
            inline_bytes: 0,
            message_bytes: port.max_msg_sz as usize,
            send_depth: (config.slots * SENDS_PER_SLOT).min(deepest),
            recv_depth: (config.slots * RECEIVES_PER_SLOT).min(deepest),
            reads: reads(attributes.max_qp_init_rd_atom).into(),
        };
        let path = Path {
            port: number,
            gid_index: choice.gid.index,
            global: true,
            mtu_bytes: choice.port.mtu_bytes,
            traffic_class: config.traffic_class,
            service_level: config.service_level,
            timeout: config.timeout,
            retries: config.retries,
            reads_answered: reads(attributes.max_qp_rd_atom),
            reads_asked: reads(attributes.max_qp_init_rd_atom),
        };
        let domain = ProtectionDomain::new(&context)?;
        let entries = (limits.send_depth + limits.recv_depth) * QUEUE_PAIRS_AT_FIRST;
        let completions = CompletionQueue::new(&context, entries.min(size(attributes.max_cqe)))?;
        limits.inline_bytes = most_inline(&domain, &completions, limits, number)?;
        never_blocks(context.async_fd())?;
        let sleep = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [completions.fd(), context.async_fd()] {
            epoll::add(&sleep, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self {
            queue_pairs: Recent::default(),
            regions: Recent::default(),
            sleep,
            completions,
            domain,
            context,
            choice,
            lid: port.lid,
            limits,
            path,
            batch: Box::new([ibv_wc::default(); BATCH]),
            kept: Vec::new(),
            troubles: Vec::new(),
            broken: false,
        })
    }

    /// Room in the completion queue for one queue pair more, all of whose requests end at once.
    fn make_room(&self) -> io::Result<()> {
        let needed = (self.queue_pairs.len() + 1) * (self.limits.send_depth + self.limits.recv_depth);
        if needed <= self.completions.entries() {
            return Ok(());
        }
        // Twice as much, so that it is seldom; just enough where the device has no more.
        self.completions.resize(needed * 2).or_else(|_| self.completions.resize(needed))
    }

    fn open_one(&mut self) -> io::Result<(u32, u32)> {
        self.make_room()?;
        let queue_pair = QueuePair::new(&self.domain, &self.completions, &self.limits, self.path.port)?;
        let mut packet = [0; 4];
        getrandom::fill(&mut packet).map_err(io::Error::other)?;
        // A packet number has 24 bits.
        let (number, packet) = (queue_pair.number(), u32::from_le_bytes(packet) & 0xff_ffff);
        self.queue_pairs.insert(number, Open { queue_pair, packet });
        Ok((number, packet))
    }

    /// Appends what the queue has, at most as much as it holds, so that a busy peer cannot keep us here.
    fn take(&mut self, events: &mut Vec<Event>) {
        for _ in 0..self.completions.entries() / BATCH + 1 {
            let found = match self.completions.poll(&mut self.batch) {
                Ok(found) => found,
                Err(error) => return self.broke(&error),
            };
            let known = |event: &Event| self.queue_pairs.has(event.queue_pair);
            events.extend(self.batch[..found].iter().map(event).filter(known));
            if found < BATCH {
                return;
            }
        }
    }

    /// The completion queue cannot be used any more: said once.
    fn broke(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.broken, true) {
            let what = format!("{}: its completion queue cannot be read: {error}", self.context.name);
            self.troubles.push(Trouble { queue_pair: None, fatal: true, what });
        }
    }

    /// Whether the processor may copy the span into the work request.
    fn may_go_inline(&mut self, span: &Span, work: Work) -> bool {
        let small = span.bytes > 0 && span.bytes as usize <= self.limits.inline_bytes;
        small
            && !matches!(work, Work::Read(_))
            && self.regions.get(span.key).is_some_and(|region| region.is_readable(span))
    }

    fn known(&mut self, number: u32) -> io::Result<&Open> {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, format!("queue pair {number} is closed"));
        self.queue_pairs.get(number).map(|open| &*open).ok_or_else(gone)
    }
}

impl Adapter for Device {
    fn name(&self) -> String {
        Named(&self.choice.port, &self.choice.gid).to_string()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    unsafe fn register(&mut self, start: *mut u8, bytes: usize, access: Access) -> Result<Key, RegisterError> {
        // SAFETY: the caller keeps the memory mapped until it is deregistered.
        let region = unsafe { MemoryRegion::register(&self.domain, start, bytes, access) }?;
        let key = region.key();
        self.regions.insert(key.local, region);
        Ok(key)
    }

    unsafe fn register_foreign(&mut self, memory: Foreign<'_>) -> Result<Key, RegisterError> {
        // SAFETY: the caller keeps the memory allocated until it is deregistered.
        let region = unsafe { MemoryRegion::register_foreign(&self.domain, memory) }?;
        let key = region.key();
        self.regions.insert(key.local, region);
        Ok(key)
    }

    fn deregister(&mut self, handle: u64) {
        let known = u32::try_from(handle).ok().and_then(|key| self.regions.remove(key));
        assert!(known.is_some(), "memory is deregistered once, by the handle of its registration");
    }

    fn open(&mut self) -> Result<Endpoint, TransportError> {
        let (queue_pair, packet) = self.open_one().map_err(|error| {
            let open = self.queue_pairs.len();
            TransportError::io(format!("open a queue pair of {}, {open} being open", self.context.name), error)
        })?;
        let Choice { port, gid, .. } = &self.choice;
        let (mtu_bytes, reads, gid) = (port.mtu_bytes, self.path.reads_answered, gid.bytes);
        Ok(Endpoint { queue_pair, packet, lid: self.lid, mtu_bytes, reads, gid })
    }

    fn connect(&mut self, queue_pair: u32, to: &Endpoint) -> Result<(), TransportError> {
        let own = &self.choice.gid.bytes;
        // Within an InfiniBand subnet the LID says it all; Ethernet has none.
        let global = self.choice.port.link != gid::Link::InfiniBand || own[..8] != to.gid[..8];
        let path = Path { global, ..self.path.to(to) };
        let connected = self.known(queue_pair).and_then(|open| open.queue_pair.connect(open.packet, to, &path));
        connected.map_err(|error| {
            let (peer, number) = (gid::text(&to.gid), to.queue_pair);
            let action = format!(
                "connect queue pair {queue_pair} of {} to queue pair {number} at {peer} (both must be in networks that \
                 reach each other: see GRADWIRE_IB_HCA and GRADWIRE_IB_GID_INDEX)",
                self.name()
            );
            TransportError::io(action, error)
        })
    }

    fn stop(&mut self, queue_pair: u32) {
        let stopped = self.known(queue_pair).and_then(|open| open.queue_pair.stop());
        if let Err(error) = stopped {
            let what = format!("{}: queue pair {queue_pair} could not be stopped: {error}", self.context.name);
            self.troubles.push(Trouble { queue_pair: Some(queue_pair), fatal: true, what });
        }
    }

    fn close(&mut self, queue_pair: u32) {
        let Some(open) = self.queue_pairs.remove(queue_pair) else { return };
        drop(open);
        // The number may be given anew, so no event of the old owner may be left in the queue.
        let mut kept = std::mem::take(&mut self.kept);
        kept.retain(|event| event.queue_pair != queue_pair);
        self.take(&mut kept);
        self.kept = kept;
    }

    fn post(&mut self, queue_pair: u32, number: u64, span: Span, work: Work, signalled: bool) -> io::Result<()> {
        let inline = self.may_go_inline(&span, work);
        let open = self.known(queue_pair)?;
        // SAFETY: what goes inline lies in registered memory, which whoever registered it keeps mapped.
        unsafe { open.queue_pair.post(number, span, work, signalled, inline) }
    }

    fn post_recv(&mut self, queue_pair: u32, number: u64, span: Span) -> io::Result<()> {
        self.known(queue_pair)?.queue_pair.post_recv(number, span)
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.kept);
        self.take(events);
    }

    fn arm(&mut self) {
        if let Err(error) = self.completions.arm() {
            self.broke(&error);
        }
    }

    fn sleep_on(&self) -> BorrowedFd<'_> {
        self.sleep.as_fd()
    }

    fn wake_up(&mut self, troubles: &mut Vec<Trouble>) {
        self.completions.quiet();
        async_events::read(&self.context, self.path.port, troubles);
        troubles.append(&mut self.troubles);
    }
}

/// The most that the device lets go inline, of what is worth asking for.
fn most_inline(
    domain: &Arc<ProtectionDomain>,
    completions: &Arc<CompletionQueue>,
    limits: Limits,
    port: u8,
) -> io::Result<usize> {
    let mut last = None;
    for inline_bytes in INLINE_BYTES {
        match QueuePair::new(domain, completions, &Limits { inline_bytes, ..limits }, port) {
            Ok(_) => return Ok(inline_bytes),
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("at least one was tried"))
}

fn event(completion: &ibv_wc) -> Event {
    let what = match completion {
        // Of a failed one, only number, status and queue pair mean anything.
        ibv_wc { status, vendor_err, .. } if *status != WC_SUCCESS => {
            What::Failed(Status { code: *status, vendor: *vendor_err })
        }
        ibv_wc { opcode, byte_len, .. } if opcode & WC_RECV != 0 => {
            let word = (completion.wc_flags & WC_WITH_IMM != 0).then(|| u32::from_be(completion.imm_data));
            What::Received(*byte_len, word)
        }
        _ => What::Done,
    };
    Event { queue_pair: completion.qp_num, number: completion.wr_id, what }
}
