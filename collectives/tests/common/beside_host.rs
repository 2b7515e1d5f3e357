//! Does: calls over memory of a device under test, beside the same calls over the host's.
#![allow(dead_code)] // Each test uses a part.

use crate::double::Double;
use crate::on_device::{all, get, put};
use gradwire_collectives::{
    Call, Collective, CollectiveError, Communicator, DType, DeviceCall, FoldPlace, Piece, Reduction, Settings,
};
use gradwire_transport::Region;
use gradwire_transport::cuda::{DeviceMemory, Stream};
use std::sync::Arc;

/// 4 MiB and a half, and some bytes: more than one round by way of the host.
pub const LONG: usize = (9 << 19) + 24;
pub const SUM: Collective = Collective::AllReduce { op: Reduction::Sum };
/// Bits that are special in one type of floats or another: zeros, ends, infinities, denormals, NaN that tell more or signal.
const ODD: [u64; 12] = [
    0,
    0x8000_0000_8000_8000,
    0x7f80_0000_7c00_7f80,
    0xff80_0000_fc00_ff80,
    0x7fc0_1234_7e01_7fc1,
    0x7fa0_0000_7d00_7fa0,
    0x0000_0001_0001_0001,
    0x807f_ffff_83ff_807f,
    0x7f7f_ffff_7bff_7f7f,
    0x7ff0_0000_0000_0000,
    0x7ff4_0000_0000_0001,
    0x8000_0000_0000_0000,
];

/// Bytes of any kind, with what is special among them.
pub fn bits(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed * 2 + 0x9e37_79b9_7f4a_7c15;
    let mut next = |i: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if (i + seed as usize).is_multiple_of(3) { ODD[state as usize % ODD.len()] } else { state }
    };
    (0..bytes.div_ceil(8)).flat_map(|i| next(i).to_le_bytes()).take(bytes).collect()
}

pub fn on_device(
    c: &Communicator,
    stream: &Stream,
    (collective, dtype): (Collective, DType),
    input: &[Arc<DeviceMemory>],
    output: &[Arc<DeviceMemory>],
) -> Result<(), CollectiveError> {
    let slices = |memory: &[Arc<DeviceMemory>]| memory.iter().map(all).collect();
    let call = DeviceCall { collective, dtype, input: slices(input), output: slices(output), timeout: None };
    c.start_on_device(call, stream).unwrap().wait(None).unwrap().map(drop)
}

pub fn on_host(
    c: &Communicator,
    (collective, dtype): (Collective, DType),
    input: &[Vec<u8>],
    output: &[Vec<u8>],
) -> Vec<Vec<u8>> {
    let regions = |all: &[Vec<u8>]| all.iter().map(|bytes| Region::from_vec(bytes.clone())).collect::<Vec<_>>();
    let (input, output) = (regions(input), regions(output));
    let pieces = |all: &[Arc<Region>]| all.iter().map(|region| Piece::whole(Arc::clone(region))).collect();
    c.run(Call { collective, dtype, input: pieces(&input), output: pieces(&output), timeout: None }).unwrap();
    output.iter().map(|region| region.read(0..region.len()).unwrap().to_vec()).collect()
}

/// One call on the device and on the host: the same bits.
pub fn compare(c: &Communicator, stream: &Stream, call: (Collective, DType), input: &[Vec<u8>], output: &[Vec<u8>]) {
    let place = |all: &[Vec<u8>]| all.iter().map(|bytes| put(stream, bytes)).unzip::<_, _, Vec<_>, Vec<_>>();
    let ((ins, _coming), (outs, _going)) = (place(input), place(output));
    on_device(c, stream, call, &ins, &outs).unwrap();
    for (memory, expected) in outs.iter().zip(on_host(c, call, input, output)) {
        let got = get(stream, memory);
        let at = got.iter().zip(&expected).position(|(got, expected)| got != expected);
        assert_eq!((got.len(), at), (expected.len(), None), "{call:?}: the first byte that differs");
    }
}

/// Folded on devices wherever that can be: what a double would be measured to take is chance.
pub fn settings(double: &Double) -> Settings {
    let (nvrtc, cuda_reduce) = (Some(double.path()), Some(FoldPlace::Device));
    Settings { deterministic: true, nvrtc, cuda_reduce, ..Settings::default() }
}

/// Folded on the hosts.
pub fn on_hosts(double: &Double) -> Settings {
    Settings { cuda_reduce: Some(FoldPlace::Host), ..settings(double) }
}

/// Two rounds and a part: the sets change hands.
pub const ROUNDS: usize = (36 << 20) + 8;

/// Numbers that are summed exactly, in any order: of 32-bit floats, of 16-bit ones (by their upper halves), or any whole ones.
pub fn small(dtype: DType, seed: u64, bytes: usize) -> Vec<u8> {
    let value = |i: usize| ((i as u64 * 7 + seed * 3) % 11) as f32 - 5.0;
    match dtype {
        DType::F32 => (0..bytes / 4).flat_map(|i| value(i).to_le_bytes()).collect(),
        DType::BF16 => (0..bytes / 2).flat_map(|i| ((value(i).to_bits() >> 16) as u16).to_le_bytes()).collect(),
        _ => bits(seed, bytes),
    }
}
