//! Does: the binary `gradwire-ps`: serves shards of a parameter server, and asks running ones what they hold.

mod command;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A sharded parameter server.
///
/// Workers push gradients and pull parameters; the servers sum, and run the optimizer. A shard is one address; together
/// they hold each table, cut into equal ranges.
#[derive(Parser)]
#[command(name = "gradwire-ps", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves one or more shards until it is stopped
    Serve(command::serve::Serve),
    /// Keeps the map of servers that have backups, and has one take over when another dies
    Coordinate(command::coordinate::Coordinate),
    /// Prints what running servers hold, and who is connected
    Status(command::status::Status),
}

const EXAMPLES: &str = "\
Examples:
  Try it on one machine, two shards at free ports (the addresses are printed):
      gradwire-ps serve --shards 2
      python -c 'import gradwire; c = gradwire.connect([\"127.0.0.1:PORT\", \"127.0.0.1:PORT\"]); print(c.status())'

  Serve other machines: off loopback a token is needed, the same for servers and clients:
      GRADWIRE_TOKEN=$(cat secret) gradwire-ps serve --listen 0.0.0.0:7000 --max-memory 64GiB

  Let tables outlive a server (recovery=\"replicate\"): a coordinator, and at least two servers on different machines:
      gradwire-ps coordinate --listen 10.0.0.1:7000 --shards 2
      gradwire-ps serve --listen 10.0.0.2:7000 --shards 2 --coordinator 10.0.0.1:7000      (and so on 10.0.0.3, ...)
      gradwire-ps status --coordinator 10.0.0.1:7000

  See what is there, for people and for programs:
      GRADWIRE_TOKEN=$(cat secret) gradwire-ps status --servers host1:7000,host2:7000
      GRADWIRE_TOKEN=$(cat secret) gradwire-ps status --servers host1:7000,host2:7000 --json

`gradwire-ps serve --help` explains every flag. Stop a server with Ctrl-C or SIGTERM.";

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Serve(serve) => serve.run(),
        Command::Coordinate(coordinate) => coordinate.run(),
        Command::Status(status) => status.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gradwire-ps: {error}");
            ExitCode::FAILURE
        }
    }
}
