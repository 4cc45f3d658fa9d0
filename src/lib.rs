//! One copy-on-write disk engine for virtual machines and containers.
//!
//! A *base* disk holds an operating system; a linked *clone* is a *delta* that holds only what
//! changed; a *snapshot* freezes the current delta and starts a new one. Every layer is a qcow2
//! file that QEMU opens, and QEMU's files open here.
//!
//! Rooms, from the ground up: [`addr`], [`error`] and [`mountinfo`] serve every floor; [`storage`]
//! keeps bytes, and [`nbd`] asks another program for them; [`image`] is one layer; [`block`] is a
//! flat guest disk; [`mount`] shows the files in it; [`container`] runs the programs among them;
//! [`virtio`] carries it into a guest, and [`vm`] is such a guest; [`serve`] carries it to other
//! people's programs.
//! keeps bytes; [`image`] is one layer; [`block`] is a flat guest disk; [`ext4`] reads the files
//! in it, and [`mount`] shows them; [`nbd`] asks another program for bytes; [`container`] runs the programs among them; [`virtio`] carries it into a guest, and
//! [`vm`] is such a guest.

pub mod addr;
pub mod block;
pub mod chain;
pub mod container;
pub mod control;
pub mod error;
pub mod ext4;
pub mod formats;
pub mod image;
pub mod luks;
pub mod mount;
pub mod mountinfo;
pub mod nbd;
pub mod qcow2;
pub mod serve;
pub mod storage;
pub mod virtio;
pub mod vm;

#[cfg(test)]
#[allow(dead_code, reason = "the black-box tests use the rest")]
#[path = "../tests/main/require.rs"]
mod require;

pub use error::{Error, ErrorKind, Result};
