//! gradwire-transport: moves bytes between peers. Knows no tensor, key or sum.
//!
//! The waist is [`Wire`]: completion-based, so that verbs, sockets, shared memory and the simulator look alike. Bytes are
//! held in two ways: *posted* (a slice of the caller's own [`Region`], for payloads that end where they land) and *lent*
//! (the wire's own memory, read or written in place: [`SendLoan`], [`RecvLoan`]).

mod beside;
mod completion;
mod config;
mod credit;
pub mod cuda;
#[doc(hidden)]
pub mod decoders;
mod error;
mod flights;
#[doc(hidden)]
pub mod frame;
mod group;
mod hello;
mod inbox;
mod link_cost;
mod mesh;
mod peer;
mod pool;
mod rank;
mod reach;
mod region;
pub mod rendezvous;
mod select;
pub mod shm;
mod short;
pub mod sim;
mod slab;
pub mod tcp;
pub mod verbs;
mod wire;

pub use beside::{Beside, Words};
pub use completion::{Arrival, Completion};
pub use config::{Config, WireChoice};
pub use credit::CreditSettings;
pub use error::{LossCause, PostError, RegisterError, TransportError};
pub use group::{Group, GroupSpec, Link, form_group, home};
pub use hello::Identity;
pub use link_cost::{LinkCost, LinkCosts};
pub use mesh::{Mesh, open_verbs};
pub use peer::{PeerId, PeerName, Tag};
pub use rank::{Rank, WorldSize};
pub use reach::{Access, Accessor, Exposer, Local, RemoteMemory};
pub use region::{BufferHome, Loan, LoanHome, Overlap, RecvLoan, Region, RegionSlice, RegionSliceMut, SendLoan};
pub use rendezvous::{FileStore, MemoryStore, Store, TcpStore, open_store, routed_address};
pub use shm::{GroupSegment, ShmEnd, ShmOffer, ShmWire};
pub use sim::{FaultPlan, SimNetwork, SimWire};
pub use tcp::{Acceptance, TcpWire, Tls, TlsFiles};
pub use verbs::{VerbsConfig, VerbsWire};
pub use wire::{DeviceSided, Envelope, OneSided, Probe, RemoteSlice, Traffic, Wake, Wire, WireKind};
