//! The qcow2 engine: one image file, read and written from many threads.
//!
//! It opens no file by name and knows no chain. The parts: [`header`] and [`extension`] are the
//! first cluster; [`entry`] and [`tables`] map guest clusters; [`refcount`] gives out host
//! clusters; [`write`](mod@write), [`compress`] and [`zero`] change the mapping; [`writeback`] brings changes to
//! the file in the order that survives a crash; [`snapshot`] freezes and brings back
//! whole disks, [`amend`] and [`shrink`] change what an image is; [`compact`] gives back what is free; [`bitmap`] records writes; [`check`] proves an image right.
//!
//! # Locks
//! In this order, each held as briefly as memory work takes: `tracker`, `writeback`, `tables`, `refcounts`,
//! `header`, `freed`, `territory`. Data is read and written with none of them held; `grace` is held shared
//! meanwhile, and exclusively for the moment in which freed clusters become free.

mod amend;
mod bitmap;
mod cache;
mod check;
mod compact;
mod compress;
mod create;
mod crypt;
mod data;
mod empty;
mod entry;
mod extension;
mod header;
mod image;
mod read;
mod refcount;
mod refcount_bits;
mod references;
mod shrink;
mod slice;
mod snapshot;
mod step;
mod tables;
mod territory;
mod write;
mod writeback;
mod zero;

pub use amend::{Amend, AmendPart, AmendProgress};
pub use bitmap::BitmapInfo;
pub use check::{Check, Repair};
pub use create::{CreateOptions, DataFile, Encryption, Method, Preallocation, create};
pub use extension::Extension;
pub use header::{Compression, Header, MAX_BACKING_NAME};
pub use image::{Image, OpenOptions};
pub use snapshot::{NewSnapshot, OLD_TABLE_LEAKED, SNAPSHOT_LEAKED, Snapshot};

/// Whether a file that begins with `bytes` claims to be qcow2.
pub fn probe(bytes: &[u8]) -> bool {
    bytes.starts_with(&header::MAGIC.to_be_bytes())
}
