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

/// Who asked for the snapshot of which name.
type Asked = (String, PeerId, Header);

/// The thread, and what it has done. One snapshot is under way at a time: each keeps the model as it was when it was taken.
pub(crate) struct Keeper {
    jobs: Option<Sender<Box<Cut>>>,
    stored: Receiver<Result<u64, String>>,
    /// What was handed over and is not answered yet.
    under_way: Option<Asked>,
    /// What the same client has asked for since, the last one: it may have given up the one before for the sake of other shards.
    next: Option<(Asked, Box<Cut>)>,
    cancel: Arc<AtomicBool>,
    place: String,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(crate) fn start(settings: &Checkpoints, waker: Arc<dyn Wake>) -> Result<Self, PsError> {
        let storage = Storage::open(&settings.place).map_err(|bad| PsError::invalid("checkpoints", bad.to_string()))?;
        let cancel = storage.canceller();
        let ((jobs, taken), (done, stored), keep) = (channel::<Box<Cut>>(), channel(), settings.keep);
        let thread = std::thread::Builder::new().name("gradwire-ps-keep".to_owned()).spawn(move || {
            for cut in taken {
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
                if done.send(written.map_err(|bad| bad.to_string())).is_err() {
                    return;
                }
                waker.wake();
            }
        });
        let thread = thread.map_err(|error| TransportError::io("start the thread for checkpoints", error))?;
        let place = settings.place.clone();
        Ok(Self { jobs: Some(jobs), stored, under_way: None, next: None, cancel, place, thread: Some(thread) })
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

    /// Hands a snapshot over. While another is still being written it is refused, but one of the same client waits, and takes the
    /// place of one that does. What is to be told to whom is returned.
    pub(crate) fn store(&mut self, to: PeerId, header: Header, cut: Box<Cut>) -> Option<Action> {
        let asked = (cut.name.clone(), to, header);
        match &mut self.under_way {
            None => self.begin(asked, cut),
            Some((name, _, other)) if other.client != header.client => {
                return Some(Shard::still_storing((to, header), &cut.name, name));
            }
            // Its connection was lost meanwhile: it is the same one.
            Some(known) if known.0 == cut.name => *known = asked,
            Some(_) => {
                let later = asked.0.clone();
                let ((name, to, header), _) = self.next.replace((asked, cut))?;
                return (name != later).then(|| Shard::superseded((to, header), &name, &later));
            }
        }
        None
    }

    fn begin(&mut self, asked: Asked, cut: Box<Cut>) {
        self.under_way = Some(asked);
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(cut).is_ok());
        assert!(sent, "the thread for checkpoints lives as long as its server");
    }

    /// Whether one is being written.
    pub(crate) fn is_busy(&self) -> bool {
        self.under_way.is_some()
    }

    /// The answer to what is stored.
    pub(crate) fn answers(&mut self, out: &mut Vec<Action>) {
        if let Ok(stored) = self.stored.try_recv() {
            out.extend(self.under_way.take().map(|(_, to, header)| Shard::stored((to, header), stored)));
            if let Some((asked, cut)) = self.next.take() {
                self.begin(asked, cut);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Kind;
    use crate::refusal::{Reason, Refusal};

    struct Bell(Sender<()>);

    impl Wake for Bell {
        fn wake(&self) {
            self.0.send(()).unwrap();
        }
    }

    struct Bench {
        keeper: Keeper,
        rung: Receiver<()>,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let settings = Checkpoints { place: folder.path().to_str().unwrap().to_owned(), keep: 3 };
            let (rings, rung) = channel();
            Self { keeper: Keeper::start(&settings, Arc::new(Bell(rings))).unwrap(), rung, _folder: folder }
        }

        /// A client asks, over a connection, for the `n`-th checkpoint. Who is refused, if anybody.
        fn ask(&mut self, client: u64, peer: u32, n: u64) -> Option<(PeerId, Refusal)> {
            let cut = Cut { name: name(n), place: (0, 1), clients: Vec::new(), tables: Vec::new() };
            let header = Header { client, ..Header::new(Kind::Snapshot) };
            let Action::Reply { to, header, body } = self.keeper.store(PeerId(peer), header, Box::new(cut))? else {
                panic!("no reply")
            };
            Some((to, Refusal::decode(header.status, &body).unwrap()))
        }

        /// Who is told that the checkpoint under way is written.
        fn written(&mut self) -> PeerId {
            self.rung.recv().unwrap();
            let mut out = Vec::new();
            self.keeper.answers(&mut out);
            let [Action::Reply { to, header, .. }] = &out[..] else { panic!("{out:?}") };
            assert_eq!(header.kind, Kind::Done);
            *to
        }
    }

    fn name(n: u64) -> String {
        crate::checkpoint::name_at(n)
    }

    #[test]
    fn a_checkpoint_is_refused_by_name_while_another_client_s_is_being_written() {
        let mut bench = Bench::new();
        assert_eq!(bench.ask(1, 1, 1), None);
        let (to, refusal) = bench.ask(2, 2, 2).unwrap();
        assert_eq!((to, refusal.reason, &refusal.got), (PeerId(2), Reason::Limit, &name(1)));
        assert!(refusal.subject.contains(&name(2)), "{refusal}");
        assert_eq!(bench.ask(1, 9, 1), None, "asked again, after its connection was lost");
        assert_eq!((bench.written(), bench.keeper.is_busy()), (PeerId(9), false));
        assert_eq!(bench.ask(2, 2, 3), None);
        assert_eq!(bench.written(), PeerId(2));
    }

    #[test]
    fn of_one_client_s_only_the_last_one_waits() {
        let mut bench = Bench::new();
        assert_eq!([1, 2].map(|n| bench.ask(1, 1, n)), [None, None]);
        let (to, refusal) = bench.ask(1, 1, 3).unwrap();
        assert_eq!((to, refusal.reason), (PeerId(1), Reason::Superseded));
        assert!(refusal.expected == name(3) && refusal.got == name(2), "{refusal}");
        assert_eq!(bench.ask(1, 7, 3), None, "asked again, after its connection was lost");
        assert_eq!(bench.ask(2, 2, 4).unwrap().1.reason, Reason::Limit);
        assert_eq!((bench.written(), bench.keeper.is_busy()), (PeerId(1), true));
        assert_eq!((bench.written(), bench.keeper.is_busy()), (PeerId(7), false));
    }
}
