//! Pure: the norm of the rows of one push, and the rows multiplied by what brings it down.

use crate::DType;
use crate::exact_sum::ExactSum;
use crate::kernel::Real;

/// Adds the squares of all elements of `rows`, exactly, so that neither their order nor the shards matter.
pub(crate) fn add_squares(dtype: DType, rows: &[u8], sum: &mut ExactSum) {
    match dtype {
        DType::F64 => each::<f64>(dtype, rows, sum),
        _ => each::<f32>(dtype, rows, sum),
    }
}

fn each<C: Real>(dtype: DType, rows: &[u8], sum: &mut ExactSum) {
    let mut block = [C::default(); BLOCK];
    for rows in rows.chunks(BLOCK * dtype.bytes()) {
        let block = &mut block[..rows.len() / dtype.bytes()];
        C::load(dtype, rows, block);
        for &value in &*block {
            let value: f64 = value.into();
            sum.add(value * value);
        }
    }
}

/// Multiplies every element.
pub(crate) fn scale_rows(dtype: DType, rows: &mut [u8], scale: f64) {
    match dtype {
        DType::F64 => scaled::<f64>(dtype, rows, scale),
        _ => scaled::<f32>(dtype, rows, scale),
    }
}

fn scaled<C: Real>(dtype: DType, rows: &mut [u8], scale: f64) {
    let (mut block, scale) = ([C::default(); BLOCK], C::of(scale));
    for rows in rows.chunks_mut(BLOCK * dtype.bytes()) {
        let block = &mut block[..rows.len() / dtype.bytes()];
        C::load(dtype, rows, block);
        block.iter_mut().for_each(|value| *value *= scale);
        C::store(dtype, block, rows);
    }
}

/// Elements that are looked at together.
const BLOCK: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_every_type_have_their_norm_and_are_scaled() {
        let numbers: Vec<f32> = (0..1300).map(|n| if n % 3 == 0 { 2.0 } else { -1.0 }).collect();
        let squares = numbers.iter().map(|number| f64::from(number * number)).sum::<f64>();
        for dtype in DType::ALL {
            let mut rows = vec![0; numbers.len() * dtype.bytes()];
            crate::dense::widen(dtype, &numbers, &mut rows);
            let (cut, mut sum) = (700 * dtype.bytes(), ExactSum::default());
            add_squares(dtype, &rows[cut..], &mut sum);
            add_squares(dtype, &rows[..cut], &mut sum);
            assert_eq!(sum.value(), squares, "{dtype}");
            scale_rows(dtype, &mut rows, 0.25);
            let mut got = vec![0.0; numbers.len()];
            crate::dense::narrow(dtype, &rows, &mut got);
            assert!(got.iter().zip(&numbers).all(|(got, number)| *got == number / 4.0), "{dtype}");
        }
    }
}
