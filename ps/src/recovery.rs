//! Pure: what becomes of a table when a server dies, as all clients of it choose, and where that choice cannot be kept.

use crate::body::{BadBody, Reader, Writer};
use crate::refusal::{Reason, Refusal};
use std::fmt;

/// What becomes of a table when a server of it dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Recovery {
    /// It is gone.
    #[default]
    None,
    /// Another server has all of it and takes its place: what was acknowledged is there, and nothing counts twice.
    Replicate,
}

impl Recovery {
    /// Refuses a choice that a shard of a cluster with `replicas` copies of each shard, beside the first, cannot keep.
    pub(crate) fn check(self, replicas: u32, subject: String) -> Result<(), Refusal> {
        if self == Self::Replicate && replicas == 0 {
            let expected = "servers that have backups (start them with --coordinator)";
            return Err(Refusal::new(Reason::Mismatch, subject, "recovery", expected, "replicate, and none has"));
        }
        Ok(())
    }

    pub(crate) fn encode(self, out: &mut Writer) {
        out.byte(match self {
            Self::None => 0,
            Self::Replicate => 1,
        });
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        match from.byte()? {
            0 => Ok(Self::None),
            1 => Ok(Self::Replicate),
            _ => Err(BadBody("no such recovery")),
        }
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Replicate => "replicate",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replicated_table_needs_servers_with_backups_and_others_need_nothing() {
        assert!(Recovery::None.check(0, String::new()).is_ok() && Recovery::Replicate.check(1, String::new()).is_ok());
        let refusal = Recovery::Replicate.check(0, "table \"w\"".into()).unwrap_err();
        assert!(refusal.to_string().contains("--coordinator"), "{refusal}");
        assert!(Recovery::decode(&mut Reader(&[9])).is_err());
    }
}
