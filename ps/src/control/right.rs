//! Does: by what right a coordinator decides: as the only one, or as the leader that etcd knows.

use super::ClusterMap;
use crate::PsError;
use crate::etcd::{Election, Etcd, EtcdSettings, Office};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The pause between two looks whether nobody leads.
const AGAIN: Duration = Duration::from_millis(300);
/// The pause between two words about trouble with etcd.
const TROUBLE: Duration = Duration::from_secs(10);

/// The right to decide.
pub(super) struct Right {
    etcd: Option<Arc<Etcd>>,
    office: Option<Office>,
    /// What other coordinators are told of this one.
    name: String,
    /// When to stand next.
    next: Instant,
    /// Who leads, or why that is not known.
    other: String,
    /// When trouble with etcd was told last; none since all was well.
    troubled: Option<Instant>,
}

impl Right {
    /// Without etcd, the right to decide alone.
    ///
    /// # Errors
    /// `Invalid` where what is to prove who is who cannot be used.
    pub(super) fn new(etcd: Option<&EtcdSettings>, name: String) -> Result<Self, PsError> {
        let reach =
            |settings| Etcd::new(settings).map_err(|error| PsError::invalid("reaching etcd", error.to_string()));
        let etcd = etcd.map(reach).transpose()?;
        let other = "etcd was not asked yet".to_owned();
        Ok(Self { etcd, office: None, name, next: Instant::now(), other, troubled: None })
    }

    /// Whether this coordinator decides.
    pub(super) fn holds(&self) -> bool {
        self.etcd.is_none() || self.office.as_ref().is_some_and(|office| !office.is_lost())
    }

    /// When to look at it again, if nothing else happens.
    pub(super) fn next(&self) -> Option<Instant> {
        let etcd = self.etcd.is_some();
        etcd.then(|| if self.office.is_some() { Instant::now() + AGAIN } else { self.next })
    }

    /// Who does not decide stands for it, when it is time: the map of before, where this one decides from now on.
    ///
    /// # Errors
    /// `Invalid` where what lies at etcd is no map of ours.
    pub(super) fn stand(&mut self, now: Instant) -> Result<Option<ClusterMap>, PsError> {
        let Some(etcd) = self.etcd.as_ref().filter(|_| self.office.is_none() && now >= self.next) else {
            return Ok(None);
        };
        let outcome = etcd.stand(&self.name);
        self.next = Instant::now() + AGAIN;
        match outcome {
            Ok(Election::Won(office, left)) => {
                let strange =
                    |_| PsError::invalid("leading", "what lies at etcd is no map of this version of gradwire");
                let map =
                    left.map_or_else(|| Ok(ClusterMap::default()), |left| ClusterMap::decode(&left).map_err(strange))?;
                tracing::info!(epoch = map.epoch.0, "this coordinator leads");
                self.office = Some(office);
                Ok(Some(map))
            }
            Ok(Election::Lost(leader)) => {
                self.stand_by(format!("the coordinator at {leader} leads"), false);
                Ok(None)
            }
            Err(error) => {
                self.stand_by(error.to_string(), true);
                Ok(None)
            }
        }
    }

    /// Keeps the map where the next leader finds it. Whether it may be told.
    pub(super) fn keep(&mut self, map: &ClusterMap) -> bool {
        let Some(office) = &self.office else { return self.etcd.is_none() };
        match office.keep(&map.encode()) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the map was not kept");
                false
            }
        }
    }

    /// Decides nothing any more, until it stands again.
    pub(super) fn give_up(&mut self) {
        if self.office.take().is_some() {
            tracing::warn!("this coordinator does not lead any more");
        }
    }

    /// What those are told who come to a coordinator that does not decide.
    pub(super) fn refusal(&self) -> String {
        format!("this coordinator stands by: {}", self.other)
    }

    /// Tells why this coordinator decides nothing: once; of trouble, which may show in other words each time, now and then.
    fn stand_by(&mut self, why: String, is_trouble: bool) {
        if self.other == why {
            return;
        }
        let is_due = self.troubled.is_none_or(|told| told.elapsed() >= TROUBLE);
        match (is_trouble, is_due) {
            (true, true) => tracing::warn!("standing by: {why}"),
            (true, false) => {}
            (false, _) => tracing::info!("standing by: {why}"),
        }
        self.troubled = if is_trouble && !is_due { self.troubled } else { is_trouble.then(Instant::now) };
        self.other = why;
    }
}
