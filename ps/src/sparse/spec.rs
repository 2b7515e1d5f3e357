//! Pure: what a sparse table is: everything that its clients must agree on, and how it travels.

use super::Initializer;
use super::admission;
use crate::body::{BadBody, Reader, Writer};
use crate::header::Header;
use crate::key::MAX_NAME_BYTES;
use crate::refusal::{Reason, Refusal};
use crate::{Codec, Combine, Compression, DType, Mode, Recovery, Sgd, TableId, UpdateRule};
use std::fmt;
use std::time::Duration;

/// Longest row of a sparse table, in elements: the longest still fits a message.
pub const MAX_DIM: u64 = 1 << 16;

/// Which rows make room for others. A push is a use; a pull is none, so that readers change nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Eviction {
    /// The one that was used least lately.
    Lru,
    /// The one that was used least often (beyond 255 uses all count alike); of those the least lately.
    Lfu,
    /// Whatever was not used for so long, in steps of 0.1 s; where there is a capacity too, the least lately used.
    Ttl(Duration),
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lru => write!(f, "lru"),
            Self::Lfu => write!(f, "lfu"),
            Self::Ttl(lifetime) => write!(f, "ttl({} s)", lifetime.as_secs_f64()),
        }
    }
}

/// A sparse table, as every client of it describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseSpec {
    /// Its name, the same for everybody.
    pub name: String,
    /// Elements of a row.
    pub dim: u64,
    /// The type in which rows are pulled. They are kept in 32 bits (64 for float64), so that updates lose nothing.
    pub dtype: DType,
    /// What is done with gradients. Adam counts a table's steps, as `torch.optim.SparseAdam` does.
    pub rule: UpdateRule,
    /// How pushes of several clients meet.
    pub mode: Mode,
    /// How contributions become one gradient.
    pub combine: Combine,
    /// What a row holds at first.
    pub initializer: Initializer,
    /// Tells the first values of one training from those of another.
    pub seed: u64,
    /// Most rows over all shards; none: as many as there is memory for.
    pub capacity: Option<u64>,
    /// Which rows make room; none: a push that would need more room is refused.
    pub eviction: Option<Eviction>,
    /// How many pushes an id must come in before it gets a row; until then its gradients are dropped. From 1.
    pub admission: u8,
    /// What becomes of it when a server dies.
    pub recovery: Recovery,
    /// How its rows' gradients and values travel. Each row travels by itself, and nothing that it loses is kept for a later one.
    pub compression: Compression,
    /// Each push is multiplied by what brings the norm of its rows, over all shards, down to this; by the worker, before it travels.
    pub max_grad_norm: Option<f64>,
    /// Number of shards that it is cut over.
    pub shards: u32,
    /// Which of them the receiver is.
    pub shard: u32,
}

impl SparseSpec {
    /// The table's id on the wire.
    pub fn id(&self) -> TableId {
        TableId::of(&self.name)
    }

    /// Most rows of this shard. Without eviction each may hold somewhat more than its part, as ids are spread by chance.
    pub fn share(&self) -> Option<u64> {
        let (capacity, shards) = (self.capacity?, u64::from(self.shards.max(1)));
        let even = capacity.div_ceil(shards);
        // Six standard deviations.
        let spread = if shards == 1 || self.eviction.is_some() { 0 } else { 6 * even.isqrt() + 8 };
        Some(even.saturating_add(spread).min(capacity))
    }

    /// Bytes of a row in the answer that `header` asks for.
    pub(crate) fn answer_row_bytes(&self, header: &Header) -> usize {
        let dim = usize::try_from(self.dim).unwrap_or(usize::MAX);
        let packed = self.compression.pull.bytes(dim).filter(|_| header.answer_codec() != 0);
        packed.unwrap_or(dim * self.dtype.bytes())
    }

    fn check_compression(&self) -> Result<(), (&'static str, String)> {
        let Compression { push, pull } = self.compression;
        if let Codec::TopK { .. } = push {
            let why = "which picks elements out of a whole gradient, where ids have picked the rows already";
            return Err(("bf16, fp16 or int8", format!("{push}, {why}")));
        }
        self.compression.check().map_err(|got| ("what a table may have", got))?;
        let dim = usize::try_from(self.dim).unwrap_or(usize::MAX);
        for (codec, each) in [(push, DType::F32.bytes()), (pull, self.dtype.bytes())] {
            if codec.bytes(dim).is_some_and(|bytes| bytes > dim * each) {
                return Err((
                    "what makes its rows shorter",
                    format!("{codec} for rows of {dim} elements of {each} bytes"),
                ));
            }
        }
        Ok(())
    }

    /// Says what cannot be, if anything.
    pub fn check(&self) -> Result<(), Refusal> {
        let wrong = |what: &str, expected: String, got: String| {
            Err(Refusal::new(Reason::Malformed, self.subject(), what, expected, got))
        };
        if self.name.is_empty() || self.name.len() > MAX_NAME_BYTES {
            return wrong("length of its name", format!("1 to {MAX_NAME_BYTES} bytes"), self.name.len().to_string());
        }
        if !(1..=MAX_DIM).contains(&self.dim) {
            return wrong("elements of a row", format!("1 to {MAX_DIM}"), self.dim.to_string());
        }
        if self.shards == 0 || self.shard >= self.shards {
            return wrong("shard", "one of its shards".to_owned(), format!("{} of {}", self.shard, self.shards));
        }
        if let Err(got) = self.recovery.check_numbers() {
            return wrong("recovery", "one that a sparse table can have".to_owned(), got);
        }
        if self.recovery == Recovery::Workers {
            let got = "workers, none of whom has all rows".to_owned();
            return wrong("recovery", "one that a sparse table can have".to_owned(), got);
        }
        if let Some(most) = self.max_grad_norm.filter(|most| !(most.is_finite() && *most > 0.0)) {
            return wrong("largest norm", "a number over 0".to_owned(), most.to_string());
        }
        if let Err((expected, got)) = self.check_compression() {
            return wrong("compression", expected.to_owned(), got);
        }
        if let Err(workers) = self.mode.check() {
            return wrong("workers", "as many as can be told apart".to_owned(), workers);
        }
        if !(1..=admission::MOST).contains(&self.admission) {
            return wrong("admission", format!("1 to {} pushes", admission::MOST), self.admission.to_string());
        }
        match (self.capacity, self.eviction) {
            (Some(0), _) => return wrong("capacity", "at least 1 row".to_owned(), "0".to_owned()),
            (None, Some(eviction @ (Eviction::Lru | Eviction::Lfu))) => {
                return wrong("capacity", format!("one, for {eviction} to keep to"), "none".to_owned());
            }
            (_, Some(Eviction::Ttl(lifetime))) if lifetime < Duration::from_millis(100) => {
                return wrong("time to live", "at least 0.1 s".to_owned(), format!("{lifetime:?}"));
            }
            _ => {}
        }
        if let UpdateRule::Sgd(Sgd { momentum, .. }) = self.rule
            && momentum != 0.0
        {
            return wrong(
                "momentum",
                "0: rows that come seldom would move on old ones".to_owned(),
                momentum.to_string(),
            );
        }
        let numbers = self.initializer.check().and_then(|()| self.rule.check());
        numbers.or_else(|reason| wrong("rule or initializer", "numbers that make sense".to_owned(), reason))
    }

    /// What `other` has different, first of all; learning rates may differ, as they change while training.
    pub fn disagreement(&self, other: &Self) -> Option<Refusal> {
        let differ = |what: &str, expected: String, got: String| {
            (expected != got).then(|| Refusal::new(Reason::Mismatch, self.subject(), what, expected, got))
        };
        let at_rest = |rule: UpdateRule| rule.with_learning_rate(0.0).to_string();
        let evicts = |spec: &Self| spec.eviction.map_or("none".to_owned(), |eviction| eviction.to_string());
        let clips = |spec: &Self| spec.max_grad_norm.map_or("none".to_owned(), |most| most.to_string());
        let holds = |spec: &Self| spec.capacity.map_or("none".to_owned(), |capacity| capacity.to_string());
        differ("name (two names have the same id: rename one)", self.name.clone(), other.name.clone())
            .or_else(|| differ("elements of a row", self.dim.to_string(), other.dim.to_string()))
            .or_else(|| differ("dtype", self.dtype.to_string(), other.dtype.to_string()))
            .or_else(|| differ("update rule", at_rest(self.rule), at_rest(other.rule)))
            .or_else(|| differ("mode", self.mode.to_string(), other.mode.to_string()))
            .or_else(|| differ("combine", format!("{:?}", self.combine), format!("{:?}", other.combine)))
            .or_else(|| differ("recovery", self.recovery.to_string(), other.recovery.to_string()))
            .or_else(|| differ("compression", self.compression.to_string(), other.compression.to_string()))
            .or_else(|| differ("largest norm", clips(self), clips(other)))
            .or_else(|| differ("initializer", self.initializer.to_string(), other.initializer.to_string()))
            .or_else(|| differ("seed", self.seed.to_string(), other.seed.to_string()))
            .or_else(|| differ("capacity", holds(self), holds(other)))
            .or_else(|| differ("eviction", evicts(self), evicts(other)))
            .or_else(|| differ("admission", self.admission.to_string(), other.admission.to_string()))
            .or_else(|| differ("number of servers", self.shards.to_string(), other.shards.to_string()))
            .or_else(|| differ("place in the list of servers", self.shard.to_string(), other.shard.to_string()))
    }

    /// The table as a refusal names it.
    pub fn subject(&self) -> String {
        format!("sparse table {:?}", self.name)
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.text(&self.name);
        out.number(self.dim);
        out.byte(self.dtype.code());
        self.rule.encode(out);
        self.mode.encode(out);
        out.byte((self.combine == Combine::Mean).into());
        self.initializer.encode(out);
        out.number(self.seed);
        out.number(self.capacity.map_or(u64::MAX, |capacity| capacity));
        let (kind, lifetime) = match self.eviction {
            None => (0, Duration::ZERO),
            Some(Eviction::Lru) => (1, Duration::ZERO),
            Some(Eviction::Lfu) => (2, Duration::ZERO),
            Some(Eviction::Ttl(lifetime)) => (3, lifetime),
        };
        out.byte(kind);
        out.number(u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX));
        out.byte(self.admission);
        self.recovery.encode(out);
        self.compression.push.write(out);
        self.compression.pull.write(out);
        out.float(self.max_grad_norm.unwrap_or(0.0));
        out.number(self.shards.into());
        out.number(self.shard.into());
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let name = from.text()?.to_owned();
        let dim = from.number()?;
        let dtype = DType::of_code(from.byte()?).ok_or(BadBody("no such dtype"))?;
        let rule = UpdateRule::decode(from)?;
        let mode = Mode::decode(from)?;
        let combine = Combine::decode(from)?;
        let initializer = Initializer::decode(from)?;
        let seed = from.number()?;
        let capacity = Some(from.number()?).filter(|&capacity| capacity != u64::MAX);
        let (kind, lifetime_ms) = (from.byte()?, from.number()?);
        let eviction = match kind {
            0 => None,
            1 => Some(Eviction::Lru),
            2 => Some(Eviction::Lfu),
            3 => Some(Eviction::Ttl(Duration::from_millis(lifetime_ms))),
            _ => return Err(BadBody("no such eviction")),
        };
        let admission = from.byte()?;
        let recovery = Recovery::decode(from)?;
        let compression = Compression { push: Codec::read(from)?, pull: Codec::read(from)? };
        let max_grad_norm = Some(from.float()?).filter(|&most| most != 0.0);
        let mut small = || u32::try_from(from.number()?).map_err(|_| BadBody("a number is too large"));
        let (shards, shard) = (small()?, small()?);
        Ok(Self {
            name,
            dim,
            dtype,
            rule,
            mode,
            combine,
            initializer,
            seed,
            capacity,
            eviction,
            admission,
            recovery,
            compression,
            max_grad_norm,
            shards,
            shard,
        })
    }
}

/// The body that opens the sparse table `spec`.
pub fn open_sparse_body(spec: &SparseSpec) -> Vec<u8> {
    let mut out = Writer::default();
    spec.encode(&mut out);
    out.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Adagrad;
    use proptest::prelude::*;

    fn spec() -> SparseSpec {
        SparseSpec {
            name: "users".into(),
            dim: 16,
            dtype: DType::F32,
            rule: UpdateRule::Adagrad(Adagrad { row_wise: true, ..Adagrad::default() }),
            mode: Mode::Ssp { workers: 3, staleness: 2 },
            combine: Combine::Mean,
            initializer: Initializer::Normal { mean: 0.0, deviation: 0.01 },
            seed: 5,
            capacity: Some(1000),
            eviction: Some(Eviction::Ttl(Duration::from_secs(60))),
            admission: 2,
            recovery: Recovery::None,
            compression: Compression { push: Codec::Int8, pull: Codec::Bf16 },
            max_grad_norm: Some(1.5),
            shards: 3,
            shard: 1,
        }
    }

    #[test]
    fn a_spec_comes_back_as_it_was_and_no_piece_of_it_does() {
        for eviction in [None, Some(Eviction::Lru), Some(Eviction::Lfu), spec().eviction] {
            for capacity in [None, Some(7)] {
                let spec = SparseSpec { eviction, capacity, ..spec() };
                let mut out = Writer::default();
                spec.encode(&mut out);
                let mut from = Reader(&out.0);
                assert_eq!(SparseSpec::decode(&mut from), Ok(spec));
                assert_eq!(from.end(), Ok(()));
                for cut in 0..out.0.len() {
                    assert!(SparseSpec::decode(&mut Reader(&out.0[..cut])).is_err());
                }
                for at in 0..out.0.len() {
                    let mut bytes = out.0.clone();
                    bytes[at] ^= 0xff;
                    let _ = SparseSpec::decode(&mut Reader(&bytes)).map(|spec| spec.check());
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(spec().check(), Ok(()));
        let momentum = Sgd { momentum: 0.9, ..Sgd::default() };
        for bad in [
            SparseSpec { name: String::new(), ..spec() },
            SparseSpec { dim: 0, ..spec() },
            SparseSpec { dim: MAX_DIM + 1, ..spec() },
            SparseSpec { shard: 3, ..spec() },
            SparseSpec { mode: Mode::Ssp { workers: 0, staleness: 1 }, ..spec() },
            SparseSpec { admission: 0, ..spec() },
            SparseSpec { admission: 255, ..spec() },
            SparseSpec { capacity: Some(0), ..spec() },
            SparseSpec { capacity: None, eviction: Some(Eviction::Lru), ..spec() },
            SparseSpec { eviction: Some(Eviction::Ttl(Duration::ZERO)), ..spec() },
            SparseSpec { rule: UpdateRule::Sgd(momentum), ..spec() },
            SparseSpec { initializer: Initializer::Constant(f64::INFINITY), ..spec() },
            SparseSpec { compression: Compression { push: Codec::TopK { share: 0.1 }, pull: Codec::Whole }, ..spec() },
            SparseSpec { compression: Compression { push: Codec::Whole, pull: Codec::TopK { share: 0.1 } }, ..spec() },
            SparseSpec { dim: 1, ..spec() },
            SparseSpec { max_grad_norm: Some(-1.0), ..spec() },
            SparseSpec { max_grad_norm: Some(f64::NAN), ..spec() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert_eq!(spec().disagreement(&spec()), None);
        let refusal = spec().disagreement(&SparseSpec { seed: 6, ..spec() }).unwrap();
        assert_eq!((refusal.what.as_str(), refusal.got.as_str()), ("seed", "6"));
        let refusal = spec().disagreement(&SparseSpec { compression: Compression::NONE, ..spec() }).unwrap();
        assert_eq!((refusal.what.as_str(), refusal.got.as_str()), ("compression", "push none, pull none"));
        let refusal = spec().disagreement(&SparseSpec { max_grad_norm: None, ..spec() }).unwrap();
        assert_eq!((refusal.what.as_str(), refusal.got.as_str()), ("largest norm", "none"));
    }

    #[test]
    fn shares_hold_the_capacity_and_not_much_more() {
        for shards in 1..9 {
            let share = |eviction| SparseSpec { shards, shard: 0, eviction, ..spec() }.share().unwrap();
            assert!(share(Some(Eviction::Lru)) * u64::from(shards) >= 1000);
            assert!(share(Some(Eviction::Lru)) <= share(None) && share(None) <= 1000);
        }
    }

    proptest! {
        #[test]
        fn a_spec_that_was_changed_is_refused_or_read_as_another(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
            noise in proptest::collection::vec(any::<u8>(), 0..120),
        ) {
            let mut bytes = Writer::default();
            spec().encode(&mut bytes);
            let mut bytes = bytes.0;
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            for bytes in [bytes, noise] {
                // Whatever it is, it is judged without a panic, and a good one can be told again.
                if let Ok(spec) = SparseSpec::decode(&mut Reader(&bytes))
                    && spec.check().is_ok()
                {
                    let mut told = Writer::default();
                    spec.encode(&mut told);
                    prop_assert_eq!(SparseSpec::decode(&mut Reader(&told.0)), Ok(spec));
                }
            }
        }
    }
}
