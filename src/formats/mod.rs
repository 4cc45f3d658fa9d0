//! The formats that a disk can have besides qcow2: each is an
//! [`Image`](crate::image::Image) over [`Storage`](crate::storage::Storage).
//!
//! Raw and LUKS can be written; VMDK, VHD, VHDX and VDI are read only, and made: [`fill`] writes new
//! ones. Nothing here opens a file by name or knows a chain: a format that keeps its data in further
//! files lists their names and takes the opened storages.

pub mod fill;
pub mod luks;
pub mod probe;
pub mod raw;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

mod fields;
mod pages;
mod runs;

#[cfg(test)]
mod tests;
