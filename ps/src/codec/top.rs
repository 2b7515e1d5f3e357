//! Pure: the largest elements alone: how many, where (in order), and what they are.

use super::BadPayload;

const HEAD_BYTES: usize = 4;
const EACH_BYTES: usize = 8;

/// How many elements travel.
pub(super) fn kept(share: f64, elements: usize) -> usize {
    ((share * elements as f64).ceil() as usize).clamp(1.min(elements), elements)
}

pub(super) fn bytes(kept: usize) -> usize {
    HEAD_BYTES + EACH_BYTES * kept
}

/// Writes the largest of `values`, the first ones where several are as large, and leaves the others in `residual`.
pub(super) fn encode(share: f64, values: &[f32], residual: &mut [f32], to: &mut [u8]) {
    let kept = kept(share, values.len());
    let (head, rest) = to.split_at_mut(HEAD_BYTES);
    head.copy_from_slice(&u32::try_from(kept).expect("a part is small").to_le_bytes());
    let (places, numbers) = rest.split_at_mut(4 * kept);
    residual.copy_from_slice(values);
    if kept == 0 {
        return;
    }
    let mut magnitudes: Vec<u32> = values.iter().map(|value| magnitude(*value)).collect();
    let (_, threshold, larger) = magnitudes.select_nth_unstable(values.len() - kept);
    let threshold = *threshold;
    let mut equal = kept - larger.iter().filter(|&&larger| larger > threshold).count();
    let mut room = places.as_chunks_mut().0.iter_mut().zip(numbers.as_chunks_mut().0);
    for (at, (value, residual)) in values.iter().zip(residual).enumerate() {
        let mine = magnitude(*value);
        if mine < threshold || (mine == threshold && equal == 0) {
            continue;
        }
        equal -= usize::from(mine == threshold);
        let Some((place, number)) = room.next() else { return };
        *place = u32::try_from(at).expect("a part is small").to_le_bytes();
        *number = value.to_le_bytes();
        *residual = 0.0;
    }
}

pub(super) fn decode(payload: &[u8], to: &mut [f32]) {
    to.fill(0.0);
    let (places, numbers) = payload[HEAD_BYTES..].split_at((payload.len() - HEAD_BYTES) / 2);
    for (place, number) in places.as_chunks().0.iter().zip(numbers.as_chunks().0) {
        to[u32::from_le_bytes(*place) as usize] = f32::from_le_bytes(*number);
    }
}

/// Checks a payload that may be anything.
pub(super) fn check(payload: &[u8], elements: usize) -> Result<(), BadPayload> {
    let short = BadPayload::Length { expected: HEAD_BYTES, got: payload.len() };
    let (head, rest) = payload.split_first_chunk::<HEAD_BYTES>().ok_or(short)?;
    let kept = u32::from_le_bytes(*head) as usize;
    if kept > elements {
        return Err(BadPayload::Count { kept, elements });
    }
    if rest.len() != EACH_BYTES * kept {
        return Err(BadPayload::Length { expected: bytes(kept), got: payload.len() });
    }
    let (places, numbers) = rest.split_at(4 * kept);
    let mut before = None;
    for (place, number) in places.as_chunks().0.iter().zip(numbers.as_chunks().0) {
        let index = u32::from_le_bytes(*place) as usize;
        if index >= elements || before.is_some_and(|before| before >= index) {
            return Err(BadPayload::Index { index, before: before.unwrap_or(0), elements });
        }
        let value = f32::from_le_bytes(*number);
        if !value.is_finite() {
            return Err(BadPayload::Value { index, value });
        }
        before = Some(index);
    }
    Ok(())
}

fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(share: f64, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let mut to = vec![0; bytes(kept(share, values.len()))];
        let mut residual = vec![9.0; values.len()];
        encode(share, values, &mut residual, &mut to);
        (to, residual)
    }

    #[test]
    fn the_largest_go_and_of_equal_ones_the_first() {
        let (bytes, residual) = encoded(0.5, &[1.0, -3.0, 1.0, 1.0, 0.0, 2.0]);
        let mut got = [9.0; 6];
        decode(&bytes, &mut got);
        assert_eq!(got, [1.0, -3.0, 0.0, 0.0, 0.0, 2.0]);
        assert_eq!(residual, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!((kept(0.01, 1), kept(0.01, 1000), kept(1.0, 7), kept(0.5, 0)), (1, 10, 7, 0));
        assert_eq!(encoded(0.1, &[0.0; 4]).0.len(), 12);
    }

    #[test]
    fn a_made_up_payload_is_refused_by_what_is_wrong() {
        let (good, _) = encoded(0.5, &[4.0, 3.0, 2.0, 1.0]);
        assert_eq!(check(&good, 4), Ok(()));
        assert_eq!(check(&good, 1), Err(BadPayload::Count { kept: 2, elements: 1 }));
        assert!(matches!(check(&good[..3], 4), Err(BadPayload::Length { .. })));
        assert!(matches!(check(&good[..19], 4), Err(BadPayload::Length { .. })));
        let with = |at: usize, bytes: [u8; 4]| {
            let mut bad = good.clone();
            bad[at..at + 4].copy_from_slice(&bytes);
            check(&bad, 4)
        };
        assert!(matches!(with(0, [255; 4]), Err(BadPayload::Count { .. })));
        assert!(matches!(with(8, 4u32.to_le_bytes()), Err(BadPayload::Index { index: 4, .. })));
        assert!(matches!(with(8, 0u32.to_le_bytes()), Err(BadPayload::Index { index: 0, .. })));
        assert!(matches!(with(12, f32::NAN.to_le_bytes()), Err(BadPayload::Value { index: 0, .. })));
    }
}
