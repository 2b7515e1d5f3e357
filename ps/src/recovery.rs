//! Pure: what becomes of a table when a server dies, as all clients of it choose, and where that choice cannot be kept.

use crate::body::{BadBody, Reader, Writer};
use crate::control::MAX_REPLICAS;
use crate::refusal::{Reason, Refusal};
use crate::shard::{Checkpointing, Limits};
use crate::{Codec, Compression, Mode};
use std::fmt;
use std::time::Duration;

/// The shortest time between two checkpoints that a table may ask for.
const SHORTEST: Duration = Duration::from_secs(1);
/// What else keeps checkpoints, where servers cannot ask for them themselves.
const BY_HAND: &str =
    "recovery=\"checkpoint\" and who asks for them: gradwire-ps snapshot --servers ... --every, or client.snapshot()";

/// What becomes of a table when a server of it dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Recovery {
    /// It is gone.
    #[default]
    None,
    /// Other servers have all of it and one takes its place: what was acknowledged is there, and nothing counts twice.
    Replicate {
        /// Copies beside the first, at least: so many servers may die at once.
        copies: u32,
    },
    /// The servers keep checkpoints, and begin with the last one: what was pushed after it is pushed again.
    Checkpoint {
        /// How long after a checkpoint the next is taken, at most; `None`: as the servers are told.
        every: Option<Duration>,
    },
    /// Its workers, who have all pulled it, give its values again ([`crate::Client::recover`]). Costs nothing before that; what
    /// only the lost server had, the optimizer's state for its share, begins anew.
    Workers,
}

impl Recovery {
    /// Refuses a choice that a shard with such limits cannot keep for a table of which it has the part `place`: which, of how many.
    pub(crate) fn check(self, limits: &Limits, place: (u32, u32), subject: String) -> Result<(), Refusal> {
        let (expected, got) = match (self, limits.checkpoints) {
            (Self::Replicate { copies }, _) if limits.replicas < copies => (
                format!("servers that have backups (serve --coordinator, of one with --replicas {copies})"),
                format!("{self}, and each shard has {} copies", limits.replicas),
            ),
            (Self::Checkpoint { .. }, Checkpointing::Never) => (
                "servers that keep checkpoints (serve --checkpoint-dir)".to_owned(),
                "checkpoint, and this one keeps none".to_owned(),
            ),
            (Self::Checkpoint { every: Some(_) }, Checkpointing::WhenAsked) => (
                format!(
                    "servers that take checkpoints by themselves (gradwire-ps serve --checkpoint-dir), or {BY_HAND}"
                ),
                format!("{self}, and these take one only when they are asked"),
            ),
            (Self::Checkpoint { every: Some(_) }, Checkpointing::AsWanted { shard, shards })
                if place != (shard, shards) =>
            {
                (
                    format!(
                        "all {} shards of the table in one process (serve --shards {}), or servers that clients find by a coordinator, or {BY_HAND}",
                        place.1, place.1
                    ),
                    format!(
                        "{self} of part {} of {}, at the server of shard {shard} of {shards}: nobody would ask all of them together",
                        place.0, place.1
                    ),
                )
            }
            _ => return Ok(()),
        };
        Err(Refusal::new(Reason::Mismatch, subject, "recovery", expected, got))
    }

    /// Whether other servers have all of it.
    pub(crate) fn replicates(self) -> bool {
        matches!(self, Self::Replicate { .. })
    }

    /// How long after a checkpoint it wants the next, if it says.
    pub fn every(self) -> Option<Duration> {
        if let Self::Checkpoint { every } = self { every } else { None }
    }

    /// Says what is wrong with that, if anything.
    pub(crate) fn check_numbers(self) -> Result<(), String> {
        match self {
            Self::Checkpoint { every: Some(every) } if every < SHORTEST => {
                Err(format!("a checkpoint every {every:?}: it is written whole, so no more often than {SHORTEST:?}"))
            }
            Self::Replicate { copies } if !(1..=MAX_REPLICAS).contains(&copies) => {
                Err(format!("replicate, with {copies} copies: 1 to {MAX_REPLICAS} can be had"))
            }
            _ => Ok(()),
        }
    }

    /// Says why a dense table of this kind cannot be recovered so, if it cannot.
    pub(crate) fn check_table(self, mode: Mode, clipped: bool, compression: Compression) -> Result<(), String> {
        self.check_numbers()?;
        if self != Self::Workers {
            return Ok(());
        }
        if !matches!(mode, Mode::Sync { .. }) {
            return Err(format!("workers, of a table that is {mode}: at no clock do its workers have the same values"));
        }
        if clipped {
            return Err(
                "workers, of a clipped table: a norm is over many tables, which may be at different clocks".into()
            );
        }
        if compression != (Compression { push: Codec::Whole, pull: Codec::Whole }) {
            return Err(format!(
                "workers, with compression {compression}: they have no whole values, or pushes leave some out"
            ));
        }
        Ok(())
    }

    pub(crate) fn encode(self, out: &mut Writer) {
        out.byte(match self {
            Self::None => 0,
            Self::Replicate { copies: 1 } => 1,
            Self::Workers => 2,
            Self::Checkpoint { every: None } => 3,
            Self::Checkpoint { every: Some(_) } => 4,
            Self::Replicate { .. } => 5,
        });
        if let Self::Replicate { copies: copies @ (0 | 2..) } = self {
            out.number(copies.into());
        }
        if let Some(every) = self.every() {
            out.number(u64::try_from(every.as_millis()).unwrap_or(u64::MAX));
        }
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        match from.byte()? {
            0 => Ok(Self::None),
            1 => Ok(Self::Replicate { copies: 1 }),
            2 => Ok(Self::Workers),
            3 => Ok(Self::Checkpoint { every: None }),
            4 => Ok(Self::Checkpoint { every: Some(Duration::from_millis(from.number()?)) }),
            5 => match u32::try_from(from.number()?) {
                Ok(copies @ 1..=MAX_REPLICAS) => Ok(Self::Replicate { copies }),
                _ => Err(BadBody("no such number of copies")),
            },
            _ => Err(BadBody("no such recovery")),
        }
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Replicate { copies: 1 } => "replicate",
            Self::Replicate { copies } => return write!(f, "replicate with {copies} copies"),
            Self::Workers => "workers",
            Self::Checkpoint { every: None } => "checkpoint",
            Self::Checkpoint { every: Some(every) } => return write!(f, "checkpoint every {every:?}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Recovery = Recovery::Checkpoint { every: None };

    const ONCE: Recovery = Recovery::Replicate { copies: 1 };
    const TWICE: Recovery = Recovery::Replicate { copies: 2 };

    fn asking(ms: u64) -> Recovery {
        Recovery::Checkpoint { every: Some(Duration::from_millis(ms)) }
    }

    #[test]
    fn a_table_says_how_often_it_wants_a_checkpoint_within_reason() {
        assert_eq!((FREE.every(), Recovery::Workers.every()), (None, None));
        assert_eq!(asking(1500).to_string(), "checkpoint every 1.5s");
        assert!(FREE.check_numbers().is_ok() && asking(1000).check_numbers().is_ok());
        let refused = asking(0).check_table(Mode::Async, false, Compression::default()).unwrap_err();
        assert!(refused.contains("no more often than 1s"), "{refused}");
        assert!(ONCE.check_numbers().is_ok() && TWICE.check_numbers().is_ok());
        for copies in [0, MAX_REPLICAS + 1] {
            let refused = Recovery::Replicate { copies }.check_numbers().unwrap_err();
            assert!(refused.contains("1 to 7 can be had"), "{refused}");
            let mut body = Writer::default();
            Recovery::Replicate { copies }.encode(&mut body);
            assert!(Recovery::decode(&mut Reader(&body.0)).is_err());
        }
    }

    #[test]
    fn what_the_servers_must_do_for_a_table_is_asked_for() {
        use Checkpointing::{AsWanted, Never, WhenAsked};
        let check = |recovery: Recovery, replicas, checkpoints| {
            let limits = Limits { replicas, checkpoints, ..Limits::default() };
            recovery.check(&limits, (1, 3), "table \"w\"".into())
        };
        assert!([Recovery::None, Recovery::Workers].into_iter().all(|it| check(it, 0, Never).is_ok()));
        assert!(check(ONCE, 1, Never).is_ok() && check(TWICE, 3, Never).is_ok());
        // Which part of a table a shard has matters only where somebody must ask all of them together.
        for asked in [WhenAsked, AsWanted { shard: 0, shards: 1 }, AsWanted { shard: 1, shards: 3 }] {
            assert!(check(FREE, 0, asked).is_ok());
        }
        assert!(check(asking(2500), 0, AsWanted { shard: 1, shards: 3 }).is_ok());
        for (recovery, replicas, checkpoints, remedy) in [
            (ONCE, 0, WhenAsked, "--coordinator"),
            (TWICE, 1, WhenAsked, "--replicas 2"),
            (FREE, 1, Never, "--checkpoint-dir"),
            (asking(2500), 1, Never, "--checkpoint-dir"),
            (asking(2500), 1, WhenAsked, "snapshot --servers"),
            (asking(2500), 1, AsWanted { shard: 0, shards: 1 }, "serve --shards 3"),
            (asking(2500), 1, AsWanted { shard: 0, shards: 3 }, "coordinator"),
        ] {
            let refusal = check(recovery, replicas, checkpoints).unwrap_err().to_string();
            assert!(refusal.contains(remedy) && refusal.contains("table \"w\""), "{refusal}");
        }
        for recovery in [Recovery::None, ONCE, TWICE, FREE, asking(2500), Recovery::Workers] {
            let mut body = Writer::default();
            recovery.encode(&mut body);
            assert_eq!(Recovery::decode(&mut Reader(&body.0)), Ok(recovery));
        }
        assert!(Recovery::decode(&mut Reader(&[9])).is_err());
    }

    #[test]
    fn workers_give_again_only_what_all_of_them_have_whole_at_one_clock() {
        let (sync, whole) = (Mode::Sync { workers: 2 }, Compression::default());
        let bf16 = Compression { push: Codec::Whole, pull: Codec::Bf16 };
        assert!(Recovery::Workers.check_table(sync, false, whole).is_ok());
        let ssp = Mode::Ssp { workers: 2, staleness: 1 };
        for (mode, clipped, compression, why) in [
            (Mode::Async, false, whole, "async"),
            (ssp, false, whole, "ssp"),
            (sync, true, whole, "clipped"),
            (sync, false, bf16, "compression"),
        ] {
            let refused = Recovery::Workers.check_table(mode, clipped, compression).unwrap_err();
            assert!(refused.contains(why), "{refused}");
            assert!(Recovery::None.check_table(mode, clipped, compression).is_ok());
        }
    }
}
