//! Pure: what of `reach` reads bytes from elsewhere, by name.

use super::RemoteMemory;
use super::request::Request;
use crate::decoders::Decoder;

pub(crate) const ALL: [Decoder; 2] = [
    Decoder::new("memory of another process", memories, memory, (0, 0)),
    Decoder::new("one-sided request", requests, request, (0, 0)),
];

fn memories() -> Vec<Vec<u8>> {
    vec![RemoteMemory { owner: 1 << 60, key: 2, offset: 3, bytes: 1 << 40, device: 5 }.encode().to_vec()]
}

fn memory(bytes: &[u8]) {
    let Some(memory) = RemoteMemory::decode(bytes) else { return };
    assert_eq!(&memory.encode()[..], bytes);
    let end = memory.offset.checked_add(memory.bytes).expect("no memory that wraps around is taken");
    for (offset, bytes) in [(0, memory.bytes), (memory.bytes / 2, memory.bytes / 2), (memory.device, memory.key)] {
        if let Some(part) = memory.part(offset, bytes) {
            assert!(part.offset >= memory.offset && part.offset + part.bytes <= end, "a part lies outside");
        }
    }
}

fn requests() -> Vec<Vec<u8>> {
    let request = |is_put| Request { is_put, slot: 3, key: 1 << 63, offset: 5, bytes: 4096 };
    [false, true].map(|is_put| request(is_put).encode().to_vec()).to_vec()
}

fn request(bytes: &[u8]) {
    if let Some(request) = Request::decode(bytes) {
        assert_eq!(&request.encode()[..], bytes);
        assert!(usize::from(request.slot) < super::OPEN, "a slot that there is not was taken");
        assert!((1..=super::PART_BYTES).contains(&request.bytes), "a part that is too long was taken");
    }
}
