//! What the jailed process that serves a disk's files and the one outside say to each other, over
//! [links](crate::cli::inside::link). Neither believes more than that.

use std::io;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use vdisk::control::Failure;
use vdisk::{Error, Result};

pub use crate::cli::inside::link::{Asker, Link};

/// What the server says of what it serves, once each in this order, or that it failed.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// It is open, and can be mounted.
    Opened(Opened),
    /// The server has mounted it itself, as the device of this number.
    Mounted(String),
    /// It is not mounted any more, and everything is durable.
    Ended,
    /// Why there is none, or what was lost.
    Failed(Failure),
}

/// What there is to be mounted.
#[derive(Debug, Serialize, Deserialize)]
pub enum Opened {
    /// A tree of files.
    Files {
        /// Whether it refuses every change.
        read_only: bool,
        /// Whether it notes owners that the kernel does not know.
        owners: bool,
    },
    /// A disk as a file, with a file system of the kernel's in it.
    Disk(Disk),
}

/// Where in a disk there is a file system of the kernel's.
#[derive(Debug, Serialize, Deserialize)]
pub struct Disk {
    /// What people call the file system.
    pub file_system: String,
    /// Its first byte.
    pub offset: u64,
    /// In bytes; 0 for all that follows.
    pub len: u64,
    /// Whether it refuses every change.
    pub read_only: bool,
}

/// What the server is told: that its connection is mounted, and to be served.
#[derive(Debug, Serialize, Deserialize)]
pub struct Served;

/// What the server is told: of a disk, how it went on when that is served; of a tree of files, whether it is mounted.
#[derive(Debug, Serialize, Deserialize)]
pub enum Stood {
    /// It is mounted, on or as the device of this number. The connection for files comes behind this.
    On(String),
    /// It is not.
    Failed(Failure),
}

/// What the server has done outside, which it cannot itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// Have the kernel write out what programs have written.
    WriteOut,
    /// Bring the kernel's file system to rest.
    Freeze,
    /// Let it go on.
    Thaw,
    /// Tell it that the disk may have another size.
    Resized,
    /// Unmount it. While it is in use it stays.
    Unmount,
    /// Take the mount away, whoever uses it.
    Detach,
}

/// Whether a process has a capability.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Capable {
    pub process: u32,
    pub capability: u32,
}

/// All ways between the two, as one of them has them.
pub struct Links {
    /// On which the server says what there is to be mounted, and hears of it.
    pub mount: Link,
    /// On which it asks for what it wishes.
    pub wishes: Link,
    /// On which it asks what the processes can do that use the mount.
    pub callers: Link,
}

impl Links {
    /// The outer process's, and the server's.
    pub fn pairs() -> Result<(Links, Links)> {
        let made = || {
            let [mount, wishes, callers] = [Link::pair()?, Link::pair()?, Link::pair()?];
            let outer = Links { mount: mount.0, wishes: wishes.0, callers: callers.0 };
            Ok((outer, Links { mount: mount.1, wishes: wishes.1, callers: callers.1 }))
        };
        made().map_err(|e: io::Error| Error::io("cannot speak with the server", e))
    }

    /// The numbers of their descriptors.
    pub fn numbers(&self) -> [RawFd; 3] {
        [&self.mount, &self.wishes, &self.callers].map(Link::number)
    }
}
