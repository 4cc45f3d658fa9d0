//! The black-box tests: the `vdisk` command as a user meets it, judged by its contract and by QEMU.
//!
//! One harness, so that the binary is linked once. A module is a theme; a test's name is a sentence.
//! Nothing here may use the library: what these tests know, a user's script can know.

// Clippy's leave for tests covers `#[test]` functions only; here the harness may panic too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod host;
mod identity;
mod require;
mod twin;

mod about;
mod bases;
mod boot;
mod chains;
mod container;
mod container_terminal;
mod convert;
mod create;
mod drop_in;
mod elsewhere;
mod exports;
mod files;
mod formats;
mod inspect;
mod interop;
mod live;
mod live_tree;
mod mount;
mod mount_raw;
mod pictures;
mod scale;
mod secrets;
mod serve;
mod serve_guest;
mod snapshots;
mod space;
mod undo;
mod usage;
mod wrong_use;
