//! The options of command lines and of images: read, known, listed.

pub mod args;
pub mod chosen;
pub mod create;
pub mod format;
pub mod known;
pub mod leftover;
pub mod objects;
pub mod opts;
