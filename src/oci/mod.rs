//! Images in and out: OCI layouts and archives, and a layer's tar onto the files of a disk and back.
//!
//! Knows file systems and changes of disks, no command.

pub mod changes;
pub mod config;
pub mod digest;
pub mod export;
pub mod import;
pub mod layer;
pub mod layout;
pub mod manifest;
mod part;
#[cfg(feature = "registry")]
pub mod registry;
pub mod store;
pub mod tar;
mod target;
