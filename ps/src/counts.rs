//! Pure: what a table has counted on one shard.

use crate::body::{BadBody, Reader, Writer};

/// Counters of a table on one shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) pushes: u64,
    pub(crate) pulls: u64,
    pub(crate) duplicates: u64,
    /// Bytes of gradients and values: as they travelled, and in the table's type.
    pub(crate) pushed: [u64; 2],
    pub(crate) pulled: [u64; 2],
}

impl Counts {
    /// A part of a push: its payload, and the same gradient in the table's type.
    pub(crate) fn push(&mut self, duplicate: bool, bytes: [u64; 2]) {
        self.pushes += u64::from(!duplicate);
        self.duplicates += u64::from(duplicate);
        add(&mut self.pushed, bytes);
    }

    /// Values that were asked for: as they leave, and in the table's type.
    pub(crate) fn values(&mut self, bytes: [u64; 2]) {
        add(&mut self.pulled, bytes);
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        let Self { pushes, pulls, duplicates, pushed, pulled } = *self;
        [pushes, pulls, duplicates].into_iter().chain(pushed).chain(pulled).for_each(|n| out.number(n));
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        Ok(Self {
            pushes: from.number()?,
            pulls: from.number()?,
            duplicates: from.number()?,
            pushed: [from.number()?, from.number()?],
            pulled: [from.number()?, from.number()?],
        })
    }

    /// Counts what another shard has counted as well.
    pub(crate) fn merge(&mut self, other: &Self) {
        let Self { pushes, pulls, duplicates, pushed: [sent, meant], pulled: [got, held] } = self;
        let mine = [pushes, pulls, duplicates, sent, meant, got, held];
        let [more_sent, more_meant] = other.pushed;
        let [more_got, more_held] = other.pulled;
        let theirs = [other.pushes, other.pulls, other.duplicates, more_sent, more_meant, more_got, more_held];
        mine.into_iter().zip(theirs).for_each(|(mine, theirs)| *mine = mine.saturating_add(theirs));
    }
}

fn add(sums: &mut [u64; 2], numbers: [u64; 2]) {
    sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
}
