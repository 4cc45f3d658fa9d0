//! The qcow2 engine: one image file, read and written from many threads.
//!
//! It opens no file by name and knows no chain. The parts: [`header`] is the first cluster; [`tables`]
//! map guest clusters; [`refcount`] gives out host clusters, and knows which of them hold metadata;
//! [`data`] is the guest's bytes; [`write`](mod@write) turns a guest's write into new clusters, and
//! brings changes of metadata to the file in the order that survives a crash; [`snapshot`] freezes and
//! brings back whole disks; [`amend`] and [`resize`] change what an image is; [`bitmap`] records writes;
//! [`check`] proves an image right.
//!
//! # Locks
//! In this order, each held as briefly as memory work takes: `tracker`, `writeback`, `tables`,
//! `refcounts`, `header`, `freed`, `metadata_map`. Data is read and written with none of them held;
//! `grace` is held shared meanwhile, and exclusively for the moment in which freed clusters become free.
//! What each request takes shared (`grace`, `tables`, seldom `metadata_map`) is [asymmetric](crate::asymmetric):
//! readers write to no line of memory that other threads write to, and need no atomic operation.

mod amend;
mod bitmap;
mod check;
mod create;
mod data;
mod guard;
mod header;
mod image;
mod layer;
mod refcount;
mod resize;
mod snapshot;
mod step;
mod tables;
mod write;

pub use amend::{Amend, AmendPart, AmendProgress};
pub use bitmap::{BitmapChanges, BitmapInfo};
pub use check::{Check, Repair};
pub use create::{CreateOptions, DataFile, Encryption, Method, Preallocation, create};
pub use header::extension::Extension;
pub use header::relabel::change_identity;
pub use header::{Compression, Header, MAX_BACKING_NAME};
pub use image::{Image, OpenOptions};
pub use snapshot::{NewSnapshot, OLD_TABLE_LEAKED, SNAPSHOT_LEAKED, Snapshot};

/// Whether a file that begins with `bytes`, eight or more, claims to be qcow2. Version 1 of that magic
/// number is another format.
pub fn probe(bytes: &[u8]) -> bool {
    bytes.starts_with(&header::MAGIC.to_be_bytes()) && bytes.get(4..8) != Some(&[0, 0, 0, 1])
}
