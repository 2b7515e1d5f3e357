//! Pure: in which order rows may be evicted: lists of rows by how often and how lately they were used, exact, in O(1).

use super::Eviction;

/// Counts that are told apart; what is used more often counts as this often.
const LEVELS: usize = 256;
const NONE: u32 = u32::MAX;

/// What is known of a row: 24 bytes.
#[derive(Clone, Copy)]
struct Mark {
    id: u64,
    before: u32,
    after: u32,
    uses: u32,
    /// In tenths of a second since the table was made: 13 years fit.
    used: u32,
}

#[derive(Clone, Copy)]
struct List {
    first: u32,
    last: u32,
}

/// The order of eviction.
#[derive(Clone)]
pub(crate) struct Usage {
    eviction: Eviction,
    marks: Vec<Mark>,
    lists: Vec<List>,
}

impl Usage {
    /// `rows`: as many are expected, and set aside at once; the system gives the memory when it is written.
    pub(crate) fn new(eviction: Eviction, rows: u64) -> Self {
        let levels = if eviction == Eviction::Lfu { LEVELS } else { 1 };
        let marks = Vec::with_capacity(usize::try_from(rows).unwrap_or(0));
        Self { eviction, marks, lists: vec![List { first: NONE, last: NONE }; levels] }
    }

    /// Bytes taken.
    pub(crate) fn bytes(&self) -> u64 {
        (self.marks.capacity() * size_of::<Mark>()) as u64
    }

    /// `row` begins to hold `id`, used for the first time.
    pub(crate) fn begin(&mut self, row: u32, id: u64, now_ms: u64) {
        let mark = Mark { id, before: NONE, after: NONE, uses: 1, used: tenths(now_ms) };
        let at = row as usize;
        if at == self.marks.len() {
            if self.marks.len() == self.marks.capacity() {
                // By an eighth, since what is doubled is half empty.
                self.marks.reserve_exact((self.marks.len() / 8).max(64));
            }
            self.marks.push(mark);
        } else {
            self.marks[at] = mark;
        }
        self.link(row);
    }

    /// How many uses of `row` there were, and when the last one was, in tenths of a second.
    pub(crate) fn uses(&self, row: u32) -> (u32, u32) {
        let mark = self.marks[row as usize];
        (mark.uses, mark.used)
    }

    /// `row` begins to hold `id`, which was used before.
    pub(crate) fn restore(&mut self, row: u32, id: u64, (uses, used): (u32, u32)) {
        self.begin(row, id, 0);
        self.unlink(row);
        let mark = &mut self.marks[row as usize];
        (mark.uses, mark.used) = (uses.max(1), used);
        self.link(row);
    }

    /// Every row with its id, in the order of eviction.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.lists.iter().flat_map(move |list| {
            let some = |row: u32| Some(row).filter(|&row| row != NONE);
            std::iter::successors(some(list.first), move |&row| some(self.marks[row as usize].after))
                .map(|row| (self.marks[row as usize].id, row))
        })
    }

    /// Brings rows that came out of order into the order of their last uses.
    pub(crate) fn sort(&mut self) {
        let mut rows: Vec<u32> = self.iter().map(|(_, row)| row).collect();
        rows.sort_by_key(|&row| self.marks[row as usize].used);
        self.lists.fill(List { first: NONE, last: NONE });
        rows.into_iter().for_each(|row| self.link(row));
    }

    /// `row` is used again.
    pub(crate) fn touch(&mut self, row: u32, now_ms: u64) {
        self.unlink(row);
        let mark = &mut self.marks[row as usize];
        mark.uses = mark.uses.saturating_add(1);
        mark.used = tenths(now_ms);
        self.link(row);
    }

    /// The row to evict where room is needed: the least lately used, of those least often used where that counts.
    pub(crate) fn weakest(&self) -> Option<(u32, u64)> {
        let row = self.lists.iter().map(|list| list.first).find(|&row| row != NONE)?;
        Some((row, self.marks[row as usize].id))
    }

    /// The row whose time is up, if there is one.
    pub(crate) fn expired(&self, now_ms: u64) -> Option<(u32, u64)> {
        let Eviction::Ttl(lifetime) = self.eviction else { return None };
        let (row, id) = self.weakest()?;
        let lifetime = u32::try_from(lifetime.as_millis() / 100).unwrap_or(u32::MAX);
        (tenths(now_ms).saturating_sub(self.marks[row as usize].used) >= lifetime).then_some((row, id))
    }

    /// `row` holds nothing any more.
    pub(crate) fn end(&mut self, row: u32) {
        self.unlink(row);
    }

    fn list(&self, row: u32) -> usize {
        (self.marks[row as usize].uses as usize).min(self.lists.len()) - 1
    }

    fn link(&mut self, row: u32) {
        let list = self.list(row);
        let last = std::mem::replace(&mut self.lists[list].last, row);
        (self.marks[row as usize].before, self.marks[row as usize].after) = (last, NONE);
        match last {
            NONE => self.lists[list].first = row,
            last => self.marks[last as usize].after = row,
        }
    }

    fn unlink(&mut self, row: u32) {
        let list = self.list(row);
        let Mark { before, after, .. } = self.marks[row as usize];
        match before {
            NONE => self.lists[list].first = after,
            before => self.marks[before as usize].after = after,
        }
        match after {
            NONE => self.lists[list].last = before,
            after => self.marks[after as usize].before = before,
        }
    }
}

fn tenths(now_ms: u64) -> u32 {
    u32::try_from(now_ms / 100).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    /// Uses rows in the given order (each time at the next second), then evicts all of them.
    fn evict_all(eviction: Eviction, uses: &[u32]) -> Vec<u64> {
        let mut usage = Usage::new(eviction, 0);
        let mut known = 0;
        for (&row, now) in uses.iter().zip(0..) {
            if row == known {
                usage.begin(row, row.into(), now * 1000);
                known += 1;
            } else {
                usage.touch(row, now * 1000);
            }
        }
        std::iter::from_fn(|| usage.weakest().inspect(|&(row, _)| usage.end(row)).map(|(_, id)| id)).collect()
    }

    #[test]
    fn the_least_lately_or_least_often_used_goes_first() {
        let uses = [0, 1, 2, 0, 3, 0, 1, 1, 2];
        assert_eq!(evict_all(Eviction::Lru, &uses), [3, 0, 1, 2]);
        assert_eq!(evict_all(Eviction::Lfu, &uses), [3, 2, 0, 1]);
    }

    #[test]
    fn a_row_expires_its_lifetime_after_its_last_use() {
        let mut usage = Usage::new(Eviction::Ttl(Duration::from_secs(10)), 0);
        usage.begin(0, 70, 0);
        usage.begin(1, 71, 4_000);
        usage.touch(0, 8_000);
        assert_eq!(usage.expired(13_900), None);
        assert_eq!(usage.expired(14_000), Some((1, 71)));
        usage.end(1);
        assert_eq!((usage.expired(17_999), usage.expired(18_000)), (None, Some((0, 70))));
    }

    proptest! {
        #[test]
        fn any_uses_give_the_order_of_a_sort(picks in proptest::collection::vec(any::<u32>(), 1..400)) {
            let mut known = 0u32;
            let uses: Vec<u32> = picks.iter().map(|pick| {
                let row = pick % (known + 1).min(40);
                known += u32::from(row == known);
                row
            }).collect();
            let last = |row: u64| uses.iter().rposition(|&use_| u64::from(use_) == row).unwrap();
            let count = |row: u64| uses.iter().filter(|&&use_| u64::from(use_) == row).count().min(LEVELS);
            let mut expected: Vec<u64> = (0..known.into()).collect();
            expected.sort_by_key(|&row| last(row));
            prop_assert_eq!(evict_all(Eviction::Lru, &uses), expected.clone());
            expected.sort_by_key(|&row| (count(row), last(row)));
            prop_assert_eq!(evict_all(Eviction::Lfu, &uses), expected);
        }
    }
}
