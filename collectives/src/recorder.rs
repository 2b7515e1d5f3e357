//! Pure: the last operations of a group, with their times: what a rank remembers for the day when something goes wrong.

use crate::messages::Kind;
use crate::{Fingerprint, Settings};
use gradwire_transport::Rank;
use std::collections::VecDeque;
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

/// The last operations, in the order in which they were called.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    forgotten: u64,
    kept: VecDeque<Record>,
}

impl Recorder {
    /// Remembers a call, in place of the oldest where there is no room; its number is for [`Recorder::end`].
    pub(crate) fn begin(&mut self, what: What, called: Duration) -> u64 {
        if self.kept.len() == Settings::REMEMBERED {
            self.kept.pop_front();
            self.forgotten += 1;
        }
        self.kept.push_back(Record { what, called, ended: None });
        self.forgotten + self.kept.len() as u64 - 1
    }

    /// Remembers the end of call number `number`, unless that has been forgotten.
    pub(crate) fn end(&mut self, number: u64, when: Duration, well: bool) {
        let place = number.checked_sub(self.forgotten).and_then(|place| usize::try_from(place).ok());
        if let Some(record) = place.and_then(|place| self.kept.get_mut(place)) {
            record.ended = Some((when, well));
        }
    }

    /// All that is remembered, the oldest first.
    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        self.kept.iter()
    }
}

impl What {
    /// The call in words.
    pub(crate) fn words(&self) -> String {
        let rank = |rank: Rank| rank.to_string();
        match self {
            Self::Collective { fingerprint, .. } => fingerprint.to_string(),
            Self::Message { kind, bytes, .. } => match kind {
                Kind::Send(to) => format!("send of {bytes} bytes to {}", rank(*to)),
                Kind::Recv(from) => format!("recv of {bytes} bytes from {}", rank(*from)),
                Kind::RecvAny => format!("recv of {bytes} bytes from any rank"),
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
        let mut recorder = Recorder::default();
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
}
