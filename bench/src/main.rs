//! Does: `gradwire-bench`, for people who look after networks.

mod all_reduce;

use clap::{Parser, Subcommand};

/// Measures gradwire on this machine. Every result is verified before it is timed.
#[derive(Parser)]
#[command(version, after_help = "Example: gradwire-bench all-reduce --ranks 4 --wire tcp --json > tcp.jsonl")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// All-reduce of float32 between processes of this host: nccl-tests' table
    AllReduce(all_reduce::Options),
    /// One rank of a measurement; started by the others
    #[command(hide = true)]
    Rank(all_reduce::RankOptions),
}

fn main() -> std::process::ExitCode {
    let result = match Arguments::parse().command {
        Command::AllReduce(options) => all_reduce::run(&options),
        Command::Rank(options) => all_reduce::rank(&options),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
