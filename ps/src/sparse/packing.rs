//! Pure: rows that travel compressed: each by itself, so that its bits do not depend on what travels with it, nor on the shards.
//!
//! Nothing that a gradient loses is kept for a later one: a worker would need a second table for it.

use super::batch::{ID_BYTES, PART_BYTES};
use super::spec::SparseSpec;
use crate::DType;
use crate::chunk::PIECE_BYTES;
use crate::codec::{Codec, NotFinite};
use crate::dense::{narrow, widen};
use crate::header::Header;
use crate::refusal::{Reason, Refusal};

/// The longest part of a push, unpacked: it may have to wait for its clock, and then be told as one chunk of a shard's state.
const MOST_UNPACKED: usize = 2 * PIECE_BYTES;

/// Memory that is used again for each part of a push.
#[derive(Default)]
pub(crate) struct Packing {
    row: Vec<f32>,
    bytes: Vec<u8>,
}

impl Packing {
    /// The payload of a push with its rows as `codec` writes them, put behind `out`. `payload` holds `count` rows of `dim` elements of
    /// type `dtype`.
    ///
    /// # Errors
    /// For a row with something that the codec cannot carry: which row, counted from 0, and what.
    pub(crate) fn pack(
        &mut self,
        codec: Codec,
        (dtype, dim): (DType, usize),
        (payload, count): (&[u8], usize),
        out: &mut Vec<u8>,
    ) -> Result<(), (usize, NotFinite)> {
        let (head, rows) = payload.split_at(PART_BYTES + count * ID_BYTES);
        out.extend_from_slice(head);
        self.row.resize(dim, 0.0);
        let each = codec.bytes(dim).expect("what travels as it is was never handed over");
        for (n, row) in rows.chunks_exact(dim * dtype.bytes()).enumerate() {
            narrow(dtype, row, &mut self.row);
            let start = out.len();
            out.resize(start + each, 0);
            codec.encode_gradient(&mut self.row, &mut [], &mut out[start..]).map_err(|bad| (n, bad))?;
        }
        Ok(())
    }

    /// The payload of a push as if it had come uncompressed, its rows as `f32`. No field of it is trusted; its ids and parts are left
    /// to who reads the result.
    pub(crate) fn unpack<'a>(
        &'a mut self,
        header: &Header,
        payload: &'a [u8],
        spec: &SparseSpec,
    ) -> Result<&'a [u8], Refusal> {
        let codec = spec.compression.push;
        if header.payload_codec() == 0 {
            return Ok(payload);
        }
        if header.payload_codec() != codec.code() {
            let got = format!("codec {}", header.payload_codec());
            return Err(Refusal::new(Reason::Mismatch, spec.subject(), "compression", codec, got));
        }
        if header.dtype != Some(DType::F32) {
            let got = header.dtype.map_or("none", DType::name);
            return Err(Refusal::new(Reason::Mismatch, spec.subject(), "dtype", DType::F32, got));
        }
        let malformed =
            |expected: String, got: String| Refusal::new(Reason::Malformed, spec.subject(), "payload", expected, got);
        let dim = usize::try_from(spec.dim).expect("the spec was checked");
        let (row, count) = (codec.bytes(dim).expect("the spec was checked"), header.keys.len());
        let length = |row: usize| {
            count.checked_mul((ID_BYTES + row) as u64).and_then(|bytes| bytes.checked_add(PART_BYTES as u64))
        };
        if length(row) != Some(payload.len() as u64) {
            let expected = format!("{count} rows of {row} bytes with their ids");
            return Err(malformed(expected, format!("{} bytes", payload.len())));
        }
        let whole = length(dim * 4).filter(|&bytes| bytes <= MOST_UNPACKED as u64);
        let whole = whole.ok_or_else(|| {
            malformed(format!("at most {MOST_UNPACKED} bytes unpacked"), format!("{count} rows of {} bytes", dim * 4))
        })?;
        let (head, rows) = payload.split_at(PART_BYTES + count as usize * ID_BYTES);
        for row in rows.chunks_exact(row) {
            let checked = codec.check_gradient(row, dim);
            checked.map_err(|bad| malformed(format!("rows of {dim} elements as {codec}"), bad.to_string()))?;
        }
        self.row.resize(dim, 0.0);
        self.bytes.clear();
        self.bytes.reserve(whole as usize);
        self.bytes.extend_from_slice(head);
        for row in rows.chunks_exact(row) {
            codec.decode(row, &mut self.row);
            let start = self.bytes.len();
            self.bytes.resize(start + dim * 4, 0);
            widen(DType::F32, &self.row, &mut self.bytes[start..]);
        }
        Ok(&self.bytes)
    }
}

/// Rows that were pulled as `codec` writes them, as elements of type `dtype`.
pub(crate) fn unpack_rows(codec: Codec, (dtype, dim): (DType, usize), rows: &[u8]) -> Vec<u8> {
    let each = codec.bytes(dim).expect("what travels as it is was never handed over");
    let mut row = vec![0.0; dim];
    let mut out = vec![0; rows.len() / each * dim * dtype.bytes()];
    for (from, to) in rows.chunks_exact(each).zip(out.chunks_exact_mut(dim * dtype.bytes())) {
        codec.decode(from, &mut row);
        widen(dtype, &row, to);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Kind;
    use crate::sparse::Batch;
    use crate::{Combine, Compression, Initializer, KeyRange, Mode, Recovery, UpdateRule};
    use proptest::prelude::*;

    const CODECS: [Codec; 3] = [Codec::Bf16, Codec::F16, Codec::Int8];

    fn spec(push: Codec, dim: u64, dtype: DType) -> SparseSpec {
        SparseSpec {
            name: "rows".into(),
            dim,
            dtype,
            rule: UpdateRule::Sum,
            mode: Mode::Async,
            combine: Combine::Sum,
            initializer: Initializer::Zeros,
            seed: 0,
            capacity: None,
            eviction: None,
            admission: 1,
            recovery: Recovery::None,
            compression: Compression { push, pull: Codec::Whole },
            max_grad_norm: None,
            shards: 1,
            shard: 0,
        }
    }

    fn header(codec: Codec, count: u64) -> Header {
        let (keys, dtype) = (KeyRange { start: 0, end: count }, Some(DType::F32));
        Header { codec: codec.code(), keys, dtype, ..Header::new(Kind::SparsePush) }
    }

    fn plain(dtype: DType, rows: &[Vec<f32>]) -> Vec<u8> {
        let mut payload = [0u32, 1].into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        payload.extend((0..rows.len() as u64).flat_map(u64::to_le_bytes));
        for row in rows {
            let start = payload.len();
            payload.resize(start + row.len() * dtype.bytes(), 0);
            widen(dtype, row, &mut payload[start..]);
        }
        payload
    }

    fn packed(codec: Codec, dtype: DType, rows: &[Vec<f32>]) -> Vec<u8> {
        let mut out = Vec::new();
        let payload = (&plain(dtype, rows)[..], rows.len());
        Packing::default().pack(codec, (dtype, rows[0].len()), payload, &mut out).expect("all of them are finite");
        out
    }

    fn rows_of(dim: usize) -> impl Strategy<Value = Vec<Vec<f32>>> {
        proptest::collection::vec(proptest::collection::vec(-100f32..100.0, dim), 1..6)
    }

    proptest! {
        #[test]
        fn rows_come_out_near_what_they_were_whatever_travels_with_them(
            rows in (2usize..300).prop_flat_map(rows_of), wide in any::<bool>(),
        ) {
            let (dim, dtype) = (rows[0].len(), if wide { DType::F64 } else { DType::F32 });
            for codec in CODECS {
                let bytes = packed(codec, dtype, &rows);
                prop_assert!(bytes.len() < plain(DType::F32, &rows).len());
                let (spec, mut packing) = (spec(codec, dim as u64, dtype), Packing::default());
                let out = packing.unpack(&header(codec, rows.len() as u64), &bytes, &spec).unwrap();
                let batch = Batch::of(out, &Header { codec: 0, ..header(codec, rows.len() as u64) }, &spec).unwrap();
                for (row, got) in rows.iter().zip(batch.rows.chunks(dim * 4)) {
                    let mut numbers = vec![0.0; dim];
                    narrow(DType::F32, got, &mut numbers);
                    for (block, got) in row.chunks(128).zip(numbers.chunks(128)) {
                        let largest = block.iter().fold(0f32, |most, value| most.max(value.abs()));
                        for (value, got) in block.iter().zip(got) {
                            let bound = match codec {
                                Codec::Bf16 => value.abs() / 256.0,
                                Codec::F16 => value.abs() / 2048.0 + 6e-8,
                                _ => largest / 253.9,
                            };
                            prop_assert!((value - got).abs() <= bound, "{codec}: {value} {got}");
                        }
                    }
                }
                let alone = packed(codec, dtype, &rows[..1]);
                let each = codec.bytes(dim).unwrap();
                prop_assert_eq!(&alone[PART_BYTES + ID_BYTES..], &bytes[PART_BYTES + rows.len() * ID_BYTES..][..each]);
                let values = &bytes[PART_BYTES + rows.len() * ID_BYTES..];
                prop_assert_eq!(unpack_rows(codec, (DType::F32, dim), values), batch.rows);
            }
        }

        #[test]
        fn payloads_of_any_kind_are_refused_or_are_rows(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), count in any::<u64>(), few in 0u64..5, dim in 2u64..40,
        ) {
            for codec in CODECS {
                let exact = (PART_BYTES + few as usize * (ID_BYTES + codec.bytes(dim as usize).unwrap())).max(1);
                let fitting: Vec<u8> = bytes.iter().copied().cycle().take(if bytes.is_empty() { 0 } else { exact }).collect();
                for (count, bytes) in [(count, &bytes), (few, &bytes), (few, &fitting)] {
                    let mut packing = Packing::default();
                    if let Ok(out) = packing.unpack(&header(codec, count), bytes, &spec(codec, dim, DType::F32)) {
                        prop_assert_eq!(out.len() as u64, PART_BYTES as u64 + count * (ID_BYTES as u64 + 4 * dim));
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_the_table_is_refused_by_name() {
        let spec = spec(Codec::Int8, 200, DType::F32);
        let bytes = packed(Codec::Int8, DType::F32, &[vec![1.0; 200], vec![2.0; 200]]);
        let mut packing = Packing::default();
        let good = header(Codec::Int8, 2);
        let mut refused = |header: &Header, payload: &[u8]| packing.unpack(header, payload, &spec).unwrap_err();
        let other = refused(&header(Codec::Bf16, 2), &bytes);
        assert_eq!((other.reason, other.what.as_str()), (Reason::Mismatch, "compression"));
        let dtype = refused(&Header { dtype: Some(DType::BF16), ..good }, &bytes);
        assert_eq!((dtype.reason, dtype.what.as_str()), (Reason::Mismatch, "dtype"));
        for short in [&bytes[1..], &[bytes.as_slice(), &[0]].concat()] {
            assert_eq!(refused(&good, short).reason, Reason::Malformed);
        }
        for scale in [f32::NAN, f32::INFINITY, f32::MAX, -1.0] {
            let mut bad = bytes.clone();
            bad[PART_BYTES + 2 * ID_BYTES + 208..][..4].copy_from_slice(&scale.to_le_bytes());
            assert!(refused(&good, &bad).got.starts_with("a scale of"));
        }
        let many = vec![0; PART_BYTES + 3000 * (ID_BYTES + 208)];
        assert!(refused(&header(Codec::Int8, 3000), &many).expected.contains("unpacked"));
        let not_finite = plain(DType::F32, &[vec![0.0; 4], vec![0.0, 1.0, f32::NAN, 0.0]]);
        let (n, bad) = packing.pack(Codec::Int8, (DType::F32, 4), (&not_finite, 2), &mut Vec::new()).unwrap_err();
        assert_eq!((n, bad.index), (1, 2));
    }
}
