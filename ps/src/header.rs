//! Pure: the header of every request and reply, version 1. Fixed size, little-endian, with a checksum of its own.
//!
//! | bytes | field | bytes | field |
//! |---|---|---|---|
//! | 0..4 | magic `GWPS` | 56..64 | first key |
//! | 4..6 | version | 64..72 | number of keys |
//! | 6 | kind | 72 | dtype (0: none) |
//! | 7 | flags | 73 | codec |
//! | 8..16 | table | 74..76 | status |
//! | 16..24 | client | 76..80 | slot |
//! | 24..32 | incarnation | 80..88 | payload bytes |
//! | 32..40 | epoch | 88..92 | wait, milliseconds |
//! | 40..48 | clock | 92..96 | CRC32C of the payload, or 0 |
//! | 48..56 | sequence | 96..100 | CRC32C of bytes 0..96 |

use crate::{Codec, DType, Epoch, KeyRange, TableId};

/// Length of a header.
pub const HEADER_BYTES: usize = 100;
/// The version that this code speaks.
pub const VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"GWPS";

/// The payload lies behind the header in the same message; otherwise it is a message of its own.
pub const FLAG_INLINE: u8 = 1;
/// The payload's checksum is in the header.
pub const FLAG_CHECKED: u8 = 2;
/// This request was sent before, over a connection that was lost.
pub const FLAG_AGAIN: u8 = 4;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A client says who it is: the first request on each connection.
    Hello = 1,
    /// Makes a table, or checks that it is the same one.
    Open = 2,
    /// Asks to be the one who writes a table's first values.
    ClaimInit = 3,
    /// Writes first values.
    Init = 4,
    /// All first values are written.
    EndInit = 5,
    /// Adds to a table.
    Push = 6,
    /// Reads from a table.
    Pull = 7,
    /// Adds, and reads what came of it.
    PushPull = 8,
    /// Sets the learning rate from a clock on.
    SetRate = 9,
    /// Waits for a number of clients.
    Barrier = 10,
    /// Lists tables, clients and traffic.
    Status = 11,
    /// Makes a sparse table, or checks that it is the same one.
    OpenSparse = 12,
    /// Adds to rows of a sparse table: the keys begin at the shard's number and are as many as ids.
    SparsePush = 13,
    /// Reads rows of a sparse table, by ids.
    SparsePull = 14,
    /// Asks which ids were evicted, from the number in the clock's place on.
    Evicted = 15,
    /// A worker says which values it has of tables that a server has lost; answered once all workers have, with the clocks to go
    /// on from and who writes what.
    Offer = 16,
    /// A lost table is to go on from the clock, with the learning rates in the body; answered with whether its values are wanted.
    Restart = 17,
    /// Writes a part of a table that was restarted.
    Restore = 18,
    /// A worker has written what it was to, in the round in the clock's place; answered once all have.
    Restored = 19,
    /// A seat wants to be the backup: the client is its number.
    Follow = 32,
    /// A backup has every entry of the log up to the sequence.
    Applied = 33,
    /// A server process tells the coordinator that it is there.
    Join = 34,
    /// A seat tells the coordinator what it has seen.
    Sighting = 35,
    /// Asks the coordinator for its map.
    Map = 36,
    /// Asks the coordinator to take all parts from the server at the address in the body; answered with
    /// the shards that are still there.
    Drain = 37,
    /// Asks for the sum of squares of a clipped table's gradient at a clock, once it is whole.
    Norm = 24,
    /// Says by what the gradient of a clock is multiplied before it is applied.
    Scale = 25,
    /// Writes a checkpoint: which, and at which clocks, is in the body; answered with its bytes once it is written.
    Snapshot = 40,
    /// Done, nothing to tell.
    Done = 64,
    /// Refused: the status says why, the body with what.
    Refused = 65,
    /// Not now, and nothing was changed: send it again later.
    Later = 66,
}

impl Kind {
    const ALL: [Self; 31] = [
        Self::Hello,
        Self::Open,
        Self::ClaimInit,
        Self::Init,
        Self::EndInit,
        Self::Push,
        Self::Pull,
        Self::PushPull,
        Self::SetRate,
        Self::Barrier,
        Self::Status,
        Self::OpenSparse,
        Self::SparsePush,
        Self::SparsePull,
        Self::Evicted,
        Self::Offer,
        Self::Restart,
        Self::Restore,
        Self::Restored,
        Self::Follow,
        Self::Applied,
        Self::Join,
        Self::Sighting,
        Self::Map,
        Self::Drain,
        Self::Norm,
        Self::Scale,
        Self::Snapshot,
        Self::Done,
        Self::Refused,
        Self::Later,
    ];

    /// Whether it adds to a table.
    pub const fn pushes(self) -> bool {
        matches!(self, Self::Push | Self::PushPull | Self::SparsePush)
    }

    /// Whether it is answered with elements.
    pub const fn pulls(self) -> bool {
        matches!(self, Self::Pull | Self::PushPull | Self::SparsePull)
    }

    /// Whether servers and their coordinator speak so among themselves.
    pub const fn is_control(self) -> bool {
        matches!(self, Self::Follow | Self::Applied | Self::Join | Self::Sighting | Self::Map | Self::Drain)
    }

    /// Whether it is an answer.
    pub const fn is_reply(self) -> bool {
        matches!(self, Self::Done | Self::Refused | Self::Later)
    }
}

/// The outside of a request or reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// `FLAG_*`; unknown ones are refused.
    pub flags: u8,
    /// Which table; for a barrier, which barrier.
    pub table: TableId,
    /// Who asks. Workers of a synchronous table are numbered from 0, as ranks are.
    pub client: u64,
    /// Which life of that client: a later process has a greater one, and shuts out the earlier.
    pub incarnation: u64,
    /// The shard map by which the client chose this shard.
    pub epoch: Epoch,
    /// Push: which clock it contributes to, from 1. Pull: the clock that must be complete first. Reply: clock of the value.
    pub clock: u64,
    /// The client's number of this call; a request sent again keeps it.
    pub sequence: u64,
    /// Which elements.
    pub keys: KeyRange,
    /// Type of the payload's elements, or of those asked for.
    pub dtype: Option<DType>,
    /// The code of the payload's codec, and 16 times that of the codec which the answer is wanted in.
    pub codec: u8,
    /// In a refusal: its code.
    pub status: u16,
    /// The client's number of this request while it is in flight: the answer goes to the tag of this slot.
    pub slot: u32,
    /// Length of the payload.
    pub payload_bytes: u64,
    /// How long the client waits for the answer; 0: as long as the server lets it.
    pub wait_ms: u32,
    /// CRC32C of the payload where `FLAG_CHECKED` is set.
    pub payload_crc: u32,
}

/// Why bytes are no header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer bytes than a header has.
    #[error("{bytes} bytes are no header, which has {HEADER_BYTES}")]
    Short {
        /// How many there are.
        bytes: usize,
    },
    /// Not ours.
    #[error("it does not begin with GWPS")]
    Magic,
    /// From another version.
    #[error("it is of version {version}, and we speak {VERSION}: update the older end")]
    Version {
        /// Its version.
        version: u16,
    },
    /// Damaged on the way, or made up.
    #[error("its checksum is {got:#010x}, and should be {expected:#010x}")]
    Checksum {
        /// What the bytes sum to.
        expected: u32,
        /// What the header says.
        got: u32,
    },
    /// A field holds what it cannot.
    #[error("its {field} is {value}, which nothing is")]
    Field {
        /// Which.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
}

impl Header {
    /// A header of `kind` with everything else at rest.
    pub const fn new(kind: Kind) -> Self {
        Self {
            kind,
            flags: 0,
            table: TableId(0),
            client: 0,
            incarnation: 0,
            epoch: Epoch(0),
            clock: 0,
            sequence: 0,
            keys: KeyRange { start: 0, end: 0 },
            dtype: None,
            codec: 0,
            status: 0,
            slot: 0,
            payload_bytes: 0,
            wait_ms: 0,
            payload_crc: 0,
        }
    }

    /// The answer of `kind` to this request, without a payload.
    pub const fn reply(&self, kind: Kind) -> Self {
        Self { kind, flags: 0, payload_bytes: 0, payload_crc: 0, wait_ms: 0, ..*self }
    }

    /// The code of the codec of the payload.
    pub const fn payload_codec(&self) -> u8 {
        self.codec & 15
    }

    /// The code of the codec that the answer is wanted in.
    pub const fn answer_codec(&self) -> u8 {
        self.codec >> 4
    }

    /// Whether the payload is in the same message.
    pub const fn is_inline(&self) -> bool {
        self.flags & FLAG_INLINE != 0
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&[self.kind as u8, self.flags]);
        let numbers = [
            self.table.0,
            self.client,
            self.incarnation,
            self.epoch.0,
            self.clock,
            self.sequence,
            self.keys.start,
            self.keys.len(),
        ];
        for number in numbers {
            put(&number.to_le_bytes());
        }
        put(&[self.dtype.map_or(0, DType::code), self.codec]);
        put(&self.status.to_le_bytes());
        put(&self.slot.to_le_bytes());
        put(&self.payload_bytes.to_le_bytes());
        put(&self.wait_ms.to_le_bytes());
        put(&self.payload_crc.to_le_bytes());
        let (body, sum) = out.split_at_mut(HEADER_BYTES - 4);
        sum.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        out
    }

    /// The header at the head of `bytes`. Takes no memory and trusts no field.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let short = HeaderError::Short { bytes: bytes.len() };
        let (head, _) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(short)?;
        let mut fields = Fields(head);
        if fields.take::<4>() != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = u16::from_le_bytes(fields.take());
        if version != VERSION {
            return Err(HeaderError::Version { version });
        }
        let (body, sum) = head.split_at(HEADER_BYTES - 4);
        let expected = crc32c::crc32c(body);
        let got = u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]);
        if expected != got {
            return Err(HeaderError::Checksum { expected, got });
        }
        Self::decode_fields(fields)
    }

    fn decode_fields(mut fields: Fields<'_>) -> Result<Self, HeaderError> {
        let refuse = |field, value| HeaderError::Field { field, value };
        let [kind, flags] = fields.take();
        let kind = Kind::ALL.into_iter().find(|known| *known as u8 == kind).ok_or(refuse("kind", kind.into()))?;
        if flags & !(FLAG_INLINE | FLAG_CHECKED | FLAG_AGAIN) != 0 {
            return Err(refuse("flags", flags.into()));
        }
        let table = TableId(fields.number());
        let (client, incarnation, epoch) = (fields.number(), fields.number(), Epoch(fields.number()));
        let (clock, sequence, start, count) = (fields.number(), fields.number(), fields.number(), fields.number());
        let end = start.checked_add(count).ok_or(refuse("number of keys", count))?;
        let [dtype, codec] = fields.take();
        let dtype = match dtype {
            0 => None,
            code => Some(DType::of_code(code).ok_or(refuse("dtype", code.into()))?),
        };
        if codec & 15 > Codec::LAST || codec >> 4 > Codec::LAST {
            return Err(refuse("codec", codec.into()));
        }
        Ok(Self {
            kind,
            flags,
            table,
            client,
            incarnation,
            epoch,
            clock,
            sequence,
            keys: KeyRange { start, end },
            dtype,
            codec,
            status: u16::from_le_bytes(fields.take()),
            slot: u32::from_le_bytes(fields.take()),
            payload_bytes: fields.number(),
            wait_ms: u32::from_le_bytes(fields.take()),
            payload_crc: u32::from_le_bytes(fields.take()),
        })
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, tail) = self.0.split_first_chunk::<N>().expect("the fields add up to the header's length");
        self.0 = tail;
        *head
    }

    fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_header() -> impl Strategy<Value = Header> {
        let numbers = (any::<[u64; 6]>(), 0u64..1 << 40, 0u64..1 << 40, any::<u64>());
        let rest = (0usize..Kind::ALL.len(), 0u8..8, 0u8..5, any::<(u16, u32, u32, u32)>());
        (numbers, rest).prop_map(
            |((n, start, count, payload_bytes), (kind, flags, dtype, (status, slot, wait, crc)))| Header {
                kind: Kind::ALL[kind],
                flags,
                table: TableId(n[0]),
                client: n[1],
                incarnation: n[2],
                epoch: Epoch(n[3]),
                clock: n[4],
                sequence: n[5],
                keys: KeyRange { start, end: start + count },
                dtype: DType::of_code(dtype),
                codec: (n[0] % 5 + 16 * (n[1] % 5)) as u8,
                status,
                slot,
                payload_bytes,
                wait_ms: wait,
                payload_crc: crc,
            },
        )
    }

    /// `bytes` with a checksum that fits, so that the fields are reached.
    fn sealed(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let sum = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        bytes[HEADER_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn a_header_comes_back_as_it_was(header in any_header()) {
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn a_changed_bit_is_seen(header in any_header(), at in 0..HEADER_BYTES, bit in 0u8..8) {
            let mut bytes = header.encode();
            bytes[at] ^= 1 << bit;
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn bytes_of_any_kind_are_refused_or_mean_something(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), tail in any::<[u8; 32]>(),
        ) {
            let _ = Header::decode(&bytes);
            let mut forged = Header::new(Kind::Push).encode();
            for (n, byte) in bytes.iter().enumerate().skip(6).take(HEADER_BYTES - 10) {
                forged[n] = *byte;
            }
            forged[60..92].copy_from_slice(&tail);
            if let Ok(header) = Header::decode(&sealed(forged)) {
                prop_assert!(header.keys.start <= header.keys.end);
            }
        }
    }

    #[test]
    fn each_fault_has_its_name() {
        let good = Header::new(Kind::Pull).encode();
        assert_eq!(Header::decode(&good[..99]), Err(HeaderError::Short { bytes: 99 }));
        let mut bytes = good;
        bytes[0] = b'X';
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Magic));
        let mut bytes = good;
        bytes[4] = 9;
        assert_eq!(Header::decode(&sealed(bytes)), Err(HeaderError::Version { version: 9 }));
        for (at, field) in [(6, "kind"), (7, "flags"), (72, "dtype"), (73, "codec")] {
            let mut bytes = good;
            bytes[at] = 200;
            assert_eq!(Header::decode(&sealed(bytes)), Err(HeaderError::Field { field, value: 200 }));
        }
        let mut bytes = good;
        bytes[56..72].fill(0xff);
        assert!(matches!(Header::decode(&sealed(bytes)), Err(HeaderError::Field { field: "number of keys", .. })));
    }
}
