//! Does: `gradwire-bench`, for people who look after networks.

mod chance;
mod collective;
mod compare;
mod echo;
mod family;
mod gpu;
mod help;
mod machine;
mod many_to_one;
mod memory;
mod progress;
mod ps;
mod recovery;
mod report;
mod sizes;
mod sockets;
mod statistics;
mod verbs;

use clap::{Parser, Subcommand};
use collective::Operation;

/// Measures gradwire on this machine. Every result is verified before it is timed.
#[derive(Parser)]
#[command(version, after_help = help::ALL)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Say on stderr every so many seconds how far a run is; 0: never
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = progress::USUAL_PACE_S, value_parser = pace)]
    progress: f64,
}

fn pace(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|seconds| (0.0..=3600.0).contains(seconds));
    number.ok_or_else(|| "give seconds from 0 to 3600, such as 5 or 0.5".to_owned())
}

#[derive(Subcommand)]
enum Command {
    /// All-reduce: everybody gets the sum. Time and bandwidth by size, as of nccl-tests, as for the collectives below
    AllReduce(collective::Options),
    /// Reduce-scatter: rank i gets the sum of all i-th parts
    ReduceScatter(collective::Options),
    /// All-gather: everybody gets everybody's part
    AllGather(collective::Options),
    /// Broadcast from rank 0
    Broadcast(collective::Options),
    /// Reduce to rank 0
    Reduce(collective::Options),
    /// All-to-all: rank i gets everybody's i-th part
    AllToAll(collective::Options),
    /// Gather to rank 0
    Gather(collective::Options),
    /// Scatter from rank 0
    Scatter(collective::Options),
    /// Barrier: nobody goes on before all have come
    Barrier(collective::Options),
    /// Collectives beside MPICH, Open MPI, Intel MPI, oneCCL (from their wheels) and Gloo, in turns, each held to its bar
    Compare(compare::Options),
    /// N processes push to one, with and without credit: goodput, fairness, loss and latency as N grows
    ManyToOne(many_to_one::Options),
    /// Push, pull and push_pull of the parameter server: dense, sparse, by several workers, beside a checkpoint
    Ps(ps::Options),
    /// What copies of tables cost, in turns with tables without; and what is left when servers are killed (--kills 50)
    Recovery(recovery::Options),
    /// The kernels that sums are made with, beside the limit of this machine's memory
    Memory(memory::Options),
    /// All-reduce over memory of CUDA devices, beside the same over the host's and the bare copies
    Gpu(gpu::Options),
    /// Latency and bandwidth of RDMA by message size: writes, writes with immediate data, and our messages
    Verbs(verbs::Options),
    /// One rank of a measurement; started by the others
    #[command(hide = true)]
    Rank(collective::RankOptions),
    #[command(hide = true)]
    CompareMember(compare::MemberOptions),
    #[command(hide = true)]
    ManyToOneMember(many_to_one::MemberOptions),
    #[command(hide = true)]
    PsPeer(ps::PeerOptions),
    #[command(hide = true)]
    RecoveryPeer(recovery::PeerOptions),
}

fn main() -> std::process::ExitCode {
    let Arguments { command, progress } = Arguments::parse();
    progress::set_pace(progress);
    let result = match command {
        Command::AllReduce(options) => collective::run(Operation::AllReduce, &options),
        Command::ReduceScatter(options) => collective::run(Operation::ReduceScatter, &options),
        Command::AllGather(options) => collective::run(Operation::AllGather, &options),
        Command::Broadcast(options) => collective::run(Operation::Broadcast, &options),
        Command::Reduce(options) => collective::run(Operation::Reduce, &options),
        Command::AllToAll(options) => collective::run(Operation::AllToAll, &options),
        Command::Gather(options) => collective::run(Operation::Gather, &options),
        Command::Scatter(options) => collective::run(Operation::Scatter, &options),
        Command::Barrier(options) => collective::run(Operation::Barrier, &options),
        Command::Compare(options) => compare::run(&options),
        Command::ManyToOne(options) => many_to_one::run(&options),
        Command::Ps(options) => ps::run(&options),
        Command::Recovery(options) => recovery::run(&options),
        Command::Memory(options) => memory::run(&options),
        Command::Gpu(options) => gpu::run(&options),
        Command::Verbs(options) => verbs::run(&options),
        Command::Rank(options) => collective::rank(&options),
        Command::CompareMember(options) => compare::member(&options),
        Command::ManyToOneMember(options) => many_to_one::member(&options),
        Command::PsPeer(options) => ps::peer(&options),
        Command::RecoveryPeer(options) => recovery::peer(&options),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// `1 sender`, `2 senders`.
fn plural(count: u32, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// The words of a line that begins a run, without what explains it.
    fn example(line: &str) -> Option<Vec<String>> {
        let line = line.strip_prefix("  ")?;
        let run = &line[line.find("gradwire-bench ")?..];
        let run = run.split("  ").next()?.split(" > ").next()?;
        Some(run.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn every_command_has_examples_which_it_understands() {
        let program = Arguments::command();
        let shown = program.get_subcommands().filter(|command| !command.is_hide_set());
        for command in shown.chain([&program]) {
            let name = command.get_name();
            let help = command.get_after_help().unwrap_or_else(|| panic!("{name} teaches nothing")).to_string();
            let examples: Vec<_> = help.lines().filter_map(example).collect();
            assert!(examples.len() >= 2, "{name}: {help}");
            for words in examples {
                if let Err(error) = Arguments::try_parse_from(&words) {
                    panic!("{words:?}: {error}");
                }
            }
        }
    }
}
