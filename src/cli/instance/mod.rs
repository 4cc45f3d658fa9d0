//! Verbs that hold a disk for as long as somebody uses it, and those for instances: one file each.

pub mod attach;
pub mod exec;
pub mod holding;
pub mod list;
pub mod logs;
pub mod named;
mod root;
pub mod run;
pub mod serve;
pub mod start;
pub mod stats;
pub mod steer;
pub mod switches;
pub mod systemd;
pub mod words;
