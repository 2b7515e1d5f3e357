//! Does: RDMA within one process, as far as a link can tell: queue pairs of several adapters, joined by memory copies. Work is
//! carried out when its owner polls, not when it is posted, as by a device; and it fails as a device's would, also on demand.

#![allow(unsafe_code)]

use super::adapter::{Access, Adapter, Endpoint, Event, Foreign, Key, Limits, Remote, Span, Trouble, What, Work};
use super::status::{FLUSHED, REMOTE_ACCESS, RETRIES, Status};
use crate::{RegisterError, TransportError};
use rustix::event::EventfdFlags;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Depth of both queues of a queue pair.
const DEPTH: usize = 256;
/// Where the first byte of exposed memory is; a device counts from the beginning of its page.
const EXPOSED_FIRST: u64 = 48;

/// The network that adapters of one process share.
#[derive(Clone, Default)]
pub struct Fabric(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    pairs: BTreeMap<u32, Pair>,
    memory: BTreeMap<u32, Memory>,
    ports: Vec<Port>,
    next: u32,
    /// Messages that found no receive posted.
    not_ready: u64,
    carried_out: u64,
    /// Work requests that fail, of a million, and the state of the draw.
    faults: (u64, u64),
    /// How many may fail yet.
    faults_left: u64,
    /// Whether a dma-buf is taken, which here is any file that can be mapped.
    takes_dma_bufs: bool,
    /// No queue pair can be connected any more.
    is_down: bool,
    /// Memory that is watched, and the bytes that peers have written into it.
    watched: (Range<usize>, u64),
}

#[derive(Default)]
struct Port {
    events: Vec<Event>,
    bell: Option<Arc<OwnedFd>>,
    is_armed: bool,
}

struct Pair {
    port: usize,
    other: Option<u32>,
    is_broken: bool,
    recvs: VecDeque<(u64, Span)>,
    pending: VecDeque<(u64, Span, Work, bool)>,
}

struct Memory {
    start: usize,
    bytes: usize,
    /// By what work requests name the first byte.
    first: u64,
    access: Access,
    /// Of a file, unmapped when this goes.
    _mapping: Option<Mapping>,
}

impl Fabric {
    /// A device on this network.
    pub fn adapter(&self) -> Loopback {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = Arc::new(bell.expect("the system gives an event descriptor"));
        let mut state = self.state();
        state.ports.push(Port { bell: Some(Arc::clone(&bell)), ..Port::default() });
        Loopback { fabric: self.clone(), port: state.ports.len() - 1, bell, registered: 0 }
    }

    /// From now on so many work requests of a million fail, by a draw that `seed` decides, `most` in all: their queue pair
    /// breaks, half of them after they were delivered.
    pub fn fail_at_random(&self, seed: u64, per_million: u64, most: u64) {
        let mut state = self.state();
        (state.faults, state.faults_left) = ((per_million, seed | 1), most);
    }

    /// Breaks every queue pair, and lets none be connected again.
    pub fn go_down(&self) {
        let mut state = self.state();
        state.is_down = true;
        let pairs: Vec<u32> = state.pairs.keys().copied().collect();
        pairs.into_iter().for_each(|pair| state.flush(pair));
    }

    /// From now on devices reach memory by dma-bufs, as a network card beside a GPU does; else they refuse, as soft-RoCE does.
    pub fn take_dma_bufs(&self) {
        self.state().takes_dma_bufs = true;
    }

    /// Messages that found no receive posted.
    pub fn not_ready(&self) -> u64 {
        self.state().not_ready
    }

    /// Work requests that were carried out.
    pub fn messages(&self) -> u64 {
        self.state().carried_out
    }

    /// Registrations of memory that there are.
    pub fn registrations(&self) -> usize {
        self.state().memory.len()
    }

    /// From now on counts what peers write straight into these bytes.
    pub fn watch(&self, memory: &[u8]) {
        let start = memory.as_ptr().addr();
        self.state().watched = (start..start + memory.len(), 0);
    }

    /// Bytes that peers have written into what is watched.
    pub fn written(&self) -> u64 {
        self.state().watched.1
    }

    /// Queue pairs that are open.
    pub fn queue_pairs(&self) -> usize {
        self.state().pairs.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tell(&mut self, queue_pair: u32, number: u64, what: What) {
        let Some(port) = self.pairs.get(&queue_pair).map(|pair| pair.port) else { return };
        let port = &mut self.ports[port];
        port.events.push(Event { queue_pair, number, what });
        if std::mem::take(&mut port.is_armed)
            && let Some(bell) = &port.bell
        {
            // A counter that is full wakes as well.
            let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
        }
    }

    /// Ends everything that is posted.
    fn flush(&mut self, queue_pair: u32) {
        let Some(pair) = self.pairs.get_mut(&queue_pair) else { return };
        pair.is_broken = true;
        let sends = std::mem::take(&mut pair.pending).into_iter().map(|(number, ..)| number);
        let numbers: Vec<u64> =
            sends.chain(std::mem::take(&mut pair.recvs).into_iter().map(|(number, _)| number)).collect();
        for number in numbers {
            self.tell(queue_pair, number, What::Failed(Status { code: FLUSHED, vendor: 0 }));
        }
    }

    fn draw_fault(&mut self) -> Option<bool> {
        let (per_million, seed) = &mut self.faults;
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let fails = self.faults_left > 0 && (*seed >> 33) % 1_000_000 < *per_million;
        self.faults_left -= u64::from(fails);
        fails.then_some(*seed >> 32 & 1 == 0)
    }

    /// Carries out all that port `port` has posted.
    fn run(&mut self, port: usize) {
        let own: Vec<u32> = self.pairs.iter().filter(|(_, pair)| pair.port == port).map(|(id, _)| *id).collect();
        for id in own {
            while let Some((number, span, work, signalled)) =
                self.pairs.get_mut(&id).filter(|pair| !pair.is_broken).and_then(|pair| pair.pending.pop_front())
            {
                let ended = match self.draw_fault() {
                    Some(true) => Err(RETRIES),
                    Some(false) => self.carry_out(id, span, work).and(Err(RETRIES)),
                    None => self.carry_out(id, span, work),
                };
                match ended {
                    Ok(()) if signalled => self.tell(id, number, What::Done),
                    Ok(()) => {}
                    Err(code) => {
                        self.tell(id, number, What::Failed(Status { code, vendor: 0 }));
                        self.flush(id);
                    }
                }
            }
        }
    }

    fn carry_out(&mut self, id: u32, span: Span, work: Work) -> Result<(), u32> {
        let other = self.pairs.get(&id).and_then(|pair| pair.other).ok_or(RETRIES)?;
        if self.is_down || self.pairs.get(&other).is_none_or(|pair| pair.is_broken || pair.other != Some(id)) {
            return Err(RETRIES);
        }
        let from = self.local(span)?;
        self.carried_out += 1;
        match work {
            Work::Send => {
                let (number, into) = self.next_recv(other)?;
                if into.bytes < span.bytes {
                    return Err(1);
                }
                copy(from, self.local(into)?, span.bytes);
                self.tell(other, number, What::Received(span.bytes, None));
            }
            Work::Write(remote, word) => {
                let into = self.remote(remote, span.bytes)?;
                copy(from, into, span.bytes);
                if self.watched.0.contains(&into) {
                    self.watched.1 += u64::from(span.bytes);
                }
                if word.is_some() {
                    let (number, _) = self.next_recv(other)?;
                    self.tell(other, number, What::Received(span.bytes, word));
                }
            }
            Work::Read(remote) => copy(self.remote(remote, span.bytes)?, from, span.bytes),
        }
        Ok(())
    }

    fn next_recv(&mut self, id: u32) -> Result<(u64, Span), u32> {
        let recv = self.pairs.get_mut(&id).and_then(|pair| pair.recvs.pop_front());
        self.not_ready += u64::from(recv.is_none());
        recv.ok_or(13)
    }

    /// Where a span lies, if it lies within its registration.
    fn local(&self, span: Span) -> Result<usize, u32> {
        if span.bytes == 0 {
            return Ok(0);
        }
        let memory = self.memory.get(&span.key).ok_or(4u32)?;
        memory.place(span.address, span.bytes as usize).ok_or(4)
    }

    fn remote(&self, remote: Remote, bytes: u32) -> Result<usize, u32> {
        if bytes == 0 {
            return Ok(0);
        }
        let memory =
            self.memory.get(&remote.key).filter(|memory| memory.access != Access::Read).ok_or(REMOTE_ACCESS)?;
        memory.place(remote.address, bytes as usize).ok_or(REMOTE_ACCESS)
    }
}

impl Memory {
    /// Where in the process's memory it is that a work request names, if that lies within.
    fn place(&self, address: u64, bytes: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.first)?).ok()?;
        (offset.checked_add(bytes)? <= self.bytes).then(|| self.start + offset)
    }
}

/// A file, mapped.
struct Mapping {
    start: usize,
    bytes: usize,
}

impl Mapping {
    fn of(file: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping anywhere, which is of no other use and stays until it is dropped.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, shared, file, 0) }?;
        Ok(Self { start: start.addr(), bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made above, and nothing that is registered lies in it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.start as *mut std::ffi::c_void, self.bytes) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "a file could not be unmapped");
        }
    }
}

fn copy(from: usize, into: usize, bytes: u32) {
    if bytes > 0 {
        // SAFETY: both lie within registered memory, which stays mapped; the links that posted the work keep others away from
        // it, as they do for a device.
        unsafe { std::ptr::copy(from as *const u8, into as *mut u8, bytes as usize) };
    }
}

/// A device of a [`Fabric`].
pub struct Loopback {
    fabric: Fabric,
    port: usize,
    bell: Arc<OwnedFd>,
    registered: usize,
}

impl Loopback {
    /// Registrations that stand.
    pub fn registered(&self) -> usize {
        self.registered
    }
}

impl Adapter for Loopback {
    fn name(&self) -> String {
        format!("loopback port {}", self.port)
    }

    fn limits(&self) -> Limits {
        Limits { inline_bytes: 64, message_bytes: 1 << 20, send_depth: DEPTH, recv_depth: DEPTH, reads: 16 }
    }

    unsafe fn register(&mut self, start: *mut u8, bytes: usize, access: Access) -> Result<Key, RegisterError> {
        let mut state = self.fabric.state();
        state.next += 1;
        let key = state.next;
        let first = if access == Access::Exposed { EXPOSED_FIRST } else { start as u64 };
        let memory = Memory { start: start as usize, bytes, first, access, _mapping: None };
        state.memory.insert(key, memory);
        self.registered += 1;
        Ok(Key { handle: key.into(), local: key, remote: key, first })
    }

    unsafe fn register_foreign(&mut self, memory: Foreign<'_>) -> Result<Key, RegisterError> {
        let refused = |source: io::Error| RegisterError::Device {
            bytes: memory.bytes,
            device: self.name(),
            source: Arc::new(source),
        };
        let mut state = self.fabric.state();
        let (Some((file, offset)), true) = (memory.dma_buf, state.takes_dma_bufs) else {
            return Err(refused(Errno::OPNOTSUPP.into()));
        };
        let offset = usize::try_from(offset).map_err(|_| refused(Errno::INVAL.into()))?;
        let whole = rustix::fs::fstat(file).map_err(|error| refused(error.into()))?.st_size as usize;
        if offset.checked_add(memory.bytes).is_none_or(|end| end > whole) {
            return Err(refused(Errno::INVAL.into()));
        }
        let mapping = Mapping::of(file, whole).map_err(refused)?;
        state.next += 1;
        let (key, first, bytes) = (state.next, EXPOSED_FIRST, memory.bytes);
        let start = mapping.start + offset;
        state.memory.insert(key, Memory { start, bytes, first, access: Access::Exposed, _mapping: Some(mapping) });
        drop(state);
        self.registered += 1;
        Ok(Key { handle: key.into(), local: key, remote: key, first })
    }

    fn deregister(&mut self, handle: u64) {
        let removed = self.fabric.state().memory.remove(&(handle as u32));
        self.registered -= usize::from(removed.is_some());
    }

    fn open(&mut self) -> Result<Endpoint, TransportError> {
        let mut state = self.fabric.state();
        if state.is_down {
            return Err(TransportError::io("open a queue pair", io::ErrorKind::NetworkDown));
        }
        state.next += 1;
        let queue_pair = state.next;
        let (recvs, pending) = (VecDeque::new(), VecDeque::new());
        let pair = Pair { port: self.port, other: None, is_broken: false, recvs, pending };
        state.pairs.insert(queue_pair, pair);
        Ok(Endpoint { queue_pair, packet: 0, lid: 0, mtu_bytes: 4096, reads: 16, gid: [0; 16] })
    }

    fn connect(&mut self, queue_pair: u32, to: &Endpoint) -> Result<(), TransportError> {
        if let Some(pair) = self.fabric.state().pairs.get_mut(&queue_pair) {
            pair.other = Some(to.queue_pair);
        }
        Ok(())
    }

    fn stop(&mut self, queue_pair: u32) {
        self.fabric.state().flush(queue_pair);
    }

    fn close(&mut self, queue_pair: u32) {
        let mut state = self.fabric.state();
        state.pairs.remove(&queue_pair);
        state.ports[self.port].events.retain(|event| event.queue_pair != queue_pair);
    }

    fn post(&mut self, queue_pair: u32, number: u64, span: Span, work: Work, signalled: bool) -> io::Result<()> {
        let mut state = self.fabric.state();
        let pair = state.pairs.get_mut(&queue_pair).ok_or(io::ErrorKind::NotConnected)?;
        if pair.is_broken {
            state.tell(queue_pair, number, What::Failed(Status { code: FLUSHED, vendor: 0 }));
            return Ok(());
        }
        if pair.pending.len() >= DEPTH {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        pair.pending.push_back((number, span, work, signalled));
        Ok(())
    }

    fn post_recv(&mut self, queue_pair: u32, number: u64, span: Span) -> io::Result<()> {
        let mut state = self.fabric.state();
        let pair = state.pairs.get_mut(&queue_pair).ok_or(io::ErrorKind::NotConnected)?;
        if pair.is_broken {
            state.tell(queue_pair, number, What::Failed(Status { code: FLUSHED, vendor: 0 }));
        } else if pair.recvs.len() >= DEPTH {
            return Err(io::ErrorKind::OutOfMemory.into());
        } else {
            pair.recvs.push_back((number, span));
        }
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        let mut state = self.fabric.state();
        state.run(self.port);
        events.append(&mut state.ports[self.port].events);
    }

    fn arm(&mut self) {
        let mut state = self.fabric.state();
        state.run(self.port);
        state.ports[self.port].is_armed = true;
    }

    fn sleep_on(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn wake_up(&mut self, _troubles: &mut Vec<Trouble>) {
        let mut counter = [0; 8];
        // Empty already: nobody rang.
        let _ = rustix::io::read(&self.bell, &mut counter);
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        let mut state = self.fabric.state();
        let port = self.port;
        state.pairs.retain(|_, pair| pair.port != port);
        state.ports[port] = Port::default();
    }
}
