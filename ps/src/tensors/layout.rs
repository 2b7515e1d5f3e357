//! Pure: where in a file of safetensors which tensor lies, of which nothing is trusted; and the bytes of one, read where they are wanted.

use super::Tensor;
use crate::checkpoint::BadCheckpoint;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::value::RawValue;
use std::collections::{BTreeMap, HashMap};
use std::io;

/// The longest header that is written, or read: some 100,000 tensors.
pub(super) const MAX_HEADER_BYTES: usize = 16 << 20;
/// Before the header: its length.
const LENGTH_BYTES: usize = 8;
/// What stands among the tensors, and is none.
const TOLD: &str = "__metadata__";

/// A file that is read piece by piece.
pub(crate) trait Source {
    /// Its bytes.
    fn bytes(&self) -> u64;

    /// Reads `into.len()` bytes from `at` on.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
}

impl Source for &[u8] {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(at).ok();
        let found = start.and_then(|start| self.get(start..start.checked_add(into.len())?));
        into.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A file's tensors.
pub(super) struct Layout<'a> {
    source: &'a dyn Source,
    /// Where the tensors begin.
    start: u64,
    /// What the file says of itself.
    pub(super) told: HashMap<String, String>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

fn whole(what: impl ToString) -> BadCheckpoint {
    BadCheckpoint::new("the file", what)
}

fn cut(what: String) -> BadCheckpoint {
    whole(format!("{what}: it was cut, or more was written behind it"))
}

impl<'a> Layout<'a> {
    /// Reads the header, and nothing else.
    ///
    /// # Errors
    /// Where it is too long, or longer than the file; where it cannot be read; where a tensor is of another length than its shape
    /// and type say, lies on another one, outside the file, or behind a gap; where the file goes on behind the last one.
    pub(super) fn read(source: &'a dyn Source) -> Result<Self, BadCheckpoint> {
        let there = source.bytes();
        let mut length = [0; LENGTH_BYTES];
        if there < LENGTH_BYTES as u64 {
            return Err(cut(format!("it has {there} bytes, and a header's length takes {LENGTH_BYTES}")));
        }
        source.read(0, &mut length).map_err(whole)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES as u64 {
            let what = format!("it is no safetensors file of ours: its header would have {length} bytes");
            return Err(whole(format!("{what}, of at most {MAX_HEADER_BYTES}")));
        }
        let start = LENGTH_BYTES as u64 + length;
        if start > there {
            return Err(cut(format!("its header would end at byte {start}, and it has {there}")));
        }
        let mut header = vec![0; length as usize];
        source.read(LENGTH_BYTES as u64, &mut header).map_err(whole)?;
        let (told, tensors) = entries(&header)?;
        let layout = Self { source, start, told, tensors };
        layout.check(there - start)?;
        Ok(layout)
    }

    /// The tensors follow each other, and all of the file is theirs.
    fn check(&self, there: u64) -> Result<(), BadCheckpoint> {
        let mut all: Vec<(&String, &TensorInfo)> = self.tensors.iter().collect();
        all.sort_unstable_by_key(|(_, info)| info.data_offsets);
        let mut next = 0;
        for (name, info) in all {
            let (start, end) = info.data_offsets;
            let wrong = |what: String| Err(BadCheckpoint::new(name.as_str(), what));
            if end < start {
                return wrong(format!("it would end at byte {end}, before it begins at {start}"));
            }
            if end as u64 > there {
                return wrong(format!("it would end at byte {end}, and the file has {there} for tensors: it was cut"));
            }
            if start != next {
                let what = if start < next { "lies on another tensor" } else { "lies behind a gap" };
                return wrong(format!("it {what}: it begins at byte {start}, and the one before it ends at {next}"));
            }
            let wanted = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size));
            if wanted != (end - start).checked_mul(8) {
                let (dtype, shape) = (info.dtype, &info.shape);
                return wrong(format!("it has {} bytes, which {dtype} of shape {shape:?} does not take", end - start));
            }
            next = end;
        }
        if next as u64 == there { Ok(()) } else { Err(cut(format!("its tensors have {next} bytes of {there}"))) }
    }

    /// Where tensor `name` lies.
    pub(super) fn tensor(&self, name: &str, dtype: Dtype) -> Result<Bytes<'_>, BadCheckpoint> {
        let (name, found) =
            self.tensors.get_key_value(name).ok_or_else(|| BadCheckpoint::new(name, "the tensor is missing"))?;
        if found.dtype != dtype {
            let what = format!("its type is {}, and must be {dtype}", found.dtype);
            return Err(BadCheckpoint::new(name.as_str(), what));
        }
        let (start, end) = found.data_offsets;
        Ok(Bytes { layout: self, name, start: self.start + start as u64, bytes: (end - start) as u64 })
    }
}

type Entries = (HashMap<String, String>, BTreeMap<String, TensorInfo>);

fn entries(header: &[u8]) -> Result<Entries, BadCheckpoint> {
    let strange = |error: serde_json::Error| whole(format!("it is no safetensors file: {error}"));
    let mut raw: BTreeMap<String, &RawValue> = serde_json::from_slice(header).map_err(strange)?;
    let told = raw.remove(TOLD).map(|told| serde_json::from_str(told.get())).transpose().map_err(strange)?;
    let tensor = |(name, raw): (String, &RawValue)| match serde_json::from_str(raw.get()) {
        Ok(info) => Ok((name, info)),
        Err(error) => Err(BadCheckpoint::new(name, format!("it cannot be read what it is: {error}"))),
    };
    Ok((told.unwrap_or_default(), raw.into_iter().map(tensor).collect::<Result<_, _>>()?))
}

/// The bytes of one tensor.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a> {
    layout: &'a Layout<'a>,
    name: &'a str,
    start: u64,
    bytes: u64,
}

impl Bytes<'_> {
    pub(super) fn len(&self) -> u64 {
        self.bytes
    }

    /// Puts `count` bytes from `at` on behind `out`.
    ///
    /// # Errors
    /// Where the tensor has not so many, or the file cannot be read.
    pub(super) fn append(&self, at: u64, count: usize, out: &mut Vec<u8>) -> Result<(), BadCheckpoint> {
        if at.checked_add(count as u64).is_none_or(|end| end > self.bytes) {
            return Err(BadCheckpoint::new(self.name, "it ends too early"));
        }
        let from = out.len();
        out.resize(from + count, 0);
        let read = self.layout.source.read(self.start + at, &mut out[from..]);
        read.map_err(|error| BadCheckpoint::new(self.name, error))
    }
}

/// What stands in a file before the bytes of `tensors`, which are put in the order in which those follow.
///
/// # Errors
/// Where it would be longer than is read.
pub(crate) fn header(
    tensors: &mut [(String, Tensor<'_>)],
    told: HashMap<String, String>,
) -> Result<Vec<u8>, BadCheckpoint> {
    // As the crate does it: so each tensor lies where its type may be read in place.
    tensors.sort_by(|(name, one), (other, another)| another.dtype.cmp(&one.dtype).then_with(|| name.cmp(other)));
    let mut next = 0;
    let each = tensors.iter().map(|(name, tensor)| {
        let start = next;
        next += tensor.bytes;
        (name.clone(), TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, next) })
    });
    let all = Metadata::new(Some(told), each.collect()).map_err(whole)?;
    let mut header = serde_json::to_vec(&all).map_err(whole)?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    if header.len() > MAX_HEADER_BYTES {
        return Err(whole(format!("{} tensors: their names take more than {MAX_HEADER_BYTES} bytes", tensors.len())));
    }
    Ok([&(header.len() as u64).to_le_bytes()[..], &header].concat())
}
