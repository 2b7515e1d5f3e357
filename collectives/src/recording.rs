//! Does: the record of operations by itself, for benchmarks.

use crate::recorder::What;
use crate::trace::Trace;
use crate::{Collective, DType, Fingerprint, Reduction};
use gradwire_transport::Rank;
use std::time::Instant;

/// A record of no group.
pub struct Recording(Trace);

impl Default for Recording {
    fn default() -> Self {
        Self(Trace::new("bench".to_owned(), Rank(0), Vec::new(), None))
    }
}

impl Recording {
    /// Remembers collective number `number` of those called at `called`, and its end, as an engine does.
    pub fn operation(&self, number: u64, called: Instant) {
        let fingerprint = Fingerprint::of(&Collective::AllReduce { op: Reduction::Avg }, DType::F32, 2, false);
        let record = self.0.begin(What::Collective { number, fingerprint }, called);
        self.0.end(record, true);
    }
}
