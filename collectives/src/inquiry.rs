//! Pure: the question "how far are you?" under way: who has been asked, who has answered, when to decide.

use crate::verdict::{Answer, Verdict};
use gradwire_transport::{Rank, WorldSize};
use std::time::{Duration, Instant};

/// How long ranks have to answer. A rank that is in the operation answers at its next turn; 200 ms covers a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_millis(200);

/// One inquiry.
#[derive(Clone, Debug)]
pub(crate) struct Inquiry {
    sequence: u64,
    waited: Duration,
    answers: Vec<Option<Answer>>,
    until: Instant,
}

impl Inquiry {
    /// Asks about collective number `sequence`; `own` is this rank's answer.
    pub(crate) fn new(
        sequence: u64,
        waited: Duration,
        (rank, own): (Rank, Answer),
        world_size: WorldSize,
        now: Instant,
    ) -> Self {
        let mut answers = vec![None; world_size.get() as usize];
        answers[rank.index()] = Some(own);
        Self { sequence, waited, answers, until: now + PATIENCE }
    }

    /// Takes an answer; one to another question is passed over.
    pub(crate) fn on_answer(&mut self, from: Rank, sequence: u64, answer: Answer) {
        if sequence == self.sequence
            && let Some(slot) = self.answers.get_mut(from.index())
        {
            *slot = Some(answer);
        }
    }

    /// The verdict, once all have told what they called or the time is up.
    pub(crate) fn verdict(&self, now: Instant) -> Option<Verdict> {
        // A rank that has not come yet may be the one that shows who is in the minority.
        let all = self.answers.iter().all(|answer| answer.is_some_and(|answer| answer.fingerprint.is_some()));
        (all || now >= self.until).then(|| Verdict::conclude(self.sequence, &self.answers, self.waited))
    }

    /// When to decide at the latest.
    pub(crate) fn until(&self) -> Instant {
        self.until
    }

    /// The number of the collective asked about.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_when_all_have_told_or_at_the_end_of_patience() {
        let (now, size) = (Instant::now(), WorldSize::new(2).unwrap());
        let begun = Answer { begun: 4, fingerprint: Some(1) };
        let mut inquiry = Inquiry::new(3, Duration::from_secs(9), (Rank(0), begun), size, now);
        assert_eq!(inquiry.verdict(now), None);
        let late = Verdict::Late { missing: vec![Rank(1)], waited: Duration::from_secs(9) };
        assert_eq!(inquiry.verdict(now + PATIENCE), Some(late));
        inquiry.on_answer(Rank(1), 2, begun);
        assert_eq!(inquiry.verdict(now), None, "an answer to another question");
        inquiry.on_answer(Rank(1), 3, Answer { begun: 3, fingerprint: None });
        assert_eq!(inquiry.verdict(now), None, "it may come yet");
        inquiry.on_answer(Rank(1), 3, begun);
        assert!(inquiry.verdict(now).is_some());
    }
}
