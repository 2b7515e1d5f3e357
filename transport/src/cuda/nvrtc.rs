//! Does: compiles programs for a device while the program runs, by NVRTC, which is looked for then.

#![allow(unsafe_code, non_snake_case)]

use super::library::{find, open};
use super::{CudaError, Device};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

/// Files that are looked for where no other is named.
const FILES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
const SUCCESS: c_int = 0;
/// NVRTC's own program.
type Program = *mut c_void;
type Texts = *const *const c_char;

macro_rules! compiler {
    ($($name:ident($($type:ty),*);)*) => {
        /// NVRTC, loaded.
        pub struct Compiler {
            file: String,
            $($name: unsafe extern "C" fn($($type),*) -> c_int,)*
        }

        impl Compiler {
            fn look_up(handle: *mut c_void, file: &str) -> Result<Self, CudaError> {
                $(
                    let address = find(handle, concat!(stringify!($name), "\0"));
                    if address.is_null() {
                        return Err(refused(format!("{file} has no {}", stringify!($name))));
                    }
                    // SAFETY: the symbol of this name is a function of this type, as nvrtc.h says.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> c_int>(address)
                    };
                )*
                Ok(Self { file: file.to_owned(), $($name,)* })
            }
        }
    };
}

compiler! {
    nvrtcVersion(*mut c_int, *mut c_int);
    nvrtcCreateProgram(*mut Program, *const c_char, *const c_char, c_int, Texts, Texts);
    nvrtcCompileProgram(Program, c_int, Texts);
    nvrtcGetProgramLogSize(Program, *mut usize);
    nvrtcGetProgramLog(Program, *mut c_char);
    nvrtcGetCUBINSize(Program, *mut usize);
    nvrtcGetCUBIN(Program, *mut c_char);
    nvrtcDestroyProgram(*mut Program);
}

impl Compiler {
    /// The compiler: the file at `path`, or the newest `libnvrtc.so` that the system finds.
    ///
    /// # Errors
    /// `NoKernels`: there is none.
    pub fn load(path: Option<&Path>) -> Result<Self, CudaError> {
        let files: Vec<&Path> = path.map_or_else(|| FILES.map(Path::new).to_vec(), |path| vec![path]);
        let mut reasons = Vec::new();
        for file in files {
            match open(file) {
                Ok(handle) => return Self::look_up(handle, &file.display().to_string()),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(refused(reasons.join("; ")))
    }

    /// Its version, as 12 and 9.
    ///
    /// # Errors
    /// `NoKernels`.
    pub fn version(&self) -> Result<(i32, i32), CudaError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both may be written.
        let code = unsafe { (self.nvrtcVersion)(&raw mut major, &raw mut minor) };
        self.check("nvrtcVersion", code)?;
        Ok((major, minor))
    }

    /// `source` as code for `device`'s processors. Products and sums are not joined, and denormals stay: results are those that IEEE
    /// 754 gives on every processor.
    ///
    /// # Errors
    /// `NoKernels`, with what the compiler said; `Refused`.
    pub fn compile(&self, source: &CStr, device: &Device) -> Result<Vec<u8>, CudaError> {
        let (major, minor) = device.capability()?;
        self.compile_for(source, &format!("sm_{major}{minor}"))
    }

    /// The same for processors by their name, as `sm_90`.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn compile_for(&self, source: &CStr, architecture: &str) -> Result<Vec<u8>, CudaError> {
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: `program` may be written, the source ends with a zero, and there are no headers.
        let code = unsafe {
            (self.nvrtcCreateProgram)(&raw mut program, source.as_ptr(), c"gradwire.cu".as_ptr(), 0, none, none)
        };
        self.check("nvrtcCreateProgram", code)?;
        let image = self.image(program, architecture);
        // SAFETY: made above, and not used any more.
        unsafe { (self.nvrtcDestroyProgram)(&raw mut program) };
        image
    }

    fn image(&self, program: Program, architecture: &str) -> Result<Vec<u8>, CudaError> {
        let option = CString::new(format!("--gpu-architecture={architecture}")).unwrap_or_default();
        let options = [option.as_ptr(), c"--fmad=false".as_ptr()];
        // SAFETY: the program is alive, and the options end with zeros.
        let code = unsafe { (self.nvrtcCompileProgram)(program, options.len() as c_int, options.as_ptr()) };
        if code != SUCCESS {
            let log = self.bytes(program, self.nvrtcGetProgramLogSize, self.nvrtcGetProgramLog).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let said = log.trim_matches('\0').trim();
            return Err(refused(format!("{} does not compile for {architecture} ({code}): {said}", self.file)));
        }
        self.bytes(program, self.nvrtcGetCUBINSize, self.nvrtcGetCUBIN)
    }

    fn bytes(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, CudaError> {
        let mut many = 0;
        // SAFETY: the program is alive, and `many` may be written.
        let code = unsafe { size(program, &raw mut many) };
        self.check("the size of what was compiled", code)?;
        let mut bytes = vec![0u8; many];
        // SAFETY: the program is alive, and there is room for as many bytes as it said.
        let code = unsafe { get(program, bytes.as_mut_ptr().cast()) };
        self.check("what was compiled", code)?;
        Ok(bytes)
    }

    fn check(&self, what: &str, code: c_int) -> Result<(), CudaError> {
        if code == SUCCESS { Ok(()) } else { Err(refused(format!("{} refuses {what} ({code})", self.file))) }
    }
}

fn refused(reason: String) -> CudaError {
    CudaError::NoKernels { reason }
}
