//! Flat disks shown as files over FUSE.
//!
//! This crate is a leaf: it knows files and bytes and owns the narrow trait [`Volume`] through
//! which a disk reaches it. It knows nothing of image formats, chains or the `vdisk` crate.
//!
//! A [`Tree`] names the volumes; [`Server`] shows it, either at a directory or detached from
//! every mount namespace, where only this process can open its files.

pub mod server;
pub mod sys;
pub mod tree;
pub mod volume;

mod filesystem;

pub use server::{Caching, Options, Server};
pub use tree::Tree;
pub use volume::Volume;
