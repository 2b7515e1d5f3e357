//! Does: one native rank of gradwire under comparison; it speaks as `peers/mpi_rank.c` does.

use crate::collective::{self, Element, Load, Operation, Way, Work};
use clap::{Args, ValueEnum};
use gradwire_collectives::{Communicator, Settings};
use std::error::Error;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Args)]
pub(crate) struct MemberOptions {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    rank: u32,
    #[arg(long)]
    ranks: u32,
    #[arg(long, value_enum)]
    wire: Way,
    #[arg(long)]
    store: String,
}

/// Says hello, then answers until the socket ends.
pub(crate) fn member(options: &MemberOptions) -> Result<(), Box<dyn Error>> {
    let (_, communicator) = collective::meet(
        &options.store,
        (Some(options.rank), Some(options.ranks)),
        (options.wire, true),
        Settings::default(),
    )?;
    let mut end = UnixStream::connect(&options.socket)?;
    writeln!(end, "hello {} {} gradwire {}", options.rank, options.ranks, env!("CARGO_PKG_VERSION"))?;
    for line in BufReader::new(end.try_clone()?).lines() {
        let answer = answer(&communicator, &line?)?;
        writeln!(end, "{answer}")?;
    }
    communicator.close(Duration::from_secs(5));
    Ok(())
}

fn answer(communicator: &Communicator, line: &str) -> Result<String, Box<dyn Error>> {
    let words: Vec<&str> = line.split(' ').collect();
    let ["run", operation, element, elements, modulus, calls] = words[..] else {
        return Err(format!("{line:?} is no order").into());
    };
    let operation = Operation::from_str(&operation.replace('_', "-"), true)?;
    let element = Element::from_str(element, true)?;
    let load = Load { operation, element, elements: elements.parse()?, modulus: modulus.parse()? };
    let work = Work::new(communicator, load);
    if let Err(error) = work.verify() {
        return Ok(format!("wrong {error}").replace('\n', " "));
    }
    let mut answer = "times".to_owned();
    for seconds in work.times(calls.parse()?)? {
        write!(answer, " {:.0}", seconds * 1e9)?;
    }
    Ok(answer)
}
