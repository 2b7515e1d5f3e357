//! Pure: what a client of the TCP rendezvous asks: a kind, a key and a value, each with its length. Memory is taken for what has
//! come, not for what is announced.

use super::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use std::io::{self, ErrorKind, Read};

pub(crate) const SET: u8 = 1;
pub(crate) const GET: u8 = 2;

/// A request as bytes; its key and value are not longer than may be.
pub(crate) fn write(kind: u8, key: &str, value: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    for part in [key.as_bytes(), value] {
        out.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(part);
    }
    out
}

/// The next request: its kind, key and value.
pub(crate) fn read(from: &mut impl Read) -> io::Result<(u8, String, Vec<u8>)> {
    let mut kind = [0];
    from.read_exact(&mut kind)?;
    let key = String::from_utf8(read_part(from, MAX_KEY_BYTES)?).map_err(|_| ErrorKind::InvalidData)?;
    Ok((kind[0], key, read_part(from, MAX_VALUE_BYTES)?))
}

/// Bytes with their length before them.
pub(crate) fn read_part(from: &mut impl Read, most: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > most {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("{length} bytes, of at most {most}")));
    }
    let mut part = Vec::new();
    from.take(length as u64).read_to_end(&mut part)?;
    if part.len() < length {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(part)
}
