//! Pure: what a table is: everything that its clients must agree on, and how it travels.

use crate::body::{BadBody, Reader, Writer};
use crate::key::MAX_NAME_BYTES;
use crate::refusal::{Reason, Refusal};
use crate::shard_map::MAX_PART_BYTES;
use crate::staleness::MAX_WORKERS;
use crate::{Adagrad, Codec, Compression, DType, Mode, Recovery, TableId, UpdateRule};

/// Most dimensions of a table.
pub const MAX_DIMENSIONS: usize = 16;

/// How the contributions to a clock become one gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Combine {
    /// Their sum.
    #[default]
    Sum,
    /// Their sum divided by the number of workers, as DDP's gradients are. With bounded staleness each is divided by itself;
    /// in asynchronous mode it is the same as the sum.
    Mean,
}

impl Combine {
    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        match from.byte()? {
            0 => Ok(Self::Sum),
            1 => Ok(Self::Mean),
            _ => Err(BadBody("no such way to combine")),
        }
    }
}

/// A dense table, as every client of it describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct TableSpec {
    /// Its name, the same for everybody.
    pub name: String,
    /// Its shape; the elements lie in row-major order.
    pub shape: Vec<u64>,
    /// The type of its elements.
    pub dtype: DType,
    /// What is done with gradients.
    pub rule: UpdateRule,
    /// How pushes of several clients meet.
    pub mode: Mode,
    /// How contributions become one gradient.
    pub combine: Combine,
    /// Whether the gradient of a clock waits to be told its scale before it is applied.
    pub clipped: bool,
    /// What becomes of it when a server dies.
    pub recovery: Recovery,
    /// How gradients and values travel.
    pub compression: Compression,
    /// Number of shards that it is cut over.
    pub shards: u32,
    /// Which of them the receiver is.
    pub shard: u32,
    /// Elements of a part.
    pub part_elements: u64,
}

impl TableSpec {
    /// The table's id on the wire.
    pub fn id(&self) -> TableId {
        TableId::of(&self.name)
    }

    /// Number of elements over all shards; `None` for more than can be counted.
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size))
    }

    /// Says what cannot be, if anything.
    pub fn check(&self) -> Result<(), Refusal> {
        let wrong = |what: &str, expected: String, got: String| {
            Err(Refusal::new(Reason::Malformed, self.subject(), what, expected, got))
        };
        let size = self.dtype.bytes() as u64;
        if self.name.is_empty() || self.name.len() > MAX_NAME_BYTES {
            return wrong("length of its name", format!("1 to {MAX_NAME_BYTES} bytes"), self.name.len().to_string());
        }
        if self.shape.len() > MAX_DIMENSIONS {
            return wrong("dimensions", format!("at most {MAX_DIMENSIONS}"), self.shape.len().to_string());
        }
        if self.elements().and_then(|elements| elements.checked_mul(size)).is_none_or(|bytes| bytes > 1 << 60) {
            return wrong("size", "at most 2^60 bytes".to_owned(), format!("shape {:?}", self.shape));
        }
        if self.shards == 0 || self.shard >= self.shards {
            return wrong("shard", "one of its shards".to_owned(), format!("{} of {}", self.shard, self.shards));
        }
        if self.part_elements == 0 || self.part_elements > MAX_PART_BYTES as u64 / size {
            let most = MAX_PART_BYTES as u64 / size;
            return wrong("elements of a part", format!("1 to {most}"), self.part_elements.to_string());
        }
        if let Err(workers) = self.mode.check() {
            return wrong("workers", format!("1 to {MAX_WORKERS}"), workers);
        }
        if let UpdateRule::Adagrad(Adagrad { row_wise: true, .. }) = self.rule {
            return wrong("update rule", "one for a dense table, which has no rows".to_owned(), self.rule.to_string());
        }
        if self.clipped && !matches!(self.mode, Mode::Sync { .. }) {
            return wrong(
                "clipping",
                "a synchronous table, whose gradients are whole".to_owned(),
                self.mode.to_string(),
            );
        }
        if let Err(what) = self.recovery.check_table(self.mode, self.clipped, self.compression) {
            return wrong("recovery", "one that this table can have".to_owned(), what);
        }
        if let Err(what) = self.compression.check() {
            return wrong("compression", "what a table may have".to_owned(), what);
        }
        let part = usize::try_from(self.part_elements).unwrap_or(usize::MAX);
        if self.compression.push.bytes(part).is_some_and(|bytes| bytes > MAX_PART_BYTES) {
            return wrong("compression", "gradients that it makes shorter".to_owned(), self.compression.to_string());
        }
        self.rule.check().or_else(|reason| wrong("update rule", "numbers that make sense".to_owned(), reason))
    }

    /// What `other` has different, first of all; learning rates may differ, as they change while training.
    pub fn disagreement(&self, other: &Self) -> Option<Refusal> {
        let differ = |what: &str, expected: String, got: String| {
            (expected != got).then(|| Refusal::new(Reason::Mismatch, self.subject(), what, expected, got))
        };
        let at_rest = |rule: UpdateRule| rule.with_learning_rate(0.0).to_string();
        differ("name (two names have the same id: rename one)", self.name.clone(), other.name.clone())
            .or_else(|| differ("shape", format!("{:?}", self.shape), format!("{:?}", other.shape)))
            .or_else(|| differ("dtype", self.dtype.to_string(), other.dtype.to_string()))
            .or_else(|| differ("update rule", at_rest(self.rule), at_rest(other.rule)))
            .or_else(|| differ("mode", self.mode.to_string(), other.mode.to_string()))
            .or_else(|| differ("combine", format!("{:?}", self.combine), format!("{:?}", other.combine)))
            .or_else(|| differ("clipping", self.clipped.to_string(), other.clipped.to_string()))
            .or_else(|| differ("recovery", self.recovery.to_string(), other.recovery.to_string()))
            .or_else(|| differ("compression", self.compression.to_string(), other.compression.to_string()))
            .or_else(|| differ("number of servers", self.shards.to_string(), other.shards.to_string()))
            .or_else(|| differ("place in the list of servers", self.shard.to_string(), other.shard.to_string()))
            .or_else(|| differ("elements of a part", self.part_elements.to_string(), other.part_elements.to_string()))
    }

    /// The table as a refusal names it.
    pub fn subject(&self) -> String {
        format!("table {:?}", self.name)
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.text(&self.name);
        out.number(self.shape.len() as u64);
        self.shape.iter().for_each(|&size| out.number(size));
        out.byte(self.dtype.code());
        self.rule.encode(out);
        self.mode.encode(out);
        out.byte((self.combine == Combine::Mean).into());
        out.byte(self.clipped.into());
        self.recovery.encode(out);
        self.compression.push.write(out);
        self.compression.pull.write(out);
        out.number(self.shards.into());
        out.number(self.shard.into());
        out.number(self.part_elements);
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let name = from.text()?.to_owned();
        let dimensions = from.count(8)?;
        if dimensions > MAX_DIMENSIONS {
            return Err(BadBody("too many dimensions"));
        }
        let shape = (0..dimensions).map(|_| from.number()).collect::<Result<_, _>>()?;
        let dtype = DType::of_code(from.byte()?).ok_or(BadBody("no such dtype"))?;
        let rule = UpdateRule::decode(from)?;
        let mode = Mode::decode(from)?;
        let combine = Combine::decode(from)?;
        let clipped = match from.byte()? {
            flag @ (0 | 1) => flag == 1,
            _ => return Err(BadBody("a flag is neither 0 nor 1")),
        };
        let recovery = Recovery::decode(from)?;
        let compression = Compression { push: Codec::read(from)?, pull: Codec::read(from)? };
        let small = |number: u64| u32::try_from(number).map_err(|_| BadBody("a number is too large"));
        let (shards, shard) = (small(from.number()?)?, small(from.number()?)?);
        Ok(Self {
            name,
            shape,
            dtype,
            rule,
            mode,
            combine,
            clipped,
            recovery,
            compression,
            shards,
            shard,
            part_elements: from.number()?,
        })
    }
}

/// The body that opens `spec`.
pub fn open_body(spec: &TableSpec) -> Vec<u8> {
    let mut out = Writer::default();
    spec.encode(&mut out);
    out.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Adam, Ftrl, Sgd};
    use proptest::prelude::*;

    fn spec() -> TableSpec {
        TableSpec {
            name: "layer.0/weight".into(),
            shape: vec![3, 5],
            dtype: DType::BF16,
            rule: UpdateRule::Sgd(Sgd { momentum: 0.9, ..Sgd::default() }),
            mode: Mode::Sync { workers: 4 },
            combine: Combine::Mean,
            clipped: false,
            recovery: Recovery::Replicate { copies: 1 },
            compression: Compression { push: Codec::TopK { share: 0.25 }, pull: Codec::Int8 },
            shards: 3,
            shard: 2,
            part_elements: 64,
        }
    }

    fn body(spec: &TableSpec) -> Vec<u8> {
        let mut out = Writer::default();
        spec.encode(&mut out);
        out.0
    }

    #[test]
    fn a_spec_comes_back_as_it_was_and_no_piece_of_it_does() {
        let adam = UpdateRule::Adam(Adam { decoupled: true, ..Adam::default() });
        let adagrad = UpdateRule::Adagrad(Adagrad { initial: 0.5, row_wise: true, ..Adagrad::default() });
        let ftrl = UpdateRule::Ftrl(Ftrl { l1: 0.25, ..Ftrl::default() });
        for rule in [UpdateRule::Sum, UpdateRule::Replace, spec().rule, adam, adagrad, ftrl] {
            for mode in [Mode::Async, Mode::Sync { workers: 4 }, Mode::Ssp { workers: 4, staleness: 3 }] {
                let spec = TableSpec { rule, mode, clipped: mode == Mode::Async, ..spec() };
                let bytes = body(&spec);
                let mut from = Reader(&bytes);
                assert_eq!(TableSpec::decode(&mut from), Ok(spec));
                assert_eq!(from.end(), Ok(()));
                for cut in 0..bytes.len() {
                    assert!(TableSpec::decode(&mut Reader(&bytes[..cut])).is_err());
                }
            }
        }
    }

    #[test]
    fn what_differs_is_named_with_both_sides() {
        let other = TableSpec { shape: vec![5, 3], dtype: DType::F32, ..spec() };
        let refusal = spec().disagreement(&other).unwrap();
        assert_eq!(refusal.to_string(), "table \"layer.0/weight\": shape: expected [3, 5], got [5, 3]");
        let refusal = spec().disagreement(&TableSpec { dtype: DType::F32, ..spec() }).unwrap();
        assert_eq!((refusal.expected.as_str(), refusal.got.as_str()), ("bfloat16", "float32"));
        assert_eq!(spec().disagreement(&TableSpec { rule: spec().rule.with_learning_rate(7.0), ..spec() }), None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(spec().check(), Ok(()));
        for bad in [
            TableSpec { name: String::new(), ..spec() },
            TableSpec { shape: vec![1; 17], ..spec() },
            TableSpec { shape: vec![1 << 40, 1 << 40], ..spec() },
            TableSpec { shape: vec![1 << 60], ..spec() },
            TableSpec { shard: 3, ..spec() },
            TableSpec { clipped: true, mode: Mode::Async, ..spec() },
            TableSpec { part_elements: 0, ..spec() },
            TableSpec { part_elements: 1 << 20, ..spec() },
            TableSpec { mode: Mode::Sync { workers: u32::MAX }, ..spec() },
            TableSpec { rule: UpdateRule::Sgd(Sgd { nesterov: true, ..Sgd::default() }), ..spec() },
            TableSpec { rule: UpdateRule::Adam(Adam { beta1: f64::NAN, ..Adam::default() }), ..spec() },
            TableSpec { rule: UpdateRule::Adagrad(Adagrad { row_wise: true, ..Adagrad::default() }), ..spec() },
            TableSpec { rule: UpdateRule::Ftrl(Ftrl { learning_rate: 0.0, ..Ftrl::default() }), ..spec() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_are_refused_or_mean_something(at in 0usize..200, byte in any::<u8>()) {
            let mut bytes = body(&spec());
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(spec) = TableSpec::decode(&mut Reader(&bytes)) {
                let _ = spec.check();
            }
        }
    }
}
