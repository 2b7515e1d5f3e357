//! Does: `gradwire-ps snapshot`: makes servers write a checkpoint, once, or so often.

use super::servers::Servers;
use super::{parse_duration, show_bytes};
use clap::Args;
use gradwire_ps::{Checkpoint, Client, ClientSettings, ShardStatus};
use serde_json::json;
use std::time::{Duration, Instant};

/// How often tables are asked how often they want one.
pub(super) const LOOK: Duration = Duration::from_secs(1);

/// Flags of `snapshot`.
#[derive(Args)]
pub(crate) struct Snapshot {
    #[command(flatten)]
    servers: Servers,
    /// The longest that a checkpoint may take: its clock must come, and it must be written
    #[arg(long, default_value = "10m", value_parser = parse_duration, value_name = "TIME")]
    timeout: Duration,
    /// Go on, and write one so often, or as often as a table asks for; once one was written, also after servers were lost
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    every: Option<Duration>,
    /// Print JSON: an object for each checkpoint
    #[arg(long)]
    json: bool,
}

impl Snapshot {
    pub(crate) fn run(self) -> Result<(), String> {
        // What is wrong from the start ends it; later there may be nobody for a while.
        let mut last = self.once()?;
        let Some(every) = self.every else { return Ok(()) };
        loop {
            let (client, begun) = &last;
            // Servers that cannot be asked now are called again for the next one.
            let soonest = || client.status().map_or(every, |shards| wanted(&shards).map_or(every, |it| it.min(every)));
            while let Some(left) = left(soonest(), *begun) {
                std::thread::sleep(left.min(LOOK));
            }
            last = loop {
                match self.once() {
                    Ok(next) => break next,
                    Err(error) => {
                        eprintln!("gradwire-ps: no checkpoint was written, and the next is asked for at once: {error}");
                        std::thread::sleep(LOOK);
                    }
                }
            };
        }
    }

    /// Has one written, and tells of it; who was asked, and when.
    fn once(&self) -> Result<(Client, Instant), String> {
        let (client, begun) = (self.servers.connect(ClientSettings::default())?, Instant::now());
        let checkpoint = client.snapshot(self.timeout).map_err(|error| error.to_string())?;
        if self.json {
            let (name, bytes, clocks) = (&checkpoint.name, checkpoint.bytes, &checkpoint.clocks);
            let seconds = checkpoint.took.as_secs_f64();
            println!("{}", json!({ "name": name, "bytes": bytes, "seconds": seconds, "clocks": clocks }));
        } else {
            println!("{}", told(&checkpoint));
        }
        Ok((client, begun))
    }
}

/// After how long the most eager table of these shards wants the next checkpoint.
pub(super) fn wanted(shards: &[ShardStatus]) -> Option<Duration> {
    let dense = shards.iter().flat_map(|shard| &shard.tables).map(|table| table.spec.recovery);
    let sparse = shards.iter().flat_map(|shard| &shard.sparse).map(|table| table.spec.recovery);
    dense.chain(sparse).filter_map(|recovery| recovery.every()).min()
}

/// What is left of a time that began then, if anything.
pub(super) fn left(every: Duration, begun: Instant) -> Option<Duration> {
    every.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())
}

pub(super) fn told(checkpoint: &Checkpoint) -> String {
    let (bytes, seconds) = (show_bytes(checkpoint.bytes), checkpoint.took.as_secs_f64());
    let clocks = checkpoint.clocks.values();
    let at = match (clocks.clone().min(), clocks.max()) {
        (Some(first), Some(last)) if first == last => format!(" at clock {first}"),
        (Some(first), Some(last)) => format!(" at clocks {first} to {last}"),
        _ => String::new(),
    };
    format!("{}: {bytes} in {seconds:.2} s{at}", checkpoint.name)
}
