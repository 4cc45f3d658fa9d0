//! One copy-on-write disk engine for virtual machines and containers.
//!
//! A *base* disk holds an operating system; a linked *clone* is a *delta* that holds only what
//! changed; a *snapshot* freezes the current delta and starts a new one. Every layer is a qcow2
//! file that QEMU opens, and QEMU's files open here.
//!
//! ```
//! use vdisk::{Disk, Snapshots};
//!
//! # fn main() -> vdisk::Result<()> {
//! # let dir = std::env::temp_dir().join(format!("vdisk-front-{}", std::process::id()));
//! # std::fs::create_dir_all(&dir).unwrap();
//! let base = Disk::create(dir.join("base.qcow2"), 20 << 30)?;
//! base.write(0, b"an operating system")?;
//! base.close()?;
//!
//! let web = vdisk::create_clone(dir.join("base.qcow2"), dir.join("web.qcow2"))?;
//! web.take_snapshot("installed")?;
//! web.write(0, b"AN")?;
//! web.close()?;
//!
//! let snapshots = Snapshots::of(dir.join("web.qcow2"));
//! let plan = snapshots.revert("installed", None)?;
//! println!("{} bytes of changes will go", plan.dropped());
//! plan.execute()?;
//!
//! let mut text = [0; 19];
//! Disk::open(dir.join("web.qcow2"))?.read(0, &mut text)?;
//! assert_eq!(&text, b"an operating system");
//! # std::fs::remove_dir_all(&dir).unwrap();
//! # Ok(())
//! # }
//! ```
//!
//! # What there is
//!
//! | to | use |
//! |---|---|
//! | open or make a disk, read and write it | [`Disk`], [`OpenOptions`], [`CreateOptions`] |
//! | hand it to other code as flat bytes | [`BlockDevice`], which a [`Disk`] is |
//! | make a linked clone | [`create_clone`] |
//! | take, list, merge, delete snapshots, go back to one | [`Snapshots`], [`Plan`] |
//! | copy a disk into one new file | [`Convert`] |
//! | know what a disk is, and whether it is right | [`Disk::info`], [`Disk::check`], [`Disk::repair`] |
//! | read the files in a disk without mounting it | [`Files`] |
//! | use the qcow2 engine alone, on bytes of your own | [`Storage`], [`open_image`], [`Image`] |
//!
//! Everything blocks, and everything may be used from many threads. The library prints nothing, ends no
//! process and starts no thread that outlives a call. Files are untrusted: an image names other files
//! in its own directory only, unless its user says otherwise.
//!
//! # Features
//!
//! The engine alone is what there is by default. `serve` adds `NbdServer`. The others are for the
//! `vdisk` command, `cli` being all of it, and promise nothing to other programs.
//!
//! # Layers, from the ground up
//!
//! ```text
//! disk (this page)        cli, qemu_img: the command
//! change, family, copy    snapshots and clones; the files of disks as trees; bytes from disk to disk
//! open, chain             from a name to an open disk; layers as one flat disk
//! qcow2, formats, luks    kinds of layers        filesystem: what is inside a disk
//! image, block            one layer; one flat disk
//! storage                 bytes that last        asymmetric: the lock of what every request reads
//! ```

// Without the command and the tests much of what the rooms offer has no user.
#![cfg_attr(not(feature = "internals"), allow(dead_code, unused_imports))]

mod addr;
mod asymmetric;
#[cfg(any(feature = "container", feature = "jail"))]
mod beside;
mod block;
mod chain;
mod change;
#[cfg(feature = "container")]
mod container;
#[cfg(feature = "control")]
mod control;
mod copy;
mod disk;
mod error;
mod family;
mod filesystem;
mod formats;
mod image;
#[cfg(feature = "instance")]
mod instance;
#[cfg(feature = "jail")]
mod jail;
#[cfg(feature = "vm")]
mod kernel;
mod luks;
#[cfg(feature = "mount")]
mod mount;
mod mountinfo;
#[cfg(feature = "serve")]
mod nbd;
#[cfg(feature = "oci")]
mod oci;
mod open;
mod progress;
mod qcow2;
#[cfg(feature = "serve")]
mod serve;
mod storage;
#[cfg(feature = "virtio")]
mod virtio;
#[cfg(feature = "vm")]
mod vm;

#[cfg(feature = "cli")]
#[macro_use]
mod say;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "cli")]
mod qemu_img;

// The command names the library as other programs do.
#[cfg(feature = "cli")]
extern crate self as vdisk;

/// The rooms themselves, for the tests, benches and fuzz targets of this package. They promise nothing:
/// what is there changes with every version.
#[cfg(feature = "internals")]
#[doc(hidden)]
#[allow(missing_docs)]
pub mod internals {
    macro_rules! open {
        ($($room:ident)*) => { $(pub mod $room { pub use crate::$room::*; })* };
    }

    #[cfg(feature = "vm")]
    open! { vm }
    #[cfg(feature = "serve")]
    open! { nbd }
    #[cfg(feature = "serve")]
    pub mod serve {
        pub mod nbd {
            pub use crate::serve::nbd::{Contexts, Export, MAX_BITMAPS, Server, Tls};
        }
        pub mod socket {
            pub use crate::serve::socket::{Listener, UnixSocket};
        }
        pub mod vhost {
            pub use crate::serve::vhost::Server;
        }
    }
    #[cfg(feature = "serve")]
    pub mod virtio {
        pub use crate::virtio::Id;
    }
    #[cfg(feature = "oci")]
    pub mod oci {
        pub mod tar {
            pub use crate::oci::tar::{plain, unpack};
        }
    }
    open! { addr block chain change copy error family filesystem formats image luks open qcow2 storage }
}

#[cfg(test)]
#[allow(dead_code, reason = "the black-box tests use the rest")]
#[path = "../tests/main/require.rs"]
mod require;

pub use addr::{GuestOffset, HostOffset, Unit};
pub use block::{BlockDevice, BlockExtent, BlockStatus};
#[cfg(feature = "serve")]
pub use disk::NbdServer;
pub use disk::{
    CheckReport, Convert, CreateOptions, DirEntry, Disk, DiskInfo, Files, LayerInfo, OpenOptions,
    Plan, Snapshot, Snapshots, create_clone, create_image, open_image, unseal,
};
pub use error::{Error, ErrorKind, Result};
pub use image::{Allocation, Backing, Extent, Hold, Image, Mapping};
pub use open::Format;
pub use storage::{MemoryStorage, Storage};
