//! Pure: the types of a tensor's elements.

use std::fmt;

/// Type of the elements of a tensor, in the machine's (little-endian) byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // The names say it all.
pub enum DType {
    F32,
    F64,
    F16,
    BF16,
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    /// One byte, 0 or 1.
    Bool,
    /// An 8-bit float that is none of those below: moved, never reduced.
    F8,
    /// Two `F32`: moved, never reduced (reduce it as twice as many `F32`).
    C64,
    /// Two `F64`: as above.
    C128,
    /// Two `F16`: as above.
    C32,
    F8E4M3Fn,
    F8E5M2,
    F8E4M3FnUz,
    F8E5M2FnUz,
}

/// Every type, in the order of their codes.
const ALL: [(DType, usize, &str); 21] = [
    (DType::F32, 4, "float32"),
    (DType::F64, 8, "float64"),
    (DType::F16, 2, "float16"),
    (DType::BF16, 2, "bfloat16"),
    (DType::I8, 1, "int8"),
    (DType::U8, 1, "uint8"),
    (DType::I16, 2, "int16"),
    (DType::U16, 2, "uint16"),
    (DType::I32, 4, "int32"),
    (DType::U32, 4, "uint32"),
    (DType::I64, 8, "int64"),
    (DType::U64, 8, "uint64"),
    (DType::Bool, 1, "bool"),
    (DType::F8, 1, "float8"),
    (DType::C64, 8, "complex64"),
    (DType::C128, 16, "complex128"),
    (DType::C32, 4, "complex32"),
    (DType::F8E4M3Fn, 1, "float8_e4m3fn"),
    (DType::F8E5M2, 1, "float8_e5m2"),
    (DType::F8E4M3FnUz, 1, "float8_e4m3fnuz"),
    (DType::F8E5M2FnUz, 1, "float8_e5m2fnuz"),
];

impl DType {
    /// Size of an element.
    pub const fn bytes(self) -> usize {
        ALL[self as usize].1
    }

    /// Its name, as NumPy and PyTorch have it.
    pub const fn name(self) -> &'static str {
        ALL[self as usize].2
    }

    /// Whether it is a float so short that sums of it are made in `f32`, and rounded.
    pub const fn is_short_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F8E4M3Fn | Self::F8E5M2 | Self::F8E4M3FnUz | Self::F8E5M2FnUz)
    }

    /// Whether the order in which its elements are summed shows in the sum.
    pub const fn is_float(self) -> bool {
        self.is_short_float() || matches!(self, Self::F32 | Self::F64)
    }

    /// A small number for it.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The type of a code.
    pub fn from_code(code: u8) -> Option<Self> {
        ALL.get(usize::from(code)).map(|(dtype, ..)| *dtype)
    }

    /// The type of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        ALL.iter().find(|(.., known)| *known == name).map(|(dtype, ..)| *dtype)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_lead_back() {
        for (code, (dtype, _, name)) in (0u8..).zip(ALL) {
            assert_eq!(
                (dtype.code(), DType::from_code(code), DType::from_name(name)),
                (code, Some(dtype), Some(dtype))
            );
        }
    }
}
