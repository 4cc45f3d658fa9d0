//! What runs on disks, under a name: instances, each of them looked after by a process of its own.
//!
//! An instance's process (the *keeper*, [`keeper::keep`]) holds a directory in which its record is, its
//! control socket, and its log; it starts the *turn*, the process that holds the disk and runs the
//! container or the virtual machine, anew where it is to be restarted, and speaks with it over a socket
//! ([`link`]). There is no process that looks after all of them: a lock that the keeper holds says
//! whether an instance lives, so that neither a crash nor a reboot makes its record lie.
//!
//! It knows no container and no virtual machine: [`link::Switches`] is all that it asks of them.

pub mod alone;
mod ask;
pub mod keeper;
pub mod link;
mod log;
mod name;
pub mod place;
mod record;
mod serve;
pub mod signal;

pub use crate::control::Order;
pub use ask::{ask, ended};
pub use log::{LOG_SIZE, Tail};
pub use name::parse as parse_name;
pub use record::{Before, Kind, Phase, Policy, Record, now};
