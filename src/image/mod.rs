//! One layer: a file that maps guest clusters to host bytes.
//!
//! An image knows its own clusters and the name it records for its backing file. It opens no other
//! file and never reads through to a lower layer: that is the chain's work.

use std::io::{IoSlice, IoSliceMut};

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::asymmetric::ReadGuard;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

mod bitmap;
mod capabilities;
mod check;
mod clones;
mod details;
mod filter;
mod id;
mod kept;
mod label;
mod parts;
mod stamp;

pub use bitmap::Bitmap;
pub use capabilities::{Bitmaps, Capabilities, Checked, Compress, Fingerprint, Placed, Space};
pub use check::{Check, Repair};
pub use clones::{Clones, FileStamp, Place, Seen};
pub use details::Details;
pub use filter::Filter;
pub use id::Id;
pub use kept::{Kept, Uptime, Was};
pub use label::{Label, Parent, Role};
pub(crate) use parts::{PartialLabel, Parts};
pub use stamp::BaseStamp;

/// What one layer says about a stretch of the guest disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Plain bytes at a host offset of this layer's data file.
    Data {
        /// Where the first byte of the extent stands.
        host: HostOffset,
        /// Whether it may be overwritten where it stands: nothing else refers to it.
        exclusive: bool,
    },
    /// Reads as zeroes, whatever a lower layer holds.
    Zero {
        /// Where host bytes are kept for it that are not to be read.
        host: Option<HostOffset>,
    },
    /// A compressed cluster. Its descriptor is the format's own business.
    Compressed {
        /// The format's descriptor of where the compressed bytes stand.
        descriptor: u64,
    },
    /// This layer holds nothing here: a lower layer decides, and zeroes where there is none.
    Unallocated,
}

/// A stretch of the guest disk that one layer maps in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First guest byte.
    pub start: GuestOffset,
    /// Length in bytes, never 0.
    pub len: u64,
    /// How it is mapped.
    pub mapping: Mapping,
}

/// The name and format that an image records for the layer below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name as recorded: a path, relative to the image's own directory unless absolute.
    pub name: String,
    /// The recorded format, as qemu-img names it; `None` where the image does not say.
    pub format: Option<String>,
}

/// What a layer says about itself in its header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Its name and place in the family; `None` for a file that other programs made.
    pub label: Option<Label>,
    /// The layer below.
    pub backing: Option<Backing>,
    /// Whether nobody has changed the contents since the label's content id was given.
    pub vouched: bool,
}

/// While a hold lives, no host cluster that [`Image::map`] returned is given another use.
///
/// A caller takes one before it maps and keeps it until its reads and writes of the mapped bytes
/// are done. A thread takes at most one hold of an image at a time, and none while it flushes.
#[derive(Debug)]
pub struct Hold<'a>(
    #[allow(dead_code, reason = "held for its lifetime")] Option<ReadGuard<'a, ()>>,
);

impl<'a> Hold<'a> {
    /// The hold of an image that never gives a cluster another use.
    pub fn free() -> Hold<'a> {
        Hold(None)
    }

    /// The hold of an image that waits for `guard`'s lock before it reuses clusters.
    pub(crate) fn shared(guard: ReadGuard<'a, ()>) -> Hold<'a> {
        Hold(Some(guard))
    }
}

/// One layer of a disk, for many threads at once.
///
/// Lengths and offsets are in bytes. A layer opened for reading answers every call that would
/// change it with [`ErrorKind::ReadOnly`].
pub trait Image: Send + Sync {
    /// The guest disk's size in bytes.
    fn size(&self) -> u64;

    /// The unit of allocation; concurrent writers of one cluster must be serialised by the caller.
    fn cluster(&self) -> Unit;

    /// Bytes of the disk that the format gives a place in the file at once; `None` where all of it
    /// has one from the beginning.
    fn block_size(&self) -> Option<u64> {
        Some(self.cluster().bytes())
    }

    /// The unit of copy-on-write: a subcluster where the format has them, else the cluster.
    fn granularity(&self) -> Unit {
        self.cluster()
    }

    /// What the image records for the layer below.
    fn backing(&self) -> Option<Backing> {
        None
    }

    /// Whether the guest's bytes are encrypted in this layer.
    fn encrypted(&self) -> bool {
        false
    }

    /// Whether the disk of a layer that was just made, and stands on nothing, reads as zeroes until it
    /// is written. It does not where it shows what its place held before, or makes noise of it.
    fn starts_zeroed(&self) -> bool {
        false
    }

    /// Whether changes are refused.
    fn read_only(&self) -> bool;

    /// What the format can do besides. See there.
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }

    /// Keeps mapped clusters from being reused; see [`Hold`].
    fn hold(&self) -> Hold<'_> {
        Hold::free()
    }

    /// The longest extent that starts at `at`, is mapped in one way and is at most `len` bytes.
    /// It may be shorter than the mapping really goes on. `at` is below the size, `len` is not 0.
    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent>;

    /// Narrows a [`Mapping::Data`] extent to its first part that is all data or, where the host can
    /// tell that nothing is stored there, all zero. For those who look for holes; reads do without.
    fn narrow(&self, extent: Extent) -> Result<Extent> {
        Ok(extent)
    }

    /// Reads bytes from `at` of an extent that [`map`](Image::map) returned and that is not
    /// [`Mapping::Unallocated`]; `bufs` end within it. Takes no metadata lock.
    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()>;

    /// Overwrites bytes of an exclusive [`Mapping::Data`] extent where they stand.
    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let _ = (extent, at, bufs);
        Err(read_only())
    }

    /// Reserves host clusters for `at..at + len`, which is aligned to the granularity (or ends at
    /// the disk's end) and not mapped to exclusive data. The token may cover less than asked, and
    /// may begin before `at` where a cluster has to move as a whole.
    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        let _ = (at, len);
        Err(read_only())
    }

    /// Begins a write of at most `len` bytes at `at`, of any alignment, by a caller that keeps other
    /// writers of these clusters out until it is done. One look says what the write comes upon, and
    /// host clusters are reserved where new ones are needed.
    fn begin_write(&self, at: GuestOffset, len: u64) -> Result<Begun<'_>> {
        let over = self.map(at, len)?;
        if let Mapping::Data { exclusive: true, .. } = over.mapping {
            return Ok(Begun::InPlace(over));
        }
        let (start, end) = whole(self.granularity(), at, over.len, self.size());
        Ok(Begun::Reserved { token: self.prepare(start, end - start)?, over })
    }

    /// Makes a range read as zeroes without data; aligned as for [`prepare`](Image::prepare).
    /// `unmap` gives its host clusters back. [`ErrorKind::Unsupported`] where the format has no
    /// zero clusters (qcow2 version 2): the caller writes zeroes instead.
    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        let _ = (at, len, unmap);
        Err(read_only())
    }

    /// Gives the clusters of a range back; aligned as for [`prepare`](Image::prepare). Where
    /// `expose` the layer below shows through afterwards, else the range reads as zeroes or, where
    /// the format cannot say so, is left as it is.
    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        let _ = (at, len, expose);
        Err(read_only())
    }

    /// Who the layer is and what it stands on.
    fn identity(&self) -> Result<Identity> {
        Ok(Identity { backing: self.backing(), ..Identity::default() })
    }

    /// Records who the layer is and what it stands on, durably and in one write. The guest's bytes
    /// in this layer do not change.
    fn set_identity(&self, identity: &Identity) -> Result<()> {
        let _ = identity;
        Err(Error::unsupported("this format cannot record snapshots or a base"))
    }

    /// What the format says about the layer besides its map; `None` where it says nothing.
    fn details(&self) -> Option<Details> {
        None
    }

    /// Returns when every change that completed before the call is durable.
    fn flush(&self) -> Result<()>;

    /// Writes down all that would be written when the layer is dropped, durably, and says how that
    /// went. It can be used on.
    fn close(&self) -> Result<()> {
        self.flush()
    }

    /// Changes the guest disk's size. What a longer disk shows past the old end is zeroes, and a size
    /// is published only when that is durable: whatever interrupts it, the disk is the old one or the
    /// new one.
    ///
    /// `clear` makes zero what the layer cannot alone: what a lower layer would show between the two
    /// sizes, and the rest of the cluster in which the shorter one ends. It is called once, while the
    /// longer of the two disks can be written and a crash leaves the shorter one. Others must not use
    /// the layer meanwhile, but for [`flush`](Image::flush).
    fn resize_over(&self, size: u64, clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let _ = (size, clear);
        Err(read_only())
    }

    /// The same for a layer that stands on nothing and whose last cluster holds nothing past its end.
    fn resize(&self, size: u64) -> Result<()> {
        self.resize_over(size, &mut || Ok(()))
    }
}

/// What a write came upon; see [`Image::begin_write`].
pub enum Begun<'a> {
    /// Data that is overwritten where it stands, as far as the extent goes.
    InPlace(Extent),
    /// Something else, which new clusters take the place of.
    Reserved {
        /// The clusters.
        token: Box<dyn Allocation + 'a>,
        /// How the layer maps a part of what they cover, or all of it, until they are committed.
        over: Extent,
    },
}

/// Host clusters reserved for a write. Dropped without [`commit`](Allocation::commit), it gives
/// them back.
pub trait Allocation {
    /// First guest byte covered.
    fn start(&self) -> GuestOffset;

    /// Bytes covered, never 0.
    fn len(&self) -> u64;

    /// Never: a token covers at least one cluster's worth.
    fn is_empty(&self) -> bool {
        false
    }

    /// Whether the reserved bytes already read as zeroes on the host.
    fn reads_zero(&self) -> bool;

    /// Writes into the reserved bytes, `skip` bytes after the start.
    fn write(&self, skip: u64, bufs: &[IoSlice<'_>]) -> Result<()>;

    /// Makes reserved bytes, `skip` bytes after the start, share the space of those at `from_offset`
    /// of `from`, as [`FileStorage::share`](crate::storage::FileStorage::share) does. `false`, and
    /// nothing done, where that cannot be.
    fn share(&self, skip: u64, from: &dyn Storage, from_offset: u64, len: u64) -> Result<bool> {
        let _ = (skip, from, from_offset, len);
        Ok(false)
    }

    /// Points the guest range at what was written. All of the range has been written before, or
    /// reads as zeroes.
    fn commit(self: Box<Self>) -> Result<()>;
}

/// The whole units that a range touches, cut at the disk's end.
pub(crate) fn whole(
    unit: Unit,
    at: GuestOffset,
    len: u64,
    size: u64,
) -> (GuestOffset, GuestOffset) {
    (GuestOffset(unit.floor(at.0)), GuestOffset(unit.ceil(at.0.saturating_add(len)).min(size)))
}

fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "the layer is open for reading only")
}
