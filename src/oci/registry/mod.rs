//! Images to and from registries (OCI distribution specification).
//!
//! Blocking, as all else here: HTTP is a kept client's part, and what a registry says is checked and bounded here.

mod auth;
mod client;
pub mod disk;
mod download;
mod http;
mod name;
pub mod pull;
pub mod push;

pub use client::{Access, Options};
pub use name::Name;

/// Told how many bytes are done, of how many; `false` stops. Several threads say so.
pub type Told<'a> = dyn Fn(u64, u64) -> bool + Sync + 'a;
