//! Does: the same over plain sockets, without the library: what the machine itself does with so many senders.
//!
//! A push is its number, eight bytes, and its payload; the receiver's words are a byte each: a push has come, or the next phase.

use super::count::Count;
use super::member::{MEASURE, MEETING, MemberOptions, NAP, START, STOP, WHOLE};
use super::phases::Phases;
use super::receiver::Taken;
use super::sender::Pushed;
use super::stamp;
use crate::sockets::{self, Sent};
use gradwire_transport::{FileStore, Store};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use std::collections::VecDeque;
use std::error::Error;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

const HEAD_BYTES: usize = 8;
const TAKEN: u8 = 0;
/// Where the receiver says its address.
const PLACE: &str = "plain";

/// A connection to one sender, and its push that is coming.
struct Connection {
    stream: TcpStream,
    head: [u8; HEAD_BYTES],
    /// Bytes of head and payload so far.
    got: usize,
    payload: Vec<u8>,
    next: u64,
    count: Count,
}

/// Receives until everybody has left.
pub(super) fn receive(options: &MemberOptions) -> Result<(), Box<dyn Error>> {
    let deadline = options.deadline();
    let listener = TcpListener::bind(SocketAddr::new(options.ip, 0))?;
    FileStore::new(&options.folder)?.set(PLACE, listener.local_addr()?.to_string().as_bytes())?;
    let ready = epoll::create(CreateFlags::CLOEXEC)?;
    let mut senders = accept(options, &listener)?;
    for (at, sender) in senders.iter().enumerate() {
        epoll::add(&ready, &sender.stream, EventData::new_u64(at as u64), EventFlags::IN)?;
    }
    let mut phases = Phases::new(Instant::now(), options.warm_up, options.seconds);
    // What was used last is used first, while it lies in the cache.
    let mut free = Vec::new();
    let mut left = senders.len();
    while left > 0 {
        let now = Instant::now();
        if now > deadline {
            return Err(format!("{left} senders had not ended in time").into());
        }
        let nap = phases.due(now).saturating_duration_since(now).min(NAP);
        let nap = Timespec { tv_sec: 0, tv_nsec: i64::from(nap.subsec_nanos()) };
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 64];
        let found = epoll::wait(&ready, &mut events[..], Some(&nap))?;
        for event in &events[..found] {
            let at = usize::try_from({ event.data }.u64())?;
            if senders[at].read(options, at, &mut free)? {
                continue;
            }
            if !phases.is_ending() {
                return Err(format!("sender {} left before its time", at + 1).into());
            }
            epoll::delete(&ready, &senders[at].stream)?;
            left -= 1;
        }
        let now = Instant::now();
        let Some(note) = phases.turn(now, senders.iter().all(|sender| sender.next > 0)) else { continue };
        for sender in &mut senders {
            match note {
                MEASURE => sender.count.begin(now),
                STOP => sender.count.end(now),
                _ => {}
            }
            sender.stream.write_all(&[u8::try_from(note)?])?;
        }
    }
    let seconds = phases.window.ok_or("everybody left before it was measured")?;
    let pushes = senders.iter().map(|sender| sender.count.pushes).collect();
    options.leave(&Taken { seconds, pushes, refused: None })
}

/// The senders, by rank.
fn accept(options: &MemberOptions, listener: &TcpListener) -> Result<Vec<Connection>, Box<dyn Error>> {
    let mut senders = Vec::new();
    for _ in 0..options.senders {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(MEETING))?;
        let mut rank = [0; 4];
        stream.read_exact(&mut rank)?;
        let count = Count::new(Instant::now());
        let sender = Connection { stream, head: [0; HEAD_BYTES], got: 0, payload: Vec::new(), next: 0, count };
        senders.push((u32::from_le_bytes(rank), sender));
    }
    senders.sort_by_key(|(rank, _)| *rank);
    Ok(senders.into_iter().map(|(_, sender)| sender).collect())
}

impl Connection {
    /// Takes what is there, of one push at most; false: it has left.
    fn read(&mut self, options: &MemberOptions, at: usize, free: &mut Vec<Vec<u8>>) -> Result<bool, Box<dyn Error>> {
        if self.got == 0 {
            self.payload = free.pop().unwrap_or_else(|| vec![0; options.bytes]);
        }
        let got = if self.got < HEAD_BYTES {
            let head = IoSliceMut::new(&mut self.head[self.got..]);
            self.stream.read_vectored(&mut [head, IoSliceMut::new(&mut self.payload)])?
        } else {
            self.stream.read(&mut self.payload[self.got - HEAD_BYTES..])?
        };
        if got == 0 {
            return Ok(false);
        }
        self.got += got;
        if self.got < HEAD_BYTES + options.bytes {
            return Ok(true);
        }
        let (note, rank) = (u64::from_le_bytes(self.head), u32::try_from(at + 1)?);
        if note & !WHOLE != self.next || !stamp::is_right(&self.payload, rank, self.next, note & WHOLE != 0) {
            return Err(format!("push {} of sender {rank} came wrong", self.next).into());
        }
        (self.got, self.next) = (0, self.next + 1);
        free.push(std::mem::take(&mut self.payload));
        self.count.came(Instant::now());
        self.stream.write_all(&[TAKEN])?;
        Ok(true)
    }
}

/// Pushes until the receiver says stop.
pub(super) fn send(options: &MemberOptions) -> Result<(), Box<dyn Error>> {
    let deadline = options.deadline();
    let address: SocketAddr = String::from_utf8(FileStore::new(&options.folder)?.get(PLACE, deadline)?)?.parse()?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let patience = deadline.saturating_duration_since(Instant::now());
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(&options.rank.to_le_bytes())?;
    let mut buffers: Vec<Vec<u8>> = (0..options.buffers).map(|_| stamp::pattern(options.rank, options.bytes)).collect();
    let (mut sequence, mut under_way) = (0, VecDeque::new());
    let mut push = |stream: &mut TcpStream, under_way: &mut VecDeque<Instant>, flag: u64| {
        let buffer = &mut buffers[(sequence % options.buffers as u64) as usize];
        stamp::stamp(buffer, options.rank, sequence);
        let head = (sequence | flag).to_le_bytes();
        sequence += 1;
        under_way.push_back(Instant::now());
        write_both(stream, &head, buffer)
    };
    let (mut pushing, mut stopped, mut last) = (false, false, false);
    let (mut before, mut result) = (None, Pushed { push_us: Vec::new(), sent: Sent::default() });
    push(&mut stream, &mut under_way, WHOLE)?;
    while !(last && under_way.is_empty()) {
        while pushing && under_way.len() < options.depth {
            push(&mut stream, &mut under_way, 0)?;
        }
        if stopped && !last && under_way.is_empty() {
            push(&mut stream, &mut under_way, WHOLE)?;
            last = true;
        }
        let mut words = [0; 64];
        let heard = stream.read(&mut words)?;
        if heard == 0 {
            return Err("the receiver has left".into());
        }
        for word in &words[..heard] {
            match u64::from(*word) {
                START => pushing = true,
                MEASURE => before = Some(sockets::sent()?),
                STOP => {
                    (pushing, stopped) = (false, true);
                    result.sent = sockets::sent()? - before.take().ok_or("an end without a beginning")?;
                }
                _ => {
                    let posted: Instant = under_way.pop_front().ok_or("a word about a push that was not made")?;
                    if before.is_some() {
                        result.push_us.push(posted.elapsed().as_secs_f64() * 1e6);
                    }
                }
            }
        }
    }
    options.leave(&result)
}

/// Writes a head and what follows it.
fn write_both(stream: &mut TcpStream, head: &[u8], payload: &[u8]) -> std::io::Result<()> {
    let wrote = stream.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)])?;
    match wrote.checked_sub(head.len()) {
        Some(wrote) => stream.write_all(&payload[wrote..]),
        None => {
            stream.write_all(&head[wrote..])?;
            stream.write_all(payload)
        }
    }
}
