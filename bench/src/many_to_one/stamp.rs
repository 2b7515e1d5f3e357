//! Pure: what is in a push, so that a byte in the wrong place shows.

/// Bytes of a stamp; a push holds three of them.
const STAMP: usize = 8;
/// The shortest push that can be told apart.
pub(super) const LEAST_BYTES: usize = 4 * STAMP;

/// A push of `sender` before it is stamped.
pub(super) fn pattern(sender: u32, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| byte(sender, at)).collect()
}

/// Marks a push as number `sequence`, at its beginning, middle and end.
pub(super) fn stamp(push: &mut [u8], sender: u32, sequence: u64) {
    for at in places(push.len()) {
        push[at..at + STAMP].copy_from_slice(&mark(sender, sequence, at));
    }
}

/// Whether `push` is number `sequence` of `sender`: by its stamps, or by every byte.
pub(super) fn is_right(push: &[u8], sender: u32, sequence: u64, every_byte: bool) -> bool {
    let places = places(push.len());
    let stamped = places.iter().all(|&at| push[at..at + STAMP] == mark(sender, sequence, at));
    let between = |at: usize| places.iter().any(|&place| (place..place + STAMP).contains(&at));
    stamped && (!every_byte || push.iter().enumerate().all(|(at, &got)| got == byte(sender, at) || between(at)))
}

fn byte(sender: u32, at: usize) -> u8 {
    // 251 is prime: a shift by any power of two shows.
    ((at % 251) as u8).wrapping_add((sender % 256) as u8)
}

fn mark(sender: u32, sequence: u64, at: usize) -> [u8; STAMP] {
    (sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(sender) << 48 ^ at as u64).to_le_bytes()
}

fn places(bytes: usize) -> [usize; 3] {
    [0, (bytes - STAMP) / 2, bytes - STAMP]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_is_told_from_every_other_and_from_one_with_a_wrong_byte() {
        for bytes in [LEAST_BYTES, 100, 4099] {
            let mut push = pattern(3, bytes);
            stamp(&mut push, 3, 7);
            assert!(is_right(&push, 3, 7, true) && is_right(&push, 3, 7, false));
            assert!(!is_right(&push, 3, 8, false) && !is_right(&push, 4, 7, false));
            for at in 0..bytes {
                push[at] ^= 1;
                assert!(!is_right(&push, 3, 7, true), "byte {at} of {bytes}");
                push[at] ^= 1;
            }
        }
    }
}
