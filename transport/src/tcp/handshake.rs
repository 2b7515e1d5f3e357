//! Does: the hello on one connection: blocking for who calls, step by step for who listens.

use super::stream::Stream;
use super::tls::{self, Tls};
use crate::hello::{Hello, Identity, MAX_RECORD_BYTES, PROOF_BYTES, Side, proof, proves, refused};
use crate::{TransportError, tcp::options};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The listener's last word.
const WELCOME: u8 = 1;
const WRONG_TOKEN: u8 = 2;
const STALE: u8 = 3;
const FULL: u8 = 4;
const TAKEN: u8 = 5;
const SEALED: u8 = 6;
const OPEN: u8 = 7;

/// What both sides need of this process.
pub(super) struct Me {
    pub(super) identity: Identity,
    pub(super) token: String,
    pub(super) tls: Option<Arc<Tls>>,
}

/// Why a connection that we opened is of no use.
pub(super) enum CallError {
    /// Another process than the one wanted listens there: the address is old.
    Stale,
    /// Nobody, or nobody who speaks our protocol, or not in time.
    Io(io::Error),
    /// It will not be otherwise next time.
    Final(TransportError),
}

impl From<io::Error> for CallError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Opens lane `lane` of `lanes` to `address` and says hello; who answers.
pub(super) fn call(
    me: &Me,
    (address, host): (SocketAddr, Option<&str>),
    wants: u64,
    lane: (u16, u16),
    deadline: Instant,
) -> Result<(Stream, Identity), CallError> {
    let host = host.map_or_else(|| address.ip().to_canonical().to_string(), str::to_owned);
    converse(me, (address, &host), wants, lane, deadline).map_err(|error| match (error, &me.tls) {
        (CallError::Io(error), Some(tls)) => match tls::error_in(&error, address.to_string(), &tls.name_of(&host)) {
            Some(error) => CallError::Final(error),
            None => CallError::Io(error),
        },
        (error, _) => error,
    })
}

fn converse(
    me: &Me,
    (address, host): (SocketAddr, &str),
    wants: u64,
    (lane, lanes): (u16, u16),
    deadline: Instant,
) -> Result<(Stream, Identity), CallError> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let socket = options::connect(address, left)?;
    options::tune(&socket);
    socket.set_write_timeout(Some(left))?;
    let mut stream = Stream::plain(socket);
    stream.wait_until(Some(deadline));
    if let Some(tls) = &me.tls {
        stream.begin_tls(tls.call(host).map_err(CallError::Final)?);
    }
    let hello = Hello { identity: me.identity.clone(), wants, lane, lanes, challenge: random() }.encode();
    send_record(&mut stream, &hello)?;
    let answer = read_record(&mut stream)?;
    if answer.len() == 1 {
        return Err(verdict(answer[0], address));
    }
    let (answer, their_proof) =
        answer.split_last_chunk::<PROOF_BYTES>().ok_or_else(|| io::Error::from(ErrorKind::InvalidData))?;
    let told = Hello::decode(answer).map_err(|reason| io::Error::new(ErrorKind::InvalidData, reason))?;
    let sound = proves(&me.token, Side::Listener, &hello, answer, their_proof);
    send_record(&mut stream, &proof(&me.token, Side::Caller, &hello, answer))?;
    let last = read_record(&mut stream)?;
    if !sound {
        return Err(CallError::Final(refused(address.to_string())));
    }
    if last != [WELCOME] {
        return Err(verdict(last.first().copied().unwrap_or(0), address));
    }
    stream.wait_until(None);
    stream.socket().set_read_timeout(None)?;
    stream.socket().set_write_timeout(None)?;
    stream.socket().set_nonblocking(true)?;
    Ok((stream, told.identity))
}

fn verdict(word: u8, address: SocketAddr) -> CallError {
    match word {
        STALE => CallError::Stale,
        WRONG_TOKEN => CallError::Final(refused(address.to_string())),
        TAKEN => {
            let reason = format!("{address} has this rank already: two processes were started with one rank");
            CallError::Final(TransportError::Config { setting: "rank".to_owned(), reason })
        }
        SEALED => CallError::Final(tls::wanted(address.to_string())),
        FULL => CallError::Io(io::Error::other("it has as many peers as it may have")),
        other => CallError::Io(io::Error::new(ErrorKind::InvalidData, format!("it answered {other}"))),
    }
}

fn send_record(stream: &mut Stream, record: &[u8]) -> io::Result<()> {
    let length = u16::try_from(record.len()).map_err(|_| ErrorKind::InvalidInput)?;
    let mut out = length.to_le_bytes().to_vec();
    out.extend(record);
    stream.write_all(&out)
}

fn read_record(stream: &mut Stream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let length = usize::from(u16::from_le_bytes(length));
    if length == 0 || length > MAX_RECORD_BYTES {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a hello of {length} bytes")));
    }
    let mut record = vec![0; length];
    stream.read_exact(&mut record)?;
    Ok(record)
}

/// A connection that somebody opened to us, and that has not finished its hello.
pub(super) struct Guest {
    pub(super) stream: Stream,
    pub(super) address: SocketAddr,
    pub(super) deadline: Instant,
    buffer: Vec<u8>,
    /// Whether it is known if it speaks TLS.
    known: bool,
    greeted: Option<(Hello, Vec<u8>, Vec<u8>)>,
}

/// How far a guest is.
pub(super) enum Progress {
    /// More must come.
    Waiting,
    /// It has proved itself; welcome it, or turn it away.
    Ready(Hello),
    /// It is of no use.
    Gone(String),
}

impl Guest {
    pub(super) fn new(stream: TcpStream, address: SocketAddr, deadline: Instant) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        options::tune(&stream);
        Ok(Self { stream: Stream::plain(stream), address, deadline, buffer: Vec::new(), known: false, greeted: None })
    }

    /// Takes what has come.
    pub(super) fn advance(&mut self, me: &Me, now: Instant) -> Progress {
        match self.step(me) {
            Ok(Progress::Waiting) if now >= self.deadline => Progress::Gone("its hello took too long".to_owned()),
            Ok(progress) => progress,
            Err(error) => Progress::Gone(error.to_string()),
        }
    }

    fn step(&mut self, me: &Me) -> io::Result<Progress> {
        if !self.known {
            match (self.stream.begins_with_tls()?, &me.tls) {
                (None, _) => return Ok(Progress::Waiting),
                (Some(true), Some(tls)) => self.stream.begin_tls(tls.answer()?),
                (Some(false), None) => {}
                (Some(true), None) => return self.send_off(OPEN, "it speaks TLS, and this end has no tls-cert"),
                (Some(false), Some(_)) => return self.send_off(SEALED, "it does not speak TLS: it has no tls-ca"),
            }
            self.known = true;
        }
        if self.greeted.is_none() {
            let Some(record) = self.record()? else { return Ok(Progress::Waiting) };
            let hello = Hello::decode(&record).map_err(|reason| io::Error::new(ErrorKind::InvalidData, reason))?;
            if hello.wants != 0 && hello.wants != me.identity.nonce {
                self.say(&[STALE])?;
                return Ok(Progress::Gone("it looks for a process that is no longer here".to_owned()));
            }
            let Hello { lane, lanes, .. } = hello;
            let mine = Hello { identity: me.identity.clone(), wants: 0, lane, lanes, challenge: random() }.encode();
            let mut answer = mine.clone();
            answer.extend(proof(&me.token, Side::Listener, &record, &mine));
            self.say(&answer)?;
            self.greeted = Some((hello, record, mine));
        }
        let Some(record) = self.record()? else { return Ok(Progress::Waiting) };
        let (hello, theirs, mine) = self.greeted.as_ref().ok_or(ErrorKind::InvalidData)?;
        let proof: [u8; PROOF_BYTES] = record.try_into().map_err(|_| ErrorKind::InvalidData)?;
        if proves(&me.token, Side::Caller, theirs, mine, &proof) {
            return Ok(Progress::Ready(hello.clone()));
        }
        self.say(&[WRONG_TOKEN])?;
        Ok(Progress::Gone("its token is wrong".to_owned()))
    }

    /// Tells the guest that it does not speak as this end does.
    fn send_off(&mut self, word: u8, reason: &str) -> io::Result<Progress> {
        // Closing with bytes unread would cut off what we say.
        let _ = self.stream.read(&mut [0; 4096]);
        self.say(&[word])?;
        Ok(Progress::Gone(reason.to_owned()))
    }

    /// Lets the guest in.
    pub(super) fn welcome(mut self) -> io::Result<Stream> {
        self.say(&[WELCOME])?;
        Ok(self.stream)
    }

    /// Turns the guest away, since there are as many peers as there may be.
    pub(super) fn turn_away(&mut self) {
        // It learns of it by the closed connection otherwise.
        let _ = self.say(&[FULL]);
    }

    /// Turns the guest away: its rank is here already.
    pub(super) fn call_double(&mut self) {
        // As above.
        let _ = self.say(&[TAKEN]);
    }

    /// Turns the guest away: it looks for another than us.
    pub(super) fn send_elsewhere(&mut self) {
        // As above.
        let _ = self.say(&[STALE]);
    }

    fn say(&mut self, record: &[u8]) -> io::Result<()> {
        let length = u16::try_from(record.len()).map_err(|_| ErrorKind::InvalidInput)?;
        let mut out = length.to_le_bytes().to_vec();
        out.extend(record);
        // A fresh connection's buffer has room for a record; one that has none is not worth waiting for.
        self.stream.write_all(&out)
    }

    fn record(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let wanted = match self.buffer.first_chunk::<2>() {
                None => 2,
                Some(&length) => match usize::from(u16::from_le_bytes(length)) {
                    length if length == 0 || length > MAX_RECORD_BYTES => {
                        return Err(io::Error::new(ErrorKind::InvalidData, format!("a hello of {length} bytes")));
                    }
                    length => 2 + length,
                },
            };
            let have = self.buffer.len();
            if have >= 2 && have == wanted {
                return Ok(Some(self.buffer.drain(..).skip(2).collect()));
            }
            // Never further than the record, so that the first frames stay in the socket.
            self.buffer.resize(wanted, 0);
            let read = self.stream.read(&mut self.buffer[have..]);
            self.buffer.truncate(have + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    bytes
}
