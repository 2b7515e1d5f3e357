//! Does: the binary `gradwire-ps`: serves shards of a parameter server, and asks running ones what they hold.

mod command;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use command::config::Of;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

/// A sharded parameter server.
///
/// Workers push gradients and pull parameters; the servers sum, and run the optimizer. A shard is one address; together
/// they hold each table, cut into equal ranges.
#[derive(Parser)]
#[command(name = "gradwire-ps", version, after_help = EXAMPLES, args_override_self = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves one or more shards until it is stopped
    Serve(Box<command::serve::Serve>),
    /// Keeps the map of servers that have backups, and has one take over when another dies
    Coordinate(Box<command::coordinate::Coordinate>),
    /// Has a server with a coordinator hand over its shards, while clients go on
    Drain(command::drain::Drain),
    /// Prints what running servers hold, and who is connected
    Status(command::status::Status),
    /// Checks a configuration file
    Config(command::config::Check),
    /// Makes running servers write a checkpoint, once or again and again
    Snapshot(command::snapshot::Snapshot),
    /// Writes a checkpoint as a file of safetensors
    Export(command::exchange::Export),
    /// Makes a checkpoint of a file that `export` wrote
    Import(command::exchange::Import),
}

const EXAMPLES: &str = "\
Examples:
  Try it on one machine, two shards at free ports (the addresses are printed):
      gradwire-ps serve --shards 2
      python -c 'import gradwire; c = gradwire.connect([\"127.0.0.1:PORT\", \"127.0.0.1:PORT\"]); print(c.status())'

  Serve other machines: off loopback a token is needed, the same for servers and clients:
      GRADWIRE_TOKEN=$(cat secret) gradwire-ps serve --listen 0.0.0.0:7000 --max-memory 64GiB

  The same with TLS, and only for clients whose certificate a CA of yours has signed:
      gradwire-ps serve --listen 0.0.0.0:7000 --tls-cert ps.crt --tls-key ps.key --tls-client-ca ca.crt

  The same from a file of flags without their dashes (`listen = \"0.0.0.0:7000\"`), checked first; flags win over it:
      gradwire-ps config --check ps.toml && gradwire-ps serve --config ps.toml --admin 0.0.0.0:9100 --log-format json
  Let tables outlive a server (recovery=\"replicate\"): a coordinator, and at least two servers on different machines:
      gradwire-ps coordinate --listen 10.0.0.1:7000 --shards 2
      gradwire-ps serve --listen 10.0.0.2:7000 --shards 2 --coordinator 10.0.0.1:7000      (and so on 10.0.0.3, ...)
      gradwire-ps serve --listen 10.0.0.2:7000 --shards 2 --coordinate 10.0.0.2:7100       (or a server carries it, with no other process)
      gradwire-ps status --coordinator 10.0.0.1:7000
      gradwire-ps snapshot --coordinator 10.0.0.1:7000 --every 10m             (servers started with --checkpoint-dir, one that all see)
      gradwire-ps coordinate --shards 2 --restore latest --checkpoint-dir /shared/run1     (a cluster that begins where all were lost)
      gradwire-ps drain --coordinator 10.0.0.1:7000 --server 10.0.0.2:7000     (SIGTERM does so, too, and then ends it)

  See what is there, for people and for programs:
      GRADWIRE_TOKEN=$(cat secret) gradwire-ps status --servers host1:7000,host2:7000
      GRADWIRE_TOKEN=$(cat secret) gradwire-ps status --servers host1:7000,host2:7000 --json

  Keep checkpoints, begin with the latest one, and write one now:
      gradwire-ps serve --shards 2 --checkpoint-dir /data/run1 --checkpoint-every 10m --restore latest
      gradwire-ps snapshot --servers 127.0.0.1:PORT,127.0.0.1:PORT

  Keep them in a bucket of anything that speaks S3 (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL):
      gradwire-ps serve --shards 2 --checkpoint-dir s3://bucket/run1 --checkpoint-every 10m --restore latest

  Take the latest checkpoint elsewhere, and begin there with it:
      gradwire-ps export /data/run1 run1.safetensors
      gradwire-ps import run1.safetensors /data/run2 && gradwire-ps serve --checkpoint-dir /data/run2 --restore latest

`gradwire-ps serve --help` explains every flag. Stop a server with Ctrl-C or SIGTERM.";

/// The command that was given. What is in the environment for coordinators is left to them where `serve` carries none; typed, it is
/// a mistake.
fn read(matches: ArgMatches) -> Result<Command, clap::Error> {
    let serve = matches.subcommand_matches("serve");
    let typed = |name: &str| serve.and_then(|serve| serve.value_source(name)) == Some(ValueSource::CommandLine);
    if typed("etcd") && serve.is_some_and(|serve| !serve.contains_id("coordinate")) {
        let why = "--etcd is for coordinators: say --coordinate ADDRESS:PORT too, or leave it to those that --coordinator names";
        return Err(Arguments::command().error(ErrorKind::MissingRequiredArgument, why));
    }
    Arguments::from_arg_matches(&matches).map(|arguments| arguments.command)
}

/// A command with what the file says, and `typed` behind it.
fn with_file(of: Of, path: &Path, typed: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let arguments = Arguments::command();
    let command = arguments.find_subcommand(of.name()).expect("it is one of the commands");
    let said = command::config::arguments(command, path, |name| std::env::var_os(name).is_some())?;
    let all = ["gradwire-ps", of.name()].map(OsString::from).into_iter().chain(said).chain(typed);
    let read = arguments.clone().try_get_matches_from(all).and_then(read);
    read.map_err(|error| format!("{}: {error}", path.display()))
}

impl Command {
    /// The file that holds more of its flags.
    fn file(&self) -> Option<(Of, &Path)> {
        match self {
            Self::Serve(serve) => serve.config().map(|path| (Of::Serve, path)),
            Self::Coordinate(coordinate) => coordinate.config().map(|path| (Of::Coordinate, path)),
            _ => None,
        }
    }

    /// Whether a server, or a coordinator, could start so.
    fn check(&self) -> Result<(), String> {
        match self {
            Self::Serve(serve) => serve.check(),
            Self::Coordinate(coordinate) => coordinate.check(),
            _ => unreachable!("no other command has a file"),
        }
    }

    fn run(self, warnings: &[String]) -> Result<(), String> {
        if !matches!(self, Self::Serve(_) | Self::Coordinate(_)) {
            // The others have a log for it.
            warnings.iter().for_each(|warning| eprintln!("gradwire-ps: {warning}"));
        }
        match self {
            Self::Serve(serve) => serve.run(warnings),
            Self::Coordinate(coordinate) => coordinate.run(warnings),
            Self::Drain(drain) => drain.run(),
            Self::Status(status) => status.run(),
            Self::Config(check) => with_file(check.of(), check.file(), std::iter::empty())
                .and_then(|command| command.check())
                .map(|()| check.praise()),
            Self::Snapshot(snapshot) => snapshot.run(),
            Self::Export(export) => export.run(),
            Self::Import(import) => import.run(),
        }
    }
}

fn main() -> ExitCode {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let warnings = command::environment::warnings(&Arguments::command(), names);
    let command = read(Arguments::command().get_matches()).unwrap_or_else(|error| error.exit());
    let command = match command.file() {
        // What was typed comes behind the file, and so wins.
        Some((of, path)) => with_file(of, path, std::env::args_os().skip(2)),
        None => Ok(command),
    };
    match command.and_then(|command| command.run(&warnings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gradwire-ps: {error}");
            ExitCode::FAILURE
        }
    }
}
