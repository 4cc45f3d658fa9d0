//! Kernels for guests: the one in a disk, found as its own boot loader would find it, and those that a
//! user keeps for disks without.
//!
//! It reads files out of disks and knows no machine that runs them.

use std::fs::File;

mod archive;
mod choice;
mod entries;
mod environment;
mod extlinux;
mod find;
pub mod form;
mod grub;
pub mod kept;
mod modules;
mod newest;
mod place;
mod version;
mod words;

pub use find::find;

/// A kernel that was found in a disk, with what belongs to it.
#[derive(Debug)]
pub struct Found {
    /// What names it.
    pub from: String,
    /// The partition that has its files, from 1; `None` for the whole disk.
    pub partition: Option<u32>,
    /// Its path there.
    pub path: String,
    /// The paths of its initial RAM disks.
    pub initrds: Vec<String>,
    /// What its command line is to hold, the root among it.
    pub options: String,
    /// The kernel itself, in memory.
    pub kernel: File,
    /// All of its initial RAM disks, one after the other, in memory.
    pub initrd: Option<File>,
    /// What was passed over on the way, and why.
    pub passed_over: Vec<String>,
}
