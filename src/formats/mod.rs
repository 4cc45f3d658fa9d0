//! The formats that a disk can have besides qcow2: each is an
//! [`Image`](crate::image::Image) over [`Storage`](crate::storage::Storage).
//!
//! Each format has a reader. Raw and LUKS are also written by theirs; VMDK, VHD, VHDX and VDI are made,
//! and written through [`fill`], which stands over the reader. qcow, QED and Parallels are only read.
//! Nothing here opens a file by name or knows a chain: a format that keeps its data in further files
//! lists their names and takes the opened storages.

pub mod fill;
pub mod luks;
pub mod parallels;
pub mod probe;
pub mod qcow;
pub mod qed;
pub mod raw;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

mod fields;
mod name;
mod pages;
mod runs;
mod two_level;

#[cfg(test)]
mod tests;

pub use name::Format;
