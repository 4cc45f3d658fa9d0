//! A flat disk shown as a file over FUSE.
//!
//! This crate is a leaf: it knows files and bytes and owns the narrow trait through which a
//! disk reaches it. It knows nothing of image formats, chains or the `vdisk` crate.
