//! Pure: sizes as people write them.

/// Reads `4096`, `64k`, `1m` or `1g` (powers of 1024).
pub(crate) fn parse(text: &str) -> Result<usize, String> {
    let wrong = || format!("{text:?} is no size: write 4096, 64k, 1m or 1g");
    let (digits, shift) = match text.to_ascii_lowercase().strip_suffix(['k', 'm', 'g']) {
        None => (text.to_owned(), 0),
        Some(digits) => {
            let shift = match text.to_ascii_lowercase().as_bytes().last() {
                Some(b'k') => 10,
                Some(b'm') => 20,
                _ => 30,
            };
            (digits.to_owned(), shift)
        }
    };
    let number: usize = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes <= 1 << 40).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_unit() {
        assert_eq!(
            (parse("4096"), parse("64k"), parse("1M"), parse("2g")),
            (Ok(4096), Ok(65536), Ok(1 << 20), Ok(2 << 30))
        );
        for wrong in ["", "k", "1x", "-1", "99999999g", "1.5m"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
