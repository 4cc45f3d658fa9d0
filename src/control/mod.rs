//! The control socket: how a command reaches the process that holds a disk.
//!
//! [`wire`] is what is said, a line of JSON at a time; [`server`] is the holder's side and knows no
//! disk; [`holder`] does to a disk in use what was asked; [`client`] finds the holder of a disk and
//! asks. A socket belongs to one user and answers nobody else.

mod client;
mod holder;
mod order;
pub mod place;
mod server;
mod wire;

pub use client::{Connection, ask, ask_at, result_of, wait_for};
pub use holder::{Holder, Kind};
pub use order::Order;
pub use place::elsewhere;
pub use server::{Bound, Server, Service, make_way};
pub use wire::{Failure, Named, Request};
