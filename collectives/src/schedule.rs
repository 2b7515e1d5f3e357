//! Pure: a collective as plain data, the same kind of list whatever the algorithm and the wire.
//!
//! A schedule is one rank's part of a collective: steps that name spans of its buffers, and which steps each must wait
//! for. Between two ranks messages are met in order: the k-th send from a to b in a's schedule meets the k-th receive
//! from a in b's.

use gradwire_transport::Rank;

/// A buffer of the caller, or the schedule's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// What the caller gives; never written. An in-place collective has none.
    Input,
    /// What the caller gets; holds the caller's contribution too where the collective is in place.
    Output,
    /// Working memory of `Schedule::scratch_len` elements.
    Scratch,
}

/// A run of elements of one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// Which buffer.
    pub place: Place,
    /// First element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

/// Index of a step in its schedule.
pub type StepId = u32;

/// What a step does. Steps of no length are never made, except [`Action::Token`] ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send a span from where it lies.
    Send {
        /// To whom.
        to: Rank,
        /// What.
        span: Span,
    },
    /// Receive where it is to lie.
    Recv {
        /// From whom.
        from: Rank,
        /// Where to.
        span: Span,
    },
    /// Receive and combine into `span` (`span = span ∘ received`).
    RecvReduce {
        /// From whom.
        from: Rank,
        /// What to combine with.
        span: Span,
    },
    /// Receive a message of `span.len` elements from every other rank, then combine all with `own` in rank order, in
    /// `f32` for the 16-bit floats, rounded once, into `span` (which may be `own`).
    FoldAll {
        /// This rank's contribution.
        own: Span,
        /// Where the result goes.
        span: Span,
    },
    /// Copy within this rank.
    Copy {
        /// What.
        from: Span,
        /// Where to, of the same length.
        into: Span,
    },
    /// Divide by the world size where the reduction is an average: done by whoever holds the whole sum of `span`.
    Finish {
        /// What.
        span: Span,
    },
    /// Nothing: ends when what it waits for has, so that a step can wait for more than two.
    Join,
    /// Send an empty message: "I am here".
    SendToken {
        /// To whom.
        to: Rank,
    },
    /// Receive an empty message.
    RecvToken {
        /// From whom.
        from: Rank,
    },
}

/// One step, and the steps that must have ended before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to do.
    pub action: Action,
    /// Earlier steps (smaller ids) that must have ended.
    pub after: [Option<StepId>; 2],
}

/// One rank's part of a collective.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// In an order in which they can be run one by one.
    pub steps: Vec<Step>,
    /// Elements of scratch that the steps use.
    pub scratch_len: usize,
}

impl Schedule {
    /// Appends a step that waits for `after`, and returns its id.
    pub fn push(&mut self, action: Action, after: [Option<StepId>; 2]) -> StepId {
        let id = StepId::try_from(self.steps.len()).expect("a schedule has fewer than 2^32 steps");
        debug_assert!(after.iter().flatten().all(|&earlier| earlier < id), "steps wait for earlier steps only");
        self.steps.push(Step { action, after });
        id
    }
}
