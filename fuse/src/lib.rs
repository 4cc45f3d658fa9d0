//! Flat disks shown as files over FUSE, and trees of files.
//!
//! This crate is a leaf: it knows files and bytes and owns the narrow traits [`Volume`], through
//! which a disk reaches it, [`Files`](files::Files), a writable tree of files, and
//! [`Layer`](layer::Layer), a tree of files under an overlay. It knows nothing of image formats, chains or the `vdisk` crate.
//!
//! A [`Tree`] names the volumes; [`Server`] shows it, either at a directory or detached from
//! every mount namespace, where only this process can open its files.

pub mod apart;
pub mod attr;
pub mod files;
pub mod host;
pub mod kernel;
pub mod layer;
pub mod mount;
pub mod overlay;
pub mod server;
pub mod tree;
pub mod volume;

mod filesystem;
mod sys;

pub use server::{Caching, Options, Server, Waiting};
pub use tree::Tree;
pub use volume::Volume;
