//! Pure: a schedule in the making, which knows who writes and who reads each element last, and so what a step waits for.
//!
//! A step that reads waits for who wrote last; one that writes, for who wrote and for all who read since. So a schedule is
//! written down as if its steps were run one after the other, and may then be run in any order that the waits allow.

use crate::{Action, Schedule, Span, StepId};
use gradwire_transport::Rank;
use std::collections::BTreeMap;

/// A schedule in the making.
pub struct Draft {
    schedule: Schedule,
    /// By place, then by first element: who did what with these elements last. Together they cover every element.
    marks: [BTreeMap<usize, Mark>; 3],
}

#[derive(Clone)]
struct Mark {
    end: usize,
    writer: Option<StepId>,
    readers: Vec<StepId>,
}

impl Default for Draft {
    fn default() -> Self {
        let untouched = || BTreeMap::from([(0, Mark { end: usize::MAX, writer: None, readers: vec![] })]);
        Self { schedule: Schedule::default(), marks: [untouched(), untouched(), untouched()] }
    }
}

impl Draft {
    /// Sends `span`.
    pub fn send(&mut self, to: Rank, span: Span) {
        self.step(Action::Send { to, span }, Some(span), None);
    }

    /// Receives `span`.
    pub fn recv(&mut self, from: Rank, span: Span) {
        self.step(Action::Recv { from, span }, None, Some(span));
    }

    /// Receives and combines into `span`.
    pub fn recv_reduce(&mut self, from: Rank, span: Span) {
        self.step(Action::RecvReduce { from, span }, None, Some(span));
    }

    /// Copies.
    pub fn copy(&mut self, from: Span, into: Span) {
        self.step(Action::Copy { from, into }, Some(from), Some(into));
    }

    /// Divides where the reduction is an average.
    pub fn finish(&mut self, span: Span) {
        self.step(Action::Finish { span }, None, Some(span));
    }

    /// The schedule, which uses `scratch_len` elements of scratch.
    pub fn into_schedule(mut self, scratch_len: usize) -> Schedule {
        self.schedule.scratch_len = scratch_len;
        self.schedule
    }

    fn step(&mut self, action: Action, reads: Option<Span>, writes: Option<Span>) {
        if reads.or(writes).is_none_or(|span| span.len == 0) {
            return;
        }
        let mut after: Vec<StepId> = Vec::new();
        if let Some(span) = reads {
            after.extend(self.within(span).iter().filter_map(|mark| mark.writer));
        }
        if let Some(span) = writes {
            self.within(span).iter().for_each(|mark| after.extend(mark.writer.iter().chain(&mark.readers)));
        }
        after.sort_unstable();
        after.dedup();
        while after.len() > 2 {
            // The earliest first: they end first.
            let join = self.schedule.push(Action::Join, [Some(after[0]), Some(after[1])]);
            after.splice(0..2, []);
            after.push(join);
        }
        let id = self.schedule.push(action, [after.first().copied(), after.get(1).copied()]);
        if let Some(span) = reads {
            self.within(span).into_iter().for_each(|mark| mark.readers.push(id));
        }
        if let Some(span) = writes {
            for mark in self.within(span) {
                mark.writer = Some(id);
                mark.readers.clear();
            }
        }
    }

    /// The marks of exactly the elements of `span`.
    fn within(&mut self, span: Span) -> Vec<&mut Mark> {
        let marks = &mut self.marks[span.place as usize];
        let (start, end) = (span.start, span.start + span.len);
        for at in [start, end] {
            if let Some((_, mark)) = marks.range_mut(..at).next_back()
                && mark.end > at
            {
                let rest = mark.clone();
                mark.end = at;
                marks.insert(at, rest);
            }
        }
        marks.range_mut(start..end).map(|(_, mark)| mark).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Place;

    fn span(start: usize, len: usize) -> Span {
        Span { place: Place::Output, start, len }
    }

    #[test]
    fn a_write_waits_for_all_who_touched_its_elements_and_for_nobody_else() {
        let mut draft = Draft::default();
        draft.send(Rank(1), span(0, 10)); // 0
        draft.recv(Rank(2), span(10, 10)); // 1
        draft.send(Rank(1), span(15, 10)); // 2 waits for 1
        draft.recv(Rank(1), span(5, 15)); // waits for 0, 1 and 2: 3 joins 0 and 1
        draft.recv(Rank(1), span(30, 5)); // 5 waits for nobody
        draft.send(Rank(3), span(0, 5)); // 6 neither: 0 read only
        draft.send(Rank(3), span(19, 2)); // 7 waits for 4
        let steps = draft.into_schedule(0).steps;
        let after: Vec<Vec<StepId>> = steps.iter().map(|step| step.after.iter().flatten().copied().collect()).collect();
        assert_eq!(after, [vec![], vec![], vec![1], vec![0, 1], vec![2, 3], vec![], vec![], vec![4]]);
        assert_eq!(steps[3].action, Action::Join);
    }

    #[test]
    fn nothing_is_no_step() {
        let mut draft = Draft::default();
        draft.recv(Rank(1), span(3, 0));
        assert!(draft.into_schedule(0).steps.is_empty());
    }
}
