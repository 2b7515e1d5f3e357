//! Does: memory of a device under test, filled and read by way of pinned memory.
#![allow(dead_code)] // Each test uses a part.

use crate::double::Double;
use gradwire_transport::RegionSlice;
use gradwire_transport::cuda::{Copying, Device, DeviceMemory, DeviceSlice, Driver, Stream};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

pub fn device(double: &Double, ordinal: u32) -> Arc<Device> {
    Driver::load(Some(&double.path())).unwrap().device(ordinal).unwrap()
}

pub fn all(memory: &Arc<DeviceMemory>) -> DeviceSlice {
    memory.slice(0..memory.len()).unwrap()
}

/// Begins to bring `bytes` to the device: held by the stream's order, not by the host, what follows on the stream comes after it.
pub fn put(stream: &Stream, bytes: &[u8]) -> (Arc<DeviceMemory>, Copying<RegionSlice>) {
    let memory = DeviceMemory::allocate(stream.device(), bytes.len()).unwrap();
    let copying = overwrite(stream, &memory, bytes);
    (memory, copying)
}

pub fn overwrite(stream: &Stream, memory: &Arc<DeviceMemory>, bytes: &[u8]) -> Copying<RegionSlice> {
    let host = stream.device().pin(bytes.len()).unwrap();
    host.write(0..bytes.len()).unwrap().copy_from_slice(bytes);
    stream.copy_in(host.read(0..bytes.len()).unwrap(), all(memory)).unwrap()
}

pub fn get(stream: &Stream, memory: &Arc<DeviceMemory>) -> Vec<u8> {
    let host = stream.device().pin(memory.len()).unwrap();
    let copying = stream.copy_out(all(memory), host.write(0..memory.len()).unwrap()).unwrap();
    copying.wait(soon()).unwrap().to_vec()
}
