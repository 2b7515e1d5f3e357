//! Pure: the last operations of a group, with their times: what a rank remembers for the day when something goes wrong.
//!
//! One thread at a time writes, who has the engine, and anybody reads, also while that one waits for ranks. So there is no lock,
//! which would cost every call as much as a step at the shared segment, but a stamp on every place (a seqlock): who reads a
//! place while it is written anew sees that by the stamp, and passes it over.

use crate::messages::Kind;
use crate::{Fingerprint, Settings};
use gradwire_transport::Rank;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

/// What was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A collective, and its number in the group.
    Collective { number: u64, fingerprint: Fingerprint },
    /// A message; the other end of a receive from any rank is not known before it has come.
    Message { kind: Kind, tag: u32, bytes: usize },
}

/// One operation. Times count from the making of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) what: What,
    /// When it was called.
    pub(crate) called: Duration,
    /// When it ended, and whether well; `None` while it is under way.
    pub(crate) ended: Option<(Duration, bool)>,
}

/// The last operations, in the order in which they were called. [`Recorder::begin`] and [`Recorder::end`] are for one thread at
/// a time.
pub(crate) struct Recorder {
    begun: AtomicU64,
    places: Box<[Place]>,
}

/// A record in words that can be read while they are written.
#[derive(Default)]
struct Place {
    /// One more than the number of the record that is here; 0: none, or one that is being written.
    stamp: AtomicU64,
    what: [AtomicU64; 3],
    called: AtomicU64,
    /// Twice the time, and one more where it ended well; 0 while it is under way.
    ended: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Self {
        let places = (0..Settings::REMEMBERED).map(|_| Place::default()).collect();
        Self { begun: AtomicU64::new(0), places }
    }
}

impl Recorder {
    /// Remembers a call, in place of the oldest where there is no room; its number is for [`Recorder::end`].
    pub(crate) fn begin(&self, what: What, called: Duration) -> u64 {
        let number = self.begun.load(Ordering::Relaxed);
        let place = self.place(number);
        place.stamp.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        place.what.iter().zip(what.to_words()).for_each(|(place, word)| place.store(word, Ordering::Relaxed));
        place.called.store(nanoseconds(called), Ordering::Relaxed);
        place.ended.store(0, Ordering::Relaxed);
        place.stamp.store(number + 1, Ordering::Release);
        self.begun.store(number + 1, Ordering::Release);
        number
    }

    /// Remembers the end of call number `number`, unless that has been forgotten.
    pub(crate) fn end(&self, number: u64, when: Duration, well: bool) {
        let place = self.place(number);
        if place.stamp.load(Ordering::Relaxed) == number + 1 {
            place.ended.store(nanoseconds(when).max(1) << 1 | u64::from(well), Ordering::Release);
        }
    }

    /// All that is remembered, the oldest first, but for what is forgotten meanwhile.
    pub(crate) fn records(&self) -> impl Iterator<Item = Record> {
        let begun = self.begun.load(Ordering::Acquire);
        (begun.saturating_sub(self.places.len() as u64)..begun).filter_map(|number| self.place(number).read(number))
    }

    /// Operations so far, with those that have been forgotten.
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    fn place(&self, number: u64) -> &Place {
        &self.places[(number % self.places.len() as u64) as usize]
    }
}

impl Place {
    fn read(&self, number: u64) -> Option<Record> {
        let is_here = |order| self.stamp.load(order) == number + 1;
        if !is_here(Ordering::Acquire) {
            return None;
        }
        let words = [0, 1, 2].map(|at: usize| self.what[at].load(Ordering::Relaxed));
        let called = Duration::from_nanos(self.called.load(Ordering::Relaxed));
        let ended = self.ended.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let ended = (ended > 0).then(|| (Duration::from_nanos(ended >> 1), ended % 2 == 1));
        is_here(Ordering::Relaxed).then(|| Record { what: What::from_words(words), called, ended })
    }
}

/// Of some centuries at most.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).map_or(u64::MAX >> 1, |time| time.min(u64::MAX >> 1))
}

impl What {
    /// As three words: what it is and of which rank, and what else there is.
    fn to_words(self) -> [u64; 3] {
        let message = |kind: u64, rank: Rank, tag: u32, bytes: usize| {
            [kind | u64::from(rank.0) << 8, u64::from(tag), bytes as u64]
        };
        match self {
            Self::Collective { number, fingerprint } => [0, number, fingerprint.0],
            Self::Message { kind: Kind::Send(to), tag, bytes } => message(1, to, tag, bytes),
            Self::Message { kind: Kind::Recv(from), tag, bytes } => message(2, from, tag, bytes),
            Self::Message { kind: Kind::RecvAny, tag, bytes } => message(3, Rank(0), tag, bytes),
            Self::Message { kind: Kind::Fetch(from), tag, bytes } => message(4, from, tag, bytes),
        }
    }

    /// The same back: of words that were made of a call.
    fn from_words([head, first, second]: [u64; 3]) -> Self {
        let rank = Rank((head >> 8) as u32);
        let kind = match head & 0xff {
            0 => return Self::Collective { number: first, fingerprint: Fingerprint(second) },
            1 => Kind::Send(rank),
            2 => Kind::Recv(rank),
            3 => Kind::RecvAny,
            _ => Kind::Fetch(rank),
        };
        Self::Message { kind, tag: first as u32, bytes: second as usize }
    }

    /// Of a message: what is done with it, and with whom, as far as that is known.
    pub(crate) fn way(&self) -> Option<(&'static str, Option<Rank>)> {
        match self {
            Self::Collective { .. } => None,
            Self::Message { kind, .. } => Some(match kind {
                Kind::Send(to) => ("send", Some(*to)),
                Kind::Recv(from) => ("recv", Some(*from)),
                Kind::RecvAny => ("recv", None),
                Kind::Fetch(from) => ("fetch", Some(*from)),
            }),
        }
    }

    /// The call in words.
    pub(crate) fn words(&self) -> String {
        let rank = |rank: Rank| rank.to_string();
        match self {
            Self::Collective { fingerprint, .. } => fingerprint.to_string(),
            Self::Message { kind, bytes, .. } => match kind {
                Kind::Send(to) => format!("send of {bytes} bytes to {}", rank(*to)),
                Kind::Recv(from) => format!("recv of {bytes} bytes from {}", rank(*from)),
                Kind::RecvAny => format!("recv of {bytes} bytes from any rank"),
                Kind::Fetch(from) => format!("reading {bytes} bytes of the device of {}", rank(*from)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Collective, DType};

    fn call(number: u64) -> What {
        What::Collective { number, fingerprint: Fingerprint::of(&Collective::Barrier, DType::F32, 0, false) }
    }

    #[test]
    fn the_oldest_are_forgotten_and_their_ends_are_passed_over() {
        let recorder = Recorder::default();
        let most = Settings::REMEMBERED as u64;
        for number in 0..most + 3 {
            assert_eq!(recorder.begin(call(number), Duration::from_secs(number)), number);
        }
        recorder.end(2, Duration::from_secs(9999), true);
        recorder.end(3, Duration::from_secs(9999), false);
        recorder.end(most + 3, Duration::from_secs(9999), true);
        let records: Vec<_> = recorder.records().collect();
        assert_eq!(records.len() as u64, most);
        assert_eq!((records[0].what, records[0].ended), (call(3), Some((Duration::from_secs(9999), false))));
        assert!(records[1..].iter().all(|record| record.ended.is_none()));
    }

    #[test]
    fn calls_are_read_as_they_were_written() {
        let recorder = Recorder::default();
        let kinds = [Kind::Send(Rank(u32::MAX)), Kind::Recv(Rank(7)), Kind::RecvAny, Kind::Fetch(Rank(3))];
        let message = |kind| What::Message { kind, tag: u32::MAX, bytes: usize::MAX };
        let calls: Vec<What> = kinds.map(message).into_iter().chain([call(u64::MAX)]).collect();
        for (number, what) in calls.iter().enumerate() {
            recorder.begin(*what, Duration::from_nanos(number as u64));
        }
        recorder.end(1, Duration::ZERO, true);
        let records: Vec<_> = recorder.records().collect();
        assert_eq!(records.iter().map(|record| record.what).collect::<Vec<_>>(), calls);
        assert_eq!(records[1].ended, Some((Duration::from_nanos(1), true)), "one that ends at once has ended");
    }

    #[test]
    fn who_reads_while_calls_are_written_sees_whole_ones() {
        let (recorder, done) = (Recorder::default(), std::sync::atomic::AtomicBool::new(false));
        let bytes = |tag: u32| (u64::from(tag) * 0x9e37_79b9) as usize;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for tag in 0..200_000 {
                    let kind = Kind::Send(Rank(tag));
                    let time = Duration::from_nanos(u64::from(tag) + 1);
                    let number = recorder.begin(What::Message { kind, tag, bytes: bytes(tag) }, time);
                    recorder.end(number, time, tag % 2 == 0);
                }
                done.store(true, Ordering::Release);
            });
            let mut seen = 0;
            while !done.load(Ordering::Acquire) || seen == 0 {
                let mut last = None;
                for Record { what, called, ended } in recorder.records() {
                    let What::Message { kind: Kind::Send(Rank(rank)), tag, bytes: length } = what else {
                        panic!("{what:?} was never called");
                    };
                    assert_eq!((rank, length), (tag, bytes(tag)));
                    let time = Duration::from_nanos(u64::from(tag) + 1);
                    assert!(called == time && ended.is_none_or(|end| end == (time, tag % 2 == 0)) && last < Some(tag));
                    (seen, last) = (seen + 1, Some(tag));
                }
            }
        });
    }
}
