//! Does: `gradwire-ps export` and `gradwire-ps import`: checkpoints as files of safetensors, and back. No server is asked.

use super::{memory_of_machine, parse_bytes, show_bytes};
use clap::Args;
use gradwire_ps::{Exchanged, PsError, export_checkpoint, import_checkpoint};
use serde_json::json;
use std::path::PathBuf;

/// Flags of `export`.
#[derive(Args)]
pub(crate) struct Export {
    /// Folder or s3:// address of a checkpoint, or of several (--checkpoint-dir), of which the latest whole one is taken
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// File to write. A table's values have its name, its optimizer's state one behind it, such as `w::exp_avg`
    #[arg(value_name = "FILE.safetensors")]
    file: PathBuf,
    /// Most memory for the tables, such as 64GiB [default: what the machine has]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    max_memory: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Flags of `import`.
#[derive(Args)]
pub(crate) struct Import {
    /// File that `export` wrote; numbers in it may have been changed since
    #[arg(value_name = "FILE.safetensors")]
    file: PathBuf,
    /// Folder or s3:// address that keeps checkpoints (--checkpoint-dir): the new one becomes its latest, for any number of shards
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// Most memory for the tables, such as 64GiB [default: what the machine has]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    max_memory: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Export {
    pub(crate) fn run(self) -> Result<(), String> {
        tell("exported", export_checkpoint(&self.checkpoint, &self.file, most(self.max_memory)), self.json)
    }
}

impl Import {
    pub(crate) fn run(self) -> Result<(), String> {
        tell("imported", import_checkpoint(&self.file, &self.folder, most(self.max_memory)), self.json)
    }
}

fn most(said: Option<u64>) -> u64 {
    said.unwrap_or_else(memory_of_machine)
}

fn tell(what: &str, done: Result<Exchanged, PsError>, as_json: bool) -> Result<(), String> {
    let Exchanged { name, tables, bytes } = done.map_err(|error| error.to_string())?;
    if as_json {
        println!("{}", json!({ "name": name, "tables": tables, "bytes": bytes }));
    } else {
        println!("{what} {name}: {tables} tables, {}", show_bytes(bytes));
    }
    Ok(())
}
