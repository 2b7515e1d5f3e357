//! Does: keeps the plans of recent calls, so that a call of a known shape allocates nothing.

use crate::call::{Call, Shape};
use crate::choose::{Asked, Chooser};
use crate::plan::Plan;
use crate::{Collective, DType};
use gradwire_transport::{Rank, WorldSize};
use std::collections::VecDeque;
use std::sync::Arc;

/// Shapes kept: a model has some tens of buckets and layers.
const KEPT: usize = 64;

/// The plans of recent calls, and how to make new ones.
pub(crate) struct Plans {
    pub(crate) chooser: Chooser,
    kept: VecDeque<(Key, Arc<Plan>)>,
}

type Key = (Collective, DType, Shape);

impl Plans {
    pub(crate) fn new(chooser: Chooser) -> Self {
        Self { chooser, kept: VecDeque::with_capacity(KEPT) }
    }

    /// The plan of this rank for `call`.
    pub(crate) fn plan(&mut self, call: &Call, shape: &Shape, rank: Rank, world_size: WorldSize) -> Arc<Plan> {
        let known = |((collective, dtype, kept), _): &(Key, Arc<Plan>)| {
            *collective == call.collective && *dtype == call.dtype && kept == shape
        };
        if let Some(at) = self.kept.iter().position(known) {
            if at > 0 {
                self.kept.swap(at, at / 2);
            }
            return Arc::clone(&self.kept[at / 2].1);
        }
        let asked = Asked { collective: &call.collective, dtype: call.dtype, shape };
        let plan = Arc::new(self.chooser.plan(asked, rank, world_size));
        if self.kept.len() == KEPT {
            self.kept.pop_back();
        }
        self.kept.push_front(((call.collective, call.dtype, shape.clone()), Arc::clone(&plan)));
        plan
    }
}
