//! VMDK, VMware's disk image: sparse and stream-optimised extents, flat files with a descriptor,
//! and disks in several files.
//!
//! A descriptor names further files. They are opened by whoever holds the policy for names found
//! inside images: [`Plan::read`] says which, [`Plan::open`] takes them.

use std::io::IoSliceMut;
use std::sync::{Arc, Mutex, PoisonError};

use self::descriptor::Kind;
pub use self::descriptor::{Descriptor, Name};
use self::sparse::{Header, Sparse};
use super::{fields, probe, runs};
use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::block;
use crate::error::{Error, Result};
use crate::image::{Backing, Capabilities, Extent, Fingerprint, Image, Mapping, Placed};
use crate::storage::Storage;

mod create;
mod descriptor;
mod esx;
mod fill;
mod sparse;
mod write;

pub use create::{CreateOptions, Subformat, check_name, create};
pub use write::Written;

/// What lies between two files in the order of host offsets, at least.
const GAP: Unit = Unit::from_bits(16);
/// Pages of tables that one disk keeps, shared out among its extents: 4 MiB.
const PAGES: usize = super::pages::Pages::DEFAULT;

/// A VMDK whose description was read and whose extents are still to be opened.
pub struct Plan {
    storage: Arc<dyn Storage>,
    descriptor: Descriptor,
    /// The one extent, when it stands in the same file as the description.
    own: Option<Header>,
}

/// One VMDK, open for reading.
///
/// Host offsets of a disk in several files count as if the files stood one after the other, with a
/// gap between: extents that follow each other in different files never look like one.
pub struct Vmdk {
    parts: Vec<Part>,
    size: u64,
    descriptor: Descriptor,
    unpacked: Mutex<Option<Unpacked>>,
}

/// The compressed grain that was read last: a reader with small steps unpacks it once.
#[derive(Clone)]
struct Unpacked {
    /// The part's start and the grain's place in its file.
    place: (u64, u64),
    bytes: Arc<[u8]>,
}

/// What there is to say about an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentInfo {
    /// Bytes of the guest's disk.
    pub len: u64,
    /// Which of the descriptor's files holds it; `None` for the image's own, or for zeroes.
    pub file: Option<usize>,
    /// Its type, as the descriptor has it; empty for the image's own.
    pub kind: &'static str,
    /// Bytes of a grain of a sparse one.
    pub grain: Option<u64>,
    /// Its grains are compressed.
    pub compressed: bool,
}

/// A stretch of the guest disk.
struct Part {
    start: u64,
    len: u64,
    bytes: Bytes,
    /// What the file's host offsets begin with: see [`Vmdk`].
    base: u64,
    /// Which of the descriptor's files it stands in.
    file: Option<usize>,
    /// Its type, as the descriptor has it.
    kind: &'static str,
}

enum Bytes {
    Flat { storage: Arc<dyn Storage>, offset: u64 },
    Sparse(Box<Sparse>),
    Zero,
}

impl Plan {
    /// Reads what the file itself says: a sparse extent's header, or a descriptor.
    pub fn read(storage: Arc<dyn Storage>) -> Result<Plan> {
        let len = storage.len()?;
        let head = fields::read(&storage, 0, len.min(probe::HEAD as u64), "the VMDK header")?;
        if !probe::vmdk(&head) {
            return Err(Error::corrupt("not a VMDK image").at_offset(0));
        }
        if head.starts_with(b"COWD") {
            return Err(Error::unsupported(
                "a part of a snapshot of ESX, which says nothing of what it stands on: open the \
                 descriptor beside it",
            )
            .at_offset(0));
        }
        if !head.starts_with(b"KDMV") {
            let descriptor = Descriptor::read(&storage, 0, len)?;
            return Ok(Plan { storage, descriptor, own: None });
        }
        let header = Header::read(&storage)?;
        let (at, len) = header.descriptor;
        let descriptor = match at {
            0 => Descriptor { create_type: "monolithicSparse".to_owned(), ..Descriptor::default() },
            _ => Descriptor::read(&storage, at, len)?,
        };
        let own = (header.capacity != 0).then_some(header);
        Ok(Plan { storage, descriptor, own })
    }

    /// The names of the files that hold the extents, relative to the image's directory unless
    /// absolute. Empty when the image is a single file.
    pub fn files(&self) -> &[Name] {
        if self.own.is_some() { &[] } else { &self.descriptor.files }
    }

    /// What the descriptor says.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The image, over the opened [`files`](Plan::files) in their order.
    pub fn open(self, files: &[Arc<dyn Storage>]) -> Result<Vmdk> {
        if files.len() != self.files().len() {
            return Err(Error::invalid("a storage for each file of the descriptor is needed"));
        }
        if let Some(header) = self.own {
            let len = header.capacity;
            let bytes = Bytes::Sparse(Box::new(Sparse::open(self.storage, header, PAGES)?));
            let parts = vec![Part { start: 0, len, bytes, base: 0, file: None, kind: "" }];
            return Ok(Vmdk::new(parts, len, self.descriptor));
        }
        let pages = PAGES / self.descriptor.extents.len().max(1);
        let bases = bases(files)?;
        let (mut parts, mut size) = (Vec::new(), 0u64);
        for line in self.descriptor.extents.iter().filter(|line| line.len != 0) {
            let bytes = open_extent(line.kind, line.len, files, pages)?;
            let file = line.kind.file();
            let base = file.and_then(|file| bases.get(file)).copied().unwrap_or(0);
            let (start, len, kind) = (size, line.len, line.name);
            parts.push(Part { start, len, bytes, base, file, kind });
            size = size
                .checked_add(line.len)
                .filter(|&size| i64::try_from(size).is_ok())
                .ok_or_else(|| Error::corrupt("the extents are larger than any disk"))?;
        }
        Ok(Vmdk::new(parts, size, self.descriptor))
    }
}

/// The host offset at which each file begins.
fn bases(files: &[Arc<dyn Storage>]) -> Result<Vec<u64>> {
    let mut next = 0u64;
    let mut bases = Vec::with_capacity(files.len());
    for file in files {
        bases.push(next);
        next = next
            .checked_add(GAP.ceil(file.len()?))
            .and_then(|end| end.checked_add(GAP.bytes()))
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or_else(|| Error::corrupt("the files of the disk are larger than any disk"))?;
    }
    Ok(bases)
}

fn open_extent(kind: Kind, len: u64, files: &[Arc<dyn Storage>], pages: usize) -> Result<Bytes> {
    let storage = |file: usize| {
        files.get(file).cloned().ok_or_else(|| Error::invalid("a file of the image is not open"))
    };
    match kind {
        Kind::Zero => Ok(Bytes::Zero),
        Kind::Flat { file, offset } => {
            let storage = storage(file)?;
            fields::within(offset, len, storage.len()?, "a flat VMDK extent")?;
            Ok(Bytes::Flat { storage, offset })
        }
        Kind::Sparse { file } => {
            let storage = storage(file)?;
            let header = Header::read(&storage)?;
            if header.capacity < len {
                return Err(Error::corrupt(format!(
                    "the descriptor gives {len} bytes to an extent of {} bytes",
                    header.capacity
                ))
                .at_offset(12));
            }
            Ok(Bytes::Sparse(Box::new(Sparse::open(storage, header, pages)?)))
        }
    }
}

fn cid(id: u32) -> String {
    format!("{id:08x}")
}

impl Vmdk {
    fn new(parts: Vec<Part>, size: u64, descriptor: Descriptor) -> Vmdk {
        Vmdk { parts, size, descriptor, unpacked: Mutex::default() }
    }

    /// What the descriptor says: the kind of disk, its content id and its parent's.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The extents, in the order of the disk.
    pub fn extents(&self) -> impl Iterator<Item = ExtentInfo> {
        self.parts.iter().map(|part| {
            let sparse = match &part.bytes {
                Bytes::Sparse(sparse) => Some(&sparse.header),
                _ => None,
            };
            ExtentInfo {
                len: part.len,
                file: part.file,
                kind: part.kind,
                grain: sparse.map(|header| header.grain.bytes()),
                compressed: sparse.is_some_and(Header::compressed),
            }
        })
    }

    fn grain(&self, part: u64, sparse: &Sparse, host: u64) -> Result<Arc<[u8]>> {
        let held = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match held {
            Some(Unpacked { place, bytes }) if place == (part, host) => return Ok(bytes),
            _ => {}
        }
        let bytes: Arc<[u8]> = sparse.unpack(host)?.into();
        let mut held = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        *held = Some(Unpacked { place: (part, host), bytes: Arc::clone(&bytes) });
        Ok(bytes)
    }

    fn part(&self, at: u64) -> Result<&Part> {
        let next = self.parts.partition_point(|part| part.start <= at);
        next.checked_sub(1)
            .and_then(|index| self.parts.get(index))
            .filter(|part| at - part.start < part.len)
            .ok_or_else(|| Error::invalid("past the end of the disk"))
    }
}

impl Image for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster(&self) -> Unit {
        runs::CLUSTER
    }

    /// The grains', where all extents have the same.
    fn block_size(&self) -> Option<u64> {
        let mut grains = self.extents().map(|extent| extent.grain);
        let first = grains.next()??;
        grains.all(|grain| grain == Some(first)).then_some(first)
    }

    fn backing(&self) -> Option<Backing> {
        let name = self.descriptor.parent.clone()?;
        Some(Backing { name, format: Some("vmdk".to_owned()) })
    }

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.size)?;
        let part = self.part(at.0)?;
        let skip = at.0 - part.start;
        let len = len.min(part.len - skip);
        match &part.bytes {
            Bytes::Flat { offset, .. } => {
                Ok(Extent { start: at, len, mapping: runs::data(part.base + offset + skip) })
            }
            Bytes::Zero => Ok(Extent { start: at, len, mapping: Mapping::Zero { host: None } }),
            Bytes::Sparse(sparse) => {
                let mut tables = sparse.tables();
                let extent =
                    runs::longest(at, len, |pos| sparse.piece(&mut tables, pos - part.start))?;
                Ok(runs::shift(extent, part.base))
            }
        }
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        let part = self.part(extent.start.0)?;
        let Bytes::Flat { storage, .. } = &part.bytes else { return Ok(extent) };
        Ok(runs::shift(runs::narrow(storage, runs::unshift(extent, part.base)?)?, part.base))
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let part = self.part(extent.start.0)?;
        match (&part.bytes, extent.mapping) {
            (Bytes::Flat { storage, .. }, _) => {
                runs::read(storage, &runs::unshift(*extent, part.base)?, at, bufs)
            }
            (Bytes::Sparse(sparse), Mapping::Compressed { descriptor }) => {
                runs::skip(extent, at, block::total_mut(bufs))?;
                let grain = self.grain(part.start, sparse, descriptor)?;
                sparse.copy(&grain, descriptor, at.0 - part.start, bufs)
            }
            (Bytes::Sparse(sparse), _) => {
                runs::read(sparse.storage(), &runs::unshift(*extent, part.base)?, at, bufs)
            }
            (Bytes::Zero, _) => {
                runs::skip(extent, at, block::total_mut(bufs))?;
                block::fill_zero(bufs);
                Ok(())
            }
        }
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { fingerprint: Some(self), placed: Some(self), ..Capabilities::default() }
    }
}

impl Fingerprint for Vmdk {
    /// The content id, which every writer changes.
    fn fingerprint(&self) -> Option<String> {
        self.descriptor.cid.map(cid)
    }

    fn parent_fingerprints(&self) -> Vec<String> {
        self.descriptor.parent_fingerprints()
    }
}

impl Placed for Vmdk {
    fn place(&self, host: HostOffset) -> Option<(&str, HostOffset)> {
        let part = self.parts.iter().rfind(|part| part.file.is_some() && part.base <= host.0)?;
        let name = self.descriptor.files.get(part.file?)?;
        Some((&name.text, HostOffset(host.0 - part.base)))
    }
}
