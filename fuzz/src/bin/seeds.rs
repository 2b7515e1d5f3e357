//! Does: writes messages for libFuzzer to begin with, into the folder that is named.

use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let folder = env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| io::Error::other("name the folder, such as fuzz/corpus"))?;
    for (name, decoders) in gradwire_fuzz::crates() {
        let folder = folder.join(name);
        fs::create_dir_all(&folder)?;
        for (n, seed) in gradwire_fuzz::seeds(&decoders).into_iter().enumerate() {
            fs::write(folder.join(format!("seed-{n:03}")), seed)?;
        }
    }
    Ok(())
}
