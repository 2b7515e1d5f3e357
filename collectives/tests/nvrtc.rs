//! fold.cu by the compiler that machines with a GPU have, which needs none itself. `GRADWIRE_NVRTC_LIBRARY` names its file.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_transport::cuda::Compiler;
use std::ffi::CString;
use std::path::PathBuf;

const SOURCE: &str = include_str!("../src/device/lent/fold.cu");

fn compiler() -> Compiler {
    Compiler::load(std::env::var_os("GRADWIRE_NVRTC_LIBRARY").map(PathBuf::from).as_deref()).unwrap()
}

#[test]
fn it_makes_every_kernel_for_old_and_new_devices() {
    let compiler = compiler();
    let (major, _) = compiler.version().unwrap();
    assert!(major >= 12);
    for device in ["sm_75", "sm_80", "sm_90", "sm_100"] {
        for dtype in ["f32", "f64", "f16", "bf16", "i32", "i64"] {
            let source = CString::new(format!("{SOURCE}\nFOLDS_{dtype}\n")).unwrap();
            let image = compiler.compile_for(&source, device).unwrap();
            assert!(image.starts_with(b"\x7fELF"), "{device} {dtype}");
            for op in ["sum", "avg", "product", "min", "max"] {
                let name = format!("gradwire_fold_{dtype}_{op}\0");
                assert!(image.windows(name.len()).any(|bytes| bytes == name.as_bytes()), "{device} {name}");
            }
        }
    }
}

#[test]
fn what_it_does_not_take_is_told_in_its_words() {
    let source = CString::new(format!("{SOURCE}\nFOLDS_f31\n")).unwrap();
    let text = compiler().compile_for(&source, "sm_90").unwrap_err().to_string();
    assert!(text.contains("does not compile for sm_90 (6): ") && text.contains("FOLDS_f31"), "{text}");
    let source = CString::new(SOURCE).unwrap();
    let text = compiler().compile_for(&source, "sm_1").unwrap_err().to_string();
    assert!(text.contains("does not compile for sm_1 (5)"), "{text}");
}
