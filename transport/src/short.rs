//! Pure: copies of a few bytes in place, where the call of a function for it would cost more than the copy.

/// Copies `from` into `into`, which is as long.
#[inline(always)]
pub(crate) fn copy(into: &mut [u8], from: &[u8]) {
    let bytes = from.len();
    match (bytes, from.first_chunk::<8>(), from.last_chunk::<8>()) {
        // Two words, which overlap where there are fewer bytes.
        (8..=16, Some(first), Some(last)) => {
            into[bytes - 8..bytes].copy_from_slice(last);
            into[..8].copy_from_slice(first);
        }
        _ => into[..bytes].copy_from_slice(from),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn copies_of_every_short_length_are_whole_and_touch_nothing_else() {
        let from: Vec<u8> = (1..=40).collect();
        for bytes in 0..=from.len() {
            let mut into = [0; 48];
            super::copy(&mut into, &from[..bytes]);
            assert_eq!((&into[..bytes], &into[bytes..]), (&from[..bytes], &[0; 48][bytes..]));
        }
    }
}
