//! Does: keeps the record of a group's last operations apart from the engine, which a thread may hold for as long as ranks are
//! late, and writes it down: on demand, and when the group fails.

use crate::Settings;
use crate::messages::Message;
use crate::recorder::{Recorder, What};
use gradwire_transport::{PeerName, Rank};
use serde_json::{Value, json};
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What a rank remembers of its group.
pub(crate) struct Trace {
    group: String,
    rank: Rank,
    members: Vec<PeerName>,
    folder: Option<PathBuf>,
    made: Instant,
    made_at: Duration,
    recorder: Recorder,
    verdict: Mutex<Option<String>>,
    writing: Mutex<()>,
}

/// Writes a group's record where its settings say, at any time; it does not keep the group alive.
#[derive(Clone)]
pub struct TraceWriter(pub(crate) Weak<Trace>);

impl TraceWriter {
    /// Writes it, in place of an earlier one, also while ranks are late; the file. `None` where the group is gone, or no folder was
    /// given.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self) -> Option<io::Result<PathBuf>> {
        self.0.upgrade()?.write()
    }

    /// Whether the group is still there.
    pub fn is_live(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl Trace {
    /// An empty record; with a `folder`, it goes there when the group fails.
    pub(crate) fn new(group: String, rank: Rank, members: Vec<PeerName>, folder: Option<PathBuf>) -> Self {
        // A clock before 1970 makes all times of this rank small; their order stays.
        let made_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (recorder, verdict, writing) = (Recorder::default(), Mutex::default(), Mutex::default());
        Self { group, rank, members, folder, made: Instant::now(), made_at, recorder, verdict, writing }
    }

    /// Remembers a call that was made at `called`; its number is for [`Trace::end`]. For who has the engine, as all that writes.
    pub(crate) fn begin(&self, what: What, called: Instant) -> u64 {
        self.recorder.begin(what, called.saturating_duration_since(self.made))
    }

    /// The same of a message.
    pub(crate) fn begin_message(&self, message: &Message) {
        let what = What::Message { kind: message.kind, tag: message.tag, bytes: message.bytes() };
        let called = message.deadline.checked_sub(message.timeout).unwrap_or_else(Instant::now);
        message.ticket.set_record(self.begin(what, called));
    }

    /// Remembers how call number `number` ended.
    pub(crate) fn end(&self, number: u64, well: bool) {
        self.recorder.end(number, self.made.elapsed(), well);
    }

    /// Remembers why the group failed, and writes all down where a folder was given.
    pub(crate) fn fail(&self, verdict: String) {
        lock(&self.verdict).get_or_insert(verdict);
        if let Some(Err(error)) = self.write() {
            let (group, folder) = (&self.group, &self.folder);
            tracing::warn!(group, ?folder, %error, "the record of the last operations is not written");
        }
    }

    /// Writes all down where a folder was given; a reader sees the whole file, or the one before it.
    fn write(&self) -> Option<io::Result<PathBuf>> {
        let folder = self.folder.as_ref()?;
        let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '-' };
        let group: String = self.group.chars().map(plain).collect();
        let path = folder.join(format!("{group}.rank{}.pid{}.json", self.rank.0, std::process::id()));
        let part = path.with_extension("part");
        let _alone = lock(&self.writing);
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&part, self.to_json()))
            .and_then(|()| std::fs::rename(&part, &path));
        Some(written.map(|()| path))
    }

    /// All of it, as JSON: times in microseconds since 1970.
    pub(crate) fn to_json(&self) -> String {
        let begun = self.recorder.begun();
        let at = |since: Duration| u64::try_from((self.made_at + since).as_micros()).unwrap_or(u64::MAX);
        let records: Vec<Value> = self
            .recorder
            .records()
            .map(|record| {
                let (kind, number, bytes) = match record.what {
                    What::Collective { number, .. } => ("collective", number, None),
                    What::Message { tag, bytes, .. } => ("message", u64::from(tag), Some(bytes)),
                };
                let (way, peer) = record.what.way().unzip();
                json!({
                    "kind": kind,
                    "number": number,
                    "call": record.what.words(),
                    "way": way,
                    "peer": peer.flatten().map(|rank| rank.0),
                    "bytes": bytes,
                    "called_us": at(record.called),
                    "ended_us": record.ended.map(|(when, _)| at(when)),
                    "well": record.ended.map(|(_, well)| well),
                })
            })
            .collect();
        let member = |member: &PeerName| json!({ "host": member.host, "pid": member.pid });
        let all = json!({
            "version": 1,
            "group": self.group,
            "rank": self.rank.0,
            "members": self.members.iter().map(member).collect::<Vec<_>>(),
            "taken_us": at(self.made.elapsed()),
            "verdict": *lock(&self.verdict),
            "forgotten": begun.saturating_sub(Settings::REMEMBERED as u64),
            "records": records,
        });
        all.to_string()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
