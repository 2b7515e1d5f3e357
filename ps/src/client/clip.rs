//! Does: asks all shards for the squares of a clock's gradients, and tells them by what these are to be multiplied.

use super::{Core, DenseTable};
use crate::PsError;
use crate::body::Reader;
use crate::exact_sum::ExactSum;
use crate::header::{Header, Kind};
use std::sync::Arc;

/// Added to the norm before it divides, as torch does.
const EPSILON: f64 = 1e-6;

pub(super) fn clip(core: &Arc<Core>, tables: &[&DenseTable], most: f64) -> Result<f64, PsError> {
    if !(most.is_finite() && most >= 0.0) {
        return Err(PsError::invalid("clipping", format!("the norm is to be at most {most}, and must be at least 0")));
    }
    let mut clocks = Vec::new();
    for table in tables {
        table.check_clipped()?;
        clocks.push((table.id(), table.clock()));
    }
    let subject: Arc<str> = format!("{} tables", tables.len()).into();
    let ask = |kind, body: &[u8]| {
        let each = clocks.iter().flat_map(|clock| (0..core.map.shards()).map(move |shard| (*clock, shard)));
        let requests = each.map(|((table, clock), shard)| {
            core.request(shard, Header { table, clock, ..Header::new(kind) }, body.to_vec())
        });
        requests.collect()
    };
    let pending = core.start("waiting for the norm of", &subject, ask(Kind::Norm, &[]))?;
    pending.wait(None)?;
    let mut squares = ExactSum::default();
    for (shard, body) in pending.call.bodies() {
        let malformed =
            |bad: crate::BadBody| PsError::Protocol { shard, address: String::new(), reason: bad.to_string() };
        squares.merge(&ExactSum::decode(&mut Reader(&body)).map_err(malformed)?);
    }
    let norm = squares.value().sqrt();
    let scale = scale(norm, most);
    core.start("scaling", &subject, ask(Kind::Scale, &scale.to_le_bytes()))?.wait(None)?;
    Ok(norm)
}

/// What gradients of `norm` are multiplied by. One that is no number stays so, as in torch.
pub(super) fn scale(norm: f64, most: f64) -> f64 {
    let scale = most / (norm + EPSILON);
    if scale > 1.0 { 1.0 } else { scale }
}
