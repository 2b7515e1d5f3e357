//! Does: what a real RDMA device must do behind the adapter. Needs one, soft-RoCE or hardware, and fails without.
//!
//! `cargo test -p gradwire-transport --test device -- --ignored`

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "../cuda/double.rs"]
mod double;
mod end;
mod endings;
mod gpu;
mod memory;
#[macro_use]
#[path = "../promises/mod.rs"]
#[allow(dead_code, unused_macros, unused_imports)] // Two wires on a network of their own are what is used.
mod promises;
mod traffic;
