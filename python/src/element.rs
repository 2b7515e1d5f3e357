//! Pure: what an element is, as DLPack, the buffer protocol and NumPy name it.

use gradwire_collectives::{Collective, DType, Reduction};

/// The type of the elements of a caller's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// One that the engine knows.
    Known(DType),
    /// One that can be moved, but not reduced.
    Opaque { bytes: usize, name: String },
}

impl Element {
    /// Of a DLPack type code and size; `None` where an element is no whole number of bytes.
    pub(crate) fn of_dlpack(code: u8, bits: u8, lanes: u16) -> Option<Self> {
        let known = match (code, bits) {
            (0, 8) => DType::I8,
            (0, 16) => DType::I16,
            (0, 32) => DType::I32,
            (0, 64) => DType::I64,
            (1, 8) => DType::U8,
            (1, 16) => DType::U16,
            (1, 32) => DType::U32,
            (1, 64) => DType::U64,
            (2, 16) => DType::F16,
            (2, 32) => DType::F32,
            (2, 64) => DType::F64,
            (4, 16) => DType::BF16,
            (5, 32) => DType::C32,
            (5, 64) => DType::C64,
            (5, 128) => DType::C128,
            (6, 8) => DType::Bool,
            (10, 8) => DType::F8E4M3Fn,
            (11, 8) => DType::F8E4M3FnUz,
            (12, 8) => DType::F8E5M2,
            (13, 8) => DType::F8E5M2FnUz,
            (7..=14, 8) => DType::F8,
            _ => {
                let total = usize::from(bits) * usize::from(lanes);
                let name = format!("DLPack type {code} of {bits} bits");
                return total.is_multiple_of(8).then_some(Self::Opaque { bytes: total / 8, name });
            }
        };
        (lanes == 1).then_some(Self::Known(known))
    }

    /// Of a format of the buffer protocol (`struct` module's letters), where it stands for one native number.
    pub(crate) fn of_format(format: &str, item_bytes: usize) -> Option<Self> {
        let letters = format.trim_start_matches(['@', '=', '<']);
        let signed = |bytes| match bytes {
            1 => Some(DType::I8),
            2 => Some(DType::I16),
            4 => Some(DType::I32),
            8 => Some(DType::I64),
            _ => None,
        };
        let unsigned = |bytes| match bytes {
            1 => Some(DType::U8),
            2 => Some(DType::U16),
            4 => Some(DType::U32),
            8 => Some(DType::U64),
            _ => None,
        };
        let known = match letters {
            "e" => Some(DType::F16),
            "f" => Some(DType::F32),
            "d" => Some(DType::F64),
            "Zf" => Some(DType::C64),
            "Zd" => Some(DType::C128),
            "?" => Some(DType::Bool),
            "b" | "h" | "i" | "l" | "q" | "n" => signed(item_bytes),
            "B" | "H" | "I" | "L" | "Q" | "N" | "c" => unsigned(item_bytes),
            _ => None,
        };
        known.map(Self::Known)
    }

    /// Of a type's name in NumPy or PyTorch ("torch.bfloat16").
    pub(crate) fn of_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        let other = || name.starts_with("float8").then_some(DType::F8);
        DType::from_name(name).or_else(other).map(Self::Known)
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Known(dtype) => dtype.bytes(),
            Self::Opaque { bytes, .. } => *bytes,
        }
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Known(dtype) => dtype.name(),
            Self::Opaque { name, .. } => name,
        }
    }

    /// What the engine is told: sums of complex numbers are sums of their parts, unknown elements travel as bytes.
    pub(crate) fn for_call(&self, collective: &Collective) -> Result<DType, String> {
        match (self, collective.reduction()) {
            (Self::Known(DType::C32), Some(Reduction::Sum | Reduction::Avg)) => Ok(DType::F16),
            (Self::Known(DType::C64), Some(Reduction::Sum | Reduction::Avg)) => Ok(DType::F32),
            (Self::Known(DType::C128), Some(Reduction::Sum | Reduction::Avg)) => Ok(DType::F64),
            (Self::Known(dtype), _) => Ok(*dtype),
            (Self::Opaque { .. }, None) => Ok(DType::U8),
            (Self::Opaque { name, .. }, Some(op)) => Err(format!(
                "{} of {name} is not defined: such elements can be moved, not reduced; convert them first",
                op.name()
            )),
        }
    }
}
