//! Pure: who is at fault, decided from what every rank says of itself, and told to all.

use crate::{CollectiveError, Fingerprint, Operation};
use gradwire_transport::{PeerName, Rank};
use std::fmt;
use std::time::Duration;

/// A rank as an error names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its place in the group.
    pub rank: Rank,
    /// Its host.
    pub host: String,
    /// Its process id.
    pub pid: u32,
}

impl Member {
    /// What is known of `rank`, from the table of members.
    pub fn of(rank: Rank, members: &[PeerName]) -> Self {
        match members.get(rank.index()) {
            Some(name) => Self { rank, host: name.host.clone(), pid: name.pid },
            None => Self { rank, host: "unknown".to_owned(), pid: 0 },
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (host {}, pid {})", self.rank, self.host, self.pid)
    }
}

/// Members one after the other: "rank 2 (host a, pid 12), rank 3 (…)".
pub(crate) fn list_members(members: &[Member]) -> String {
    members.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What one rank says when it is asked how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Collectives that it has begun.
    pub begun: u64,
    /// What it called as the one asked about; `None` where it has not begun it, or no longer knows.
    pub fingerprint: Option<u64>,
}

/// The end of a group, agreed by all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Ranks died.
    Failed {
        /// Who.
        ranks: Vec<Rank>,
        /// What was seen of it.
        cause: String,
    },
    /// Ranks did not come in time.
    Late {
        /// Who; nobody where all came but no data moved.
        missing: Vec<Rank>,
        /// The deadline.
        waited: Duration,
    },
    /// A rank called something else.
    Differs {
        /// Who.
        rank: Rank,
        /// What the others called.
        expected: u64,
        /// What it called.
        got: u64,
    },
    /// A rank gave another as many elements of its part as that one did not await.
    Parts {
        /// Who gave.
        sender: Rank,
        /// Who took.
        receiver: Rank,
        /// Elements that were given.
        sent: u64,
        /// Elements that were awaited.
        awaited: u64,
    },
    /// A rank gave a number that is none.
    NotANumber {
        /// Who.
        rank: Rank,
        /// Which element of what it gave is the first.
        element: u64,
    },
    /// A rank gave up on purpose.
    Aborted {
        /// Who, and why.
        reason: String,
    },
}

impl Verdict {
    /// The verdict as this rank's error.
    pub fn error(&self, operation: Operation, members: &[PeerName]) -> CollectiveError {
        let operation = Box::new(operation);
        let named = |ranks: &[Rank]| ranks.iter().map(|&rank| Member::of(rank, members)).collect();
        match self {
            Self::Failed { ranks, cause } => {
                CollectiveError::RankFailed { operation, ranks: named(ranks), cause: cause.clone() }
            }
            Self::Late { missing, waited } => {
                CollectiveError::Timeout { operation, missing: named(missing), waited: *waited }
            }
            Self::Differs { rank, expected, got } => CollectiveError::Mismatch {
                operation,
                rank: Member::of(*rank, members),
                expected: Fingerprint(*expected).to_string(),
                got: Fingerprint(*got).to_string(),
            },
            Self::Parts { sender, receiver, sent, awaited } => CollectiveError::PartsDiffer {
                operation,
                sender: Member::of(*sender, members),
                receiver: Member::of(*receiver, members),
                sent: *sent,
                awaited: *awaited,
            },
            Self::NotANumber { rank, element } => {
                CollectiveError::NotANumber { operation, rank: Member::of(*rank, members), element: *element }
            }
            Self::Aborted { reason } => CollectiveError::Aborted { reason: reason.clone() },
        }
    }

    /// Decides from all ranks' answers (index = rank; `None`: no answer) about collective number `sequence`.
    ///
    /// Of the ranks that gave NaN the lowest is at fault. Else a rank that differs from the majority is at fault (at a tie, from the lowest rank that answered); where none
    /// differs, those who have not come, or do not answer, are missing.
    pub fn conclude(sequence: u64, answers: &[Option<Answer>], waited: Duration) -> Self {
        let calls: Vec<(Rank, u64)> = (0u32..)
            .zip(answers)
            .filter_map(|(rank, answer)| Some((Rank(rank), answer.as_ref()?.fingerprint?)))
            .collect();
        let nan = calls.iter().find_map(|&(rank, call)| Some((rank, Fingerprint(call).nan()?)));
        if let Some((rank, element)) = nan {
            return Self::NotANumber { rank, element };
        }
        if let Some(expected) = majority(&calls)
            && let Some(&(rank, got)) = calls.iter().find(|(_, call)| *call != expected)
        {
            return Self::Differs { rank, expected, got };
        }
        let missing = (0u32..)
            .zip(answers)
            .filter(|(_, answer)| answer.is_none_or(|answer| answer.begun <= sequence))
            .map(|(rank, _)| Rank(rank))
            .collect();
        Self::Late { missing, waited }
    }
}

fn majority(calls: &[(Rank, u64)]) -> Option<u64> {
    let count = |call: u64| calls.iter().filter(|(_, other)| *other == call).count();
    let first = calls.first()?.1;
    Some(
        calls
            .iter()
            .map(|(_, call)| *call)
            .fold(first, |best, call| if count(call) > count(best) { call } else { best }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(begun: u64, fingerprint: Option<u64>) -> Option<Answer> {
        Some(Answer { begun, fingerprint })
    }

    #[test]
    fn who_does_not_answer_or_has_not_begun_is_missing() {
        let answers = [at(6, Some(1)), None, at(5, None), at(7, None)];
        assert_eq!(
            Verdict::conclude(5, &answers, SECOND),
            Verdict::Late { missing: vec![Rank(1), Rank(2)], waited: SECOND }
        );
    }

    #[test]
    fn of_those_who_gave_nan_the_lowest_is_named_also_where_they_are_most() {
        let nan = |element| at(6, Some(Fingerprint::of_nan(element).0));
        let named = Verdict::NotANumber { rank: Rank(1), element: 7 };
        assert_eq!(Verdict::conclude(5, &[at(6, Some(1)), nan(7), nan(3), None], SECOND), named);
        assert_eq!(Verdict::conclude(5, &[at(5, None), nan(7), nan(7), nan(7)], SECOND), named);
    }

    #[test]
    fn the_minority_differs() {
        let answers = [at(6, Some(9)), at(6, Some(1)), at(6, Some(1)), None];
        assert_eq!(Verdict::conclude(5, &answers, SECOND), Verdict::Differs { rank: Rank(0), expected: 1, got: 9 });
    }

    #[test]
    fn at_a_tie_the_lowest_rank_is_taken_as_right() {
        let answers = [at(6, Some(9)), at(6, Some(1))];
        assert_eq!(Verdict::conclude(5, &answers, SECOND), Verdict::Differs { rank: Rank(1), expected: 9, got: 1 });
    }
}
