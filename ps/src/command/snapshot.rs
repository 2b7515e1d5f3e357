//! Does: `gradwire-ps snapshot`: makes servers write a checkpoint, once, or so often; the latter also within `serve`.

use super::servers::Servers;
use super::{parse_duration, show_bytes};
use clap::Args;
use gradwire_ps::{Checkpoint, Client, ClientSettings, PsError};
use gradwire_transport::Config;
use serde_json::json;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The least and the longest that one checkpoint may take, where nobody says another.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(600));
/// How often tables are asked how often they want one.
const LOOK: Duration = Duration::from_secs(1);

/// Flags of `snapshot`.
#[derive(Args)]
pub(crate) struct Snapshot {
    #[command(flatten)]
    servers: Servers,
    /// The longest that a checkpoint may take: its clock must come, and it must be written
    #[arg(long, default_value = "10m", value_parser = parse_duration, value_name = "TIME")]
    timeout: Duration,
    /// Go on, and write one so often, or as often as a table asks for
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    every: Option<Duration>,
    /// Print JSON: an object for each checkpoint
    #[arg(long)]
    json: bool,
}

impl Snapshot {
    pub(crate) fn run(self) -> Result<(), String> {
        loop {
            let (client, begun) = (self.servers.connect(ClientSettings::default())?, Instant::now());
            let checkpoint = client.snapshot(self.timeout).map_err(|error| error.to_string())?;
            if self.json {
                let (name, bytes, clocks) = (&checkpoint.name, checkpoint.bytes, &checkpoint.clocks);
                let seconds = checkpoint.took.as_secs_f64();
                println!("{}", json!({ "name": name, "bytes": bytes, "seconds": seconds, "clocks": clocks }));
            } else {
                println!("{}", told(&checkpoint));
            }
            let Some(every) = self.every else { return Ok(()) };
            // Servers that cannot be asked now are called again for the next one.
            while let Some(left) = soonest(Some(every), &client).unwrap_or(Some(every)).and_then(|it| left(it, begun)) {
                std::thread::sleep(left.min(LOOK));
            }
        }
    }
}

/// After how long the next checkpoint is wanted: by who runs this, and by the tables all of whose shards are asked.
fn soonest(own: Option<Duration>, client: &Client) -> Result<Option<Duration>, PsError> {
    let shards = client.status()?;
    let dense = shards.iter().flat_map(|shard| &shard.tables).map(|table| (table.spec.shards, table.spec.recovery));
    let sparse = shards.iter().flat_map(|shard| &shard.sparse).map(|table| (table.spec.shards, table.spec.recovery));
    let whole = dense.chain(sparse).filter(|(of, _)| *of as usize == shards.len());
    Ok(whole.filter_map(|(_, recovery)| recovery.every()).chain(own).min())
}

/// What is left of a time that began then, if anything.
fn left(every: Duration, begun: Instant) -> Option<Duration> {
    every.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())
}

fn told(checkpoint: &Checkpoint) -> String {
    let (bytes, seconds) = (show_bytes(checkpoint.bytes), checkpoint.took.as_secs_f64());
    let clocks = checkpoint.clocks.values();
    let at = match (clocks.clone().min(), clocks.max()) {
        (Some(first), Some(last)) if first == last => format!(" at clock {first}"),
        (Some(first), Some(last)) => format!(" at clocks {first} to {last}"),
        _ => String::new(),
    };
    format!("{}: {bytes} in {seconds:.2} s{at}", checkpoint.name)
}

/// A thread that asks for a checkpoint so often, or as often as a table wants, until it is dropped.
pub(crate) struct Periodic {
    client: Arc<Client>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Periodic {
    pub(crate) fn start(
        servers: &[String],
        (token, transport): (Option<String>, Config),
        own: Option<Duration>,
    ) -> Result<Self, String> {
        let settings = ClientSettings { token, transport, ..ClientSettings::default() };
        let client = Arc::new(Client::connect(servers, settings).map_err(|error| error.to_string())?);
        let asking = Arc::clone(&client);
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name("gradwire-ps-every".to_owned()).spawn(move || {
            let mut begun = Instant::now();
            loop {
                let every = soonest(own, &asking).unwrap_or(own);
                let left = every.map_or(Some(LOOK), |every| left(every, begun));
                if stopped.recv_timeout(left.unwrap_or_default().min(LOOK)) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let Some(every) = every.filter(|_| left.is_none()) else { continue };
                begun = Instant::now();
                match asking.snapshot(every.clamp(PATIENCE.0, PATIENCE.1)) {
                    Ok(checkpoint) => tracing::info!("{}", told(&checkpoint)),
                    Err(error) => tracing::error!(%error, "no checkpoint was written"),
                }
            }
        });
        let thread = thread.map_err(|error| format!("starting the thread for checkpoints: {error}"))?;
        Ok(Self { client, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Periodic {
    fn drop(&mut self) {
        self.stop = None;
        // Ends what it waits for.
        self.client.close();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread for checkpoints panicked");
        }
    }
}
