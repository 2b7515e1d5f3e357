//! Pure: what many measurements come to.

/// The smallest value that `percent` of `sorted` are not above; 0 of nothing.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// Jain's index of fairness: 1 where all shares are alike, 1/n where one has all (Jain, Chiu, Hawe, DEC-TR-301, 1984).
pub(crate) fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares == 0.0 { 1.0 } else { sum * sum / (shares.len() as f64 * squares) }
}

/// Sorts times, or anything else that is never NaN.
pub(crate) fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            (percentile(&hundred, 50), percentile(&hundred, 99), percentile(&hundred, 100)),
            (50.0, 99.0, 100.0)
        );
        assert_eq!((percentile(&[7.0], 1), percentile(&[7.0], 99), percentile(&[], 50)), (7.0, 7.0, 0.0));
        assert_eq!(sorted(vec![2.0, 1.0, 3.0]), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn fairness_is_one_for_equals_and_a_share_for_a_single_winner() {
        assert_eq!((jain(&[3.0, 3.0, 3.0]), jain(&[1.0, 0.0, 0.0, 0.0]), jain(&[])), (1.0, 0.25, 1.0));
        assert!((jain(&[1.0, 2.0]) - 0.9).abs() < 1e-12);
    }
}
