//! Does: a thread that stores what a shard hands over, so that the shard need not wait for a disk.

use crate::PsError;
use crate::header::Header;
use crate::shard::{Action, Cut, Limits, Shard};
use crate::storage::Storage;
use gradwire_transport::{PeerId, TransportError, Wake};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Where and how checkpoints are kept.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    /// The folder, as a path or a `file://` address, or `s3://BUCKET/PREFIX`. All servers of one map need the same one.
    pub place: String,
    /// How many are kept. Default 3.
    pub keep: usize,
}

impl Checkpoints {
    /// The name of the checkpoint at `place` that `which` means: itself, or of `latest` the latest whole one, which may be none
    /// yet.
    ///
    /// # Errors
    /// `Invalid` where the place cannot be read, or keeps no whole checkpoint of that name.
    pub fn find(place: &str, which: &str) -> Result<Option<String>, PsError> {
        let wrong = |why: String| PsError::invalid(format!("finding checkpoint {which} in {place}"), why);
        let whole = Storage::open(place).and_then(|storage| storage.whole()).map_err(|bad| wrong(bad.to_string()))?;
        if which == "latest" {
            return Ok(whole.into_iter().next());
        }
        let found = whole.iter().find(|name| *name == which).cloned();
        let known = || if whole.is_empty() { "none".to_owned() } else { whole.join(", ") };
        found.map(Some).ok_or_else(|| wrong(format!("there is no whole one of that name; there is {}", known())))
    }
}

type Job = (PeerId, Header, Box<Cut>);

/// The thread, and what it has done. One snapshot is under way at a time for each client that asks.
pub(crate) struct Keeper {
    jobs: Option<Sender<Job>>,
    stored: Receiver<Action>,
    /// Snapshots handed over and not answered yet.
    pub(crate) under_way: usize,
    cancel: Arc<AtomicBool>,
    place: String,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(crate) fn start(settings: &Checkpoints, waker: Arc<dyn Wake>) -> Result<Self, PsError> {
        let storage = Storage::open(&settings.place).map_err(|bad| PsError::invalid("checkpoints", bad.to_string()))?;
        let cancel = storage.canceller();
        let ((jobs, taken), (done, stored), keep) = (channel::<Job>(), channel(), settings.keep);
        let thread = std::thread::Builder::new().name("gradwire-ps-keep".to_owned()).spawn(move || {
            for (to, header, cut) in taken {
                let written = storage.write(&cut);
                match &written {
                    Ok(bytes) => tracing::info!(name = cut.name, shard = cut.place.0, bytes, "wrote a checkpoint"),
                    Err(bad) => {
                        tracing::error!(name = cut.name, shard = cut.place.0, why = %bad, "wrote no checkpoint")
                    }
                }
                if let Err(bad) = storage.prune(cut.place, keep) {
                    tracing::warn!(why = %bad, "older checkpoints could not be removed");
                }
                let answer = Shard::stored((to, header), written.map_err(|bad| bad.to_string()));
                if done.send(answer).is_err() {
                    return;
                }
                waker.wake();
            }
        });
        let thread = thread.map_err(|error| TransportError::io("start the thread for checkpoints", error))?;
        let place = settings.place.clone();
        Ok(Self { jobs: Some(jobs), stored, under_way: 0, cancel, place, thread: Some(thread) })
    }

    /// Reads one shard of a checkpoint, on the thread that asks. `place`: which shard, of how many.
    pub(crate) fn read(
        &self,
        name: &str,
        (shard, shards): (u32, u32),
        limits: &Limits,
        instance: u64,
    ) -> Result<Shard, String> {
        let made = Storage::open(&self.place).and_then(|it| it.read(name, shards, limits, &[(shard, instance)]));
        let mut made = made.map_err(|bad| bad.to_string())?.pop().ok_or("it has no such shard")?;
        made.mark_restored();
        Ok(made)
    }

    /// Hands a snapshot over.
    pub(crate) fn store(&mut self, to: PeerId, header: Header, cut: Box<Cut>) {
        self.under_way += 1;
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send((to, header, cut)).is_ok());
        assert!(sent, "the thread for checkpoints lives as long as its server");
    }

    /// The answers to what is stored.
    pub(crate) fn answers(&mut self, out: &mut Vec<Action>) {
        while let Ok(answer) = self.stored.try_recv() {
            self.under_way -= 1;
            out.push(answer);
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.jobs = None;
        self.cancel.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread for checkpoints panicked");
        }
    }
}
