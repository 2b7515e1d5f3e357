//! Pure: gradients that came compressed, as elements again: checked first, since they come from anywhere.

use crate::header::Header;
use crate::refusal::{Reason, Refusal};
use crate::{Codec, DType, TableSpec};

/// Memory that is used again for each of them.
#[derive(Default)]
pub(crate) struct Unpacking {
    numbers: Vec<f32>,
}

impl Unpacking {
    /// The elements of a gradient, as `f32`.
    pub(crate) fn gradient(&mut self, header: &Header, payload: &[u8], spec: &TableSpec) -> Result<&[u8], Refusal> {
        let codec = spec.compression.push;
        if header.payload_codec() != codec.code() {
            let got = format!("codec {}", header.payload_codec());
            return Err(Refusal::new(Reason::Mismatch, spec.subject(), "compression", codec, got));
        }
        if header.dtype != Some(DType::F32) {
            let got = header.dtype.map_or("none", DType::name);
            return Err(Refusal::new(Reason::Mismatch, spec.subject(), "dtype", DType::F32, got));
        }
        let elements = usize::try_from(header.keys.len()).expect("a part is small");
        codec.check_gradient(payload, elements).map_err(|bad| {
            let expected = format!("{elements} elements as {codec}");
            Refusal::new(Reason::Malformed, spec.subject(), "payload", expected, bad)
        })?;
        self.numbers.resize(elements, 0.0);
        codec.decode(payload, &mut self.numbers);
        if cfg!(target_endian = "big") {
            self.numbers.iter_mut().for_each(|number| *number = f32::from_bits(number.to_bits().to_le()));
        }
        Ok(bytemuck::cast_slice(&self.numbers))
    }
}

/// Checks that the answer is wanted as the table's values travel, or whole.
pub(crate) fn check_answer_codec(
    header: &Header,
    codec: Codec,
    subject: impl FnOnce() -> String,
) -> Result<(), Refusal> {
    let wanted = header.answer_codec();
    if wanted == 0 || wanted == codec.code() {
        return Ok(());
    }
    Err(Refusal::new(Reason::Mismatch, subject(), "compression of the answer", codec, format!("codec {wanted}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Kind;
    use crate::{Combine, Compression, KeyRange, Mode, UpdateRule};
    use proptest::prelude::*;

    fn spec(push: Codec) -> TableSpec {
        TableSpec {
            name: "w".into(),
            shape: vec![200],
            dtype: DType::F64,
            rule: UpdateRule::Sum,
            mode: Mode::Async,
            combine: Combine::Sum,
            clipped: false,
            recovery: crate::Recovery::None,
            compression: Compression { push, pull: Codec::Bf16 },
            shards: 1,
            shard: 0,
            part_elements: 200,
        }
    }

    fn header(codec: u8, payload: &[u8]) -> Header {
        let (keys, dtype) = (KeyRange { start: 0, end: 200 }, Some(DType::F32));
        Header { codec, keys, dtype, payload_bytes: payload.len() as u64, ..Header::new(Kind::Push) }
    }

    #[test]
    fn what_does_not_fit_the_table_is_refused_by_name() {
        let payload = vec![0; Codec::Int8.bytes(200).unwrap()];
        let mut unpacking = Unpacking::default();
        let good = header(3, &payload);
        assert_eq!(unpacking.gradient(&good, &payload, &spec(Codec::Int8)), Ok(&[0; 800][..]));
        let mut refused =
            |header: &Header, payload: &[u8]| unpacking.gradient(header, payload, &spec(Codec::Int8)).unwrap_err();
        let other = refused(&header(1, &payload), &payload);
        assert_eq!((other.reason, other.what.as_str()), (Reason::Mismatch, "compression"));
        let dtype = refused(&Header { dtype: Some(DType::F64), ..good }, &payload);
        assert_eq!((dtype.reason, dtype.what.as_str()), (Reason::Mismatch, "dtype"));
        let short = refused(&good, &payload[1..]);
        assert_eq!((short.reason, short.got.as_str()), (Reason::Malformed, "207 bytes, where 208 are wanted"));
        for scale in [f32::NAN, f32::INFINITY, f32::MAX, -1.0] {
            let mut bad = payload.clone();
            bad[132..136].copy_from_slice(&scale.to_le_bytes());
            assert!(refused(&good, &bad).got.starts_with("a scale of"));
        }
        for (codec, fits) in [(0, true), (1 << 4, true), (3 << 4, false)] {
            let asked = check_answer_codec(&header(codec, &[]), Codec::Bf16, || "w".to_owned());
            assert_eq!(asked.is_ok(), fits);
        }
    }

    proptest! {
        #[test]
        fn payloads_of_any_kind_are_refused_or_are_elements(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            for codec in [Codec::Bf16, Codec::F16, Codec::Int8, Codec::TopK { share: 0.1 }] {
                let taken = Unpacking::default().gradient(&header(codec.code(), &bytes), &bytes, &spec(codec)).map(<[u8]>::len);
                prop_assert!(taken.is_err() || taken == Ok(800));
            }
        }
    }
}
