//! Does: a store that rank 0 serves over TCP.

use super::requests::{self, GET, SET, read_part};
use super::{MAX_KEY_BYTES, MAX_VALUE_BYTES, MemoryStore, Store, timeout};
use crate::TransportError;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const MARK: [u8; 4] = *b"GWS1";
const FOUND: u8 = 1;
const MISSING: u8 = 2;
/// Connections served at once; more are closed at once.
const MAX_CLIENTS: usize = 4096;
/// How long the server waits for a key before the client has to ask anew.
const TURN: Duration = Duration::from_millis(500);
/// A client that says nothing for this long is let go.
const IDLE: Duration = Duration::from_secs(600);

/// A store served by one process. The server lives as long as the process: others may still ask when its own work is done.
pub struct TcpStore {
    address: SocketAddr,
    connection: Mutex<Option<TcpStream>>,
}

impl TcpStore {
    /// Serves a store at `address` (rank 0) and is its first client.
    ///
    /// # Errors
    /// `Io` when the address cannot be had.
    pub fn serve(address: SocketAddr) -> Result<Self, TransportError> {
        let listener = TcpListener::bind(address)
            .map_err(|error| TransportError::io(format!("serve the rendezvous at {address}"), error))?;
        let address = listener.local_addr().map_err(|error| TransportError::io("serve the rendezvous", error))?;
        let values = Arc::new(MemoryStore::default());
        let clients = Arc::new(AtomicUsize::new(0));
        std::thread::Builder::new()
            .name("gradwire-store".to_owned())
            .spawn(move || {
                for stream in listener.incoming().filter_map(Result::ok) {
                    if clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
                        clients.fetch_sub(1, Ordering::AcqRel);
                        continue;
                    }
                    let (values, clients) = (Arc::clone(&values), Arc::clone(&clients));
                    std::thread::spawn(move || {
                        if let Err(error) = serve_one(stream, &values) {
                            tracing::debug!(%error, "a client of the rendezvous has gone");
                        }
                        clients.fetch_sub(1, Ordering::AcqRel);
                    });
                }
            })
            .map_err(|error| TransportError::io("start the rendezvous's thread", error))?;
        Ok(Self { address: reachable(address), connection: Mutex::new(None) })
    }

    /// A client of the store at `host:port`, which may come later.
    ///
    /// # Errors
    /// `Io` when the name means nothing.
    pub fn client(host: &str, port: u16) -> Result<Self, TransportError> {
        let found = (host, port).to_socket_addrs().map(|mut all| all.next());
        let none = || io::Error::new(ErrorKind::NotFound, "no address");
        let address = found
            .and_then(|first| first.ok_or_else(none))
            .map_err(|error| TransportError::io(format!("find the host {host} of the rendezvous"), error))?;
        Ok(Self { address, connection: Mutex::new(None) })
    }

    /// Where the store is served.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a request and reads the answer, on one connection that is opened anew where it has been lost.
    fn ask(&self, kind: u8, key: &str, value: &[u8], deadline: Instant) -> Result<Option<Vec<u8>>, TransportError> {
        let began = Instant::now();
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let result = match connection.take() {
                Some(stream) => Ok(stream),
                None => connect(self.address, deadline),
            }
            .and_then(|mut stream| {
                stream.set_read_timeout(Some(TURN + Duration::from_secs(5)))?;
                write_request(&mut stream, kind, key, value)?;
                let answer = read_answer(&mut stream)?;
                Ok((stream, answer))
            });
            match result {
                Ok((stream, answer)) => {
                    *connection = Some(stream);
                    return Ok(answer);
                }
                Err(error) if Instant::now() >= deadline => {
                    let what = format!("the rendezvous at {} (is rank 0 there? {error})", self.address);
                    return Err(timeout(what, began));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Store for TcpStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), TransportError> {
        let deadline = Instant::now() + Duration::from_secs(60);
        self.ask(SET, key, value, deadline).map(|_| ())
    }

    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, TransportError> {
        let began = Instant::now();
        loop {
            if let Some(value) = self.ask(GET, key, &[], deadline)? {
                return Ok(value);
            }
            if Instant::now() >= deadline {
                return Err(timeout(format!("key {key} at the rendezvous {}", self.address), began));
            }
        }
    }
}

/// A listener on all interfaces is reached over loopback by its own process.
fn reachable(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], address.port())) } else { address }
}

fn connect(address: SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
    let left =
        deadline.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), Duration::from_secs(3));
    let mut stream = TcpStream::connect_timeout(&address, left)?;
    stream.set_nodelay(true)?;
    stream.write_all(&MARK)?;
    Ok(stream)
}

fn write_request(stream: &mut TcpStream, kind: u8, key: &str, value: &[u8]) -> io::Result<()> {
    if key.len() > MAX_KEY_BYTES || value.len() > MAX_VALUE_BYTES {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a key or value is too long"));
    }
    stream.write_all(&requests::write(kind, key, value))
}

fn read_answer(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    match kind[0] {
        FOUND => read_part(stream, MAX_VALUE_BYTES).map(Some),
        MISSING => Ok(None),
        other => Err(io::Error::new(ErrorKind::InvalidData, format!("the rendezvous answered {other}"))),
    }
}

fn serve_one(mut stream: TcpStream, values: &MemoryStore) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut mark = [0; 4];
    stream.read_exact(&mut mark)?;
    if mark != MARK {
        return Err(io::Error::new(ErrorKind::InvalidData, "it does not speak the rendezvous's protocol"));
    }
    stream.set_read_timeout(Some(IDLE))?;
    loop {
        let (kind, key, value) = requests::read(&mut stream)?;
        let found = match kind {
            SET => values.set(&key, &value).ok().map(|()| Vec::new()),
            GET => values.get(&key, Instant::now() + TURN).ok(),
            _ => return Err(ErrorKind::InvalidData.into()),
        };
        let mut out = vec![if found.is_some() { FOUND } else { MISSING }];
        if let Some(value) = found {
            out.extend(u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend(value);
        }
        stream.write_all(&out)?;
    }
}
