//! Does: has all ranks agree which of them share a host.

use super::{Forming, Pairs};
use crate::{Rank, Tag, TransportError, WireKind, select};
use std::time::Instant;

/// Each rank tells rank 0 the lowest rank that it shares memory with; rank 0 tells all what each has said.
const LOWEST: Tag = Tag(Tag::CONTROL_BIT | 12);
const TABLE: Tag = Tag(Tag::CONTROL_BIT | 13);

impl Forming {
    /// For every rank, the lowest rank of its host: whom it shares memory with, or where memory is not used, its boot id.
    pub(super) fn hosts(
        &mut self,
        together: bool,
        pairs: &Pairs,
        deadline: Instant,
    ) -> Result<Vec<u32>, TransportError> {
        let (me, size) = (self.spec.rank, self.spec.world_size);
        if together {
            return Ok(vec![0; size.get() as usize]);
        }
        let boots: Vec<String> = size.ranks().map(|rank| self.boot_id(rank)).collect();
        let by_boot = select::lowest_of_same(&boots);
        if select::knows_hosts_by_boot(self.spec.config.wire, &by_boot) {
            return Ok(by_boot);
        }
        let shares = |rank: Rank| {
            pairs.better.iter().any(|wire| wire.has(rank.into()) && wire.kind(rank.into()) == WireKind::Shm)
        };
        let lowest = size.ranks().find(|&rank| rank == me || shares(rank)).unwrap_or(me);
        if me != Rank(0) {
            self.say(Rank(0), LOWEST, &lowest.0.to_le_bytes())?;
            let bytes = self.hear_bytes(Rank(0), TABLE, 4 * size.get() as usize, deadline)?;
            return Ok(bytes.as_chunks().0.iter().map(|four| u32::from_le_bytes(*four)).collect());
        }
        let mut table = vec![lowest.0];
        for rank in size.ranks().skip(1) {
            let said = self.hear(rank, LOWEST, deadline)?;
            table.push(said.first_chunk().map_or(rank.0, |four| u32::from_le_bytes(*four)));
        }
        let bytes: Vec<u8> = table.iter().flat_map(|lowest| lowest.to_le_bytes()).collect();
        size.ranks().skip(1).try_for_each(|rank| self.say_bytes(rank, TABLE, bytes.clone()))?;
        Ok(table)
    }
}
