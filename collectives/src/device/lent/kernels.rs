//! Does: the kernels that fold on a device: compiled when they are first wanted, once for the process.

#![allow(unsafe_code)]

use crate::{DType, Reduction};
use gradwire_transport::cuda::{Compiler, CudaError, Device, FoldKernel, Module};
use std::ffi::CString;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// All of them: the line that is added says for which type.
const SOURCE: &str = include_str!("fold.cu");
/// What is compiled for processors of a kind and revision, and a type.
type Image = ((i32, i32, &'static str), Arc<Vec<u8>>);
/// The kernels of one device, by type and reduction.
pub struct DeviceKernels {
    device: Arc<Device>,
    compiler: Compiler,
    loaded: Vec<((DType, Reduction), FoldKernel)>,
}

impl DeviceKernels {
    /// Types that they fold.
    pub(crate) const TYPES: [DType; 6] = [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64];

    /// With those of `float32`, so that what is amiss shows at once. The compiler is the file at `library`, or what the system has.
    ///
    /// # Errors
    /// `NoKernels`: there is no compiler; `Refused`.
    pub fn new(device: &Arc<Device>, library: Option<&Path>) -> Result<Self, CudaError> {
        let mut kernels = Self { device: Arc::clone(device), compiler: Compiler::load(library)?, loaded: Vec::new() };
        kernels.get(DType::F32, Reduction::Sum)?;
        Ok(kernels)
    }

    /// Whether there is one, in the same bits as the host's.
    pub(crate) fn has(dtype: DType, op: Reduction) -> bool {
        Self::TYPES.contains(&dtype) && name(op).is_some()
    }

    /// That of `dtype` and `op`: float16, bfloat16, float32, float64, int32 and int64; sum, average, product, minimum and maximum.
    ///
    /// # Errors
    /// `NoKernels`: there is none; `Refused`.
    pub fn get(&mut self, dtype: DType, op: Reduction) -> Result<&FoldKernel, CudaError> {
        let found = self.loaded.iter().position(|(of, _)| *of == (dtype, op));
        let at = match found {
            Some(at) => at,
            None => {
                self.loaded.push(((dtype, op), self.load(dtype, op)?));
                self.loaded.len() - 1
            }
        };
        Ok(&self.loaded[at].1)
    }

    /// The compiler and what it compiles for, in words.
    pub(crate) fn words(&self) -> Result<String, CudaError> {
        let ((major, minor), (processor, revision)) = (self.compiler.version()?, self.device.capability()?);
        Ok(format!("NVRTC {major}.{minor}, sm_{processor}{revision}"))
    }

    fn load(&self, dtype: DType, op: Reduction) -> Result<FoldKernel, CudaError> {
        let none = || CudaError::NoKernels { reason: format!("none folds {}", dtype.name()) };
        let name = name(op)
            .and_then(|op| CString::new(format!("gradwire_fold_{}_{op}", short(dtype)?)).ok())
            .ok_or_else(none)?;
        let module = Module::load(&self.device, &self.image(dtype)?)?;
        // SAFETY: FOLD in fold.cu: with these parameters, for any number of threads, it reads and writes `count` elements of each.
        unsafe { module.fold_kernel(&name, dtype.bytes()) }
    }

    /// The program for `dtype`. Devices of one kind share it.
    fn image(&self, dtype: DType) -> Result<Arc<Vec<u8>>, CudaError> {
        static IMAGES: Mutex<Vec<Image>> = Mutex::new(Vec::new());
        let (major, minor) = self.device.capability()?;
        let name = short(dtype).unwrap_or_default();
        let mut images = IMAGES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, image)) = images.iter().find(|(of, _)| *of == (major, minor, name)) {
            return Ok(Arc::clone(image));
        }
        let source = CString::new(format!("{SOURCE}\nFOLDS_{name}\n")).unwrap_or_default();
        let image = Arc::new(self.compiler.compile(&source, &self.device)?);
        images.push(((major, minor, name), Arc::clone(&image)));
        Ok(image)
    }
}

fn name(op: Reduction) -> Option<&'static str> {
    match op {
        Reduction::Sum => Some("sum"),
        Reduction::Avg => Some("avg"),
        Reduction::Product => Some("product"),
        Reduction::Min => Some("min"),
        Reduction::Max => Some("max"),
        _ => None,
    }
}

fn short(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F32 => "f32",
        DType::F64 => "f64",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::I32 => "i32",
        DType::I64 => "i64",
        _ => return None,
    })
}
