//! Does: measures what copies to and from a device and sums there and on this host take, by some MiB, once for each device of the process.

use super::fold::{Pace, Rates};
use super::lane::Lane;
use super::lent::DeviceKernels;
use crate::reduce::reduce_into;
use crate::{CollectiveError, DType, Reduction};
use gradwire_transport::cuda::{Act, Device, DeviceSlice};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Bytes that are copied and folded: past what begins it, and some 0.1 ms by a bus.
pub(super) const LONG_BYTES: usize = 2 << 20;
/// Bytes of which all is the beginning.
pub(super) const SHORT_BYTES: usize = 4 << 10;
/// Bytes that the measuring needs of a device's memory.
pub(super) const SPACE_BYTES: usize = 3 * LONG_BYTES;
/// Times that each is done; the least counts, since what others do meanwhile only adds.
const TIMES: usize = 4;

/// What all took that were measured in this process.
static MEASURED: Mutex<Vec<(Weak<Device>, Rates)>> = Mutex::new(Vec::new());

/// What it takes on this host and on the device of `lane`, of whose memory `space` may be overwritten. Others' memory is taken to be
/// like its own.
pub(super) fn rates(
    lane: &Lane,
    kernels: &mut DeviceKernels,
    space: &DeviceSlice,
    deadline: Instant,
) -> Result<Rates, CollectiveError> {
    let mut measured = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    measured.retain(|(device, _)| device.strong_count() > 0);
    let known = measured.iter().find(|(device, _)| std::ptr::eq(device.as_ptr(), Arc::as_ptr(&lane.device)));
    if let Some((_, rates)) = known {
        return Ok(*rates);
    }
    let in_use = |error| super::in_use("what is measured of a device", &error);
    let host = &lane.slots[0];
    let out = pace(|bytes| {
        let slot = host.write(0..bytes).map_err(in_use)?;
        drop(lane.out.copy_out(space.part(0..bytes), slot)?.wait(deadline)?);
        Ok(())
    })?;
    let into = pace(|bytes| {
        let slot = host.read(0..bytes).map_err(in_use)?;
        drop(lane.out.copy_in(slot, space.part(0..bytes))?.wait(deadline)?);
        Ok(())
    })?;
    let kernel = kernels.get(DType::F32, Reduction::Sum)?;
    let fold = pace(|bytes| {
        let at = |number: usize| space.part(number * LONG_BYTES..number * LONG_BYTES + bytes / 2);
        let act = Act::Fold { kernel, from: vec![at(0), at(1)], into: at(2) };
        lane.out.work(vec![act])?.map_or(Ok(()), |working| working.wait(deadline).map(drop))?;
        Ok(())
    })?;
    let rates = Rates { host_ns: on_host()?, out, into, fold, reach: fold };
    measured.push((Arc::downgrade(&lane.device), rates));
    Ok(rates)
}

/// What `work` over some bytes takes to begin, and for each byte.
pub(super) fn pace(mut work: impl FnMut(usize) -> Result<(), CollectiveError>) -> Result<Pace, CollectiveError> {
    let mut least = [Duration::MAX; 2];
    for _ in 0..TIMES {
        for (least, bytes) in least.iter_mut().zip([SHORT_BYTES, LONG_BYTES]) {
            let began = Instant::now();
            work(bytes)?;
            *least = began.elapsed().min(*least);
        }
    }
    let [short, long] = least.map(|time| time.as_secs_f64() * 1e9);
    Ok(Pace { begin_ns: short, byte_ns: (long - short).max(0.0) / (LONG_BYTES - SHORT_BYTES) as f64 })
}

fn on_host() -> Result<[f64; DeviceKernels::TYPES.len()], CollectiveError> {
    let (mut sum, given) = (vec![0; LONG_BYTES], vec![0; LONG_BYTES]);
    let mut rates = [0.0; DeviceKernels::TYPES.len()];
    for (ns, dtype) in rates.iter_mut().zip(DeviceKernels::TYPES) {
        let taken = pace(|bytes| {
            let folded = reduce_into(dtype, Reduction::Sum, &mut sum[..bytes], &given[..bytes]);
            folded.map_err(|error| CollectiveError::Invalid { call: "sum".to_owned(), reason: error.to_string() })
        })?;
        *ns = taken.byte_ns;
    }
    Ok(rates)
}
