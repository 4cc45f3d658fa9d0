//! Verbs on whole disks: one file each.

pub mod bytes;
pub mod clone;
pub mod commit;
pub mod compact;
pub mod convert;
pub mod create;
pub mod device;
pub mod rebase;
pub mod resize;
pub mod rm;
