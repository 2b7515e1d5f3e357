//! Does: what a real RDMA device must do behind the adapter. Needs one, soft-RoCE or hardware, and fails without.
//!
//! `cargo test -p gradwire-transport --test device -- --ignored`

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod end;
mod endings;
mod memory;
mod traffic;
