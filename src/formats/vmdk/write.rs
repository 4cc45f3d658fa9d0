//! A VMDK that is written, in as many files as it consists of: the disk's parts side by side, and the
//! content id, which changes before the disk does.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, PoisonError};

use super::descriptor::{Descriptor, Kind};
use super::fill::Grains;
use super::sparse::{Header, Layout, SECTOR, Sparse};
use super::{Bytes, PAGES, Part, Plan, Vmdk};
use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::formats::fill::{self, Everywhere, Filling};
use crate::formats::runs;
use crate::image::{
    Allocation, Backing, Capabilities, Compress, Extent, Fingerprint, Image, Mapping, Placed,
};
use crate::storage::Storage;

/// Host offsets of the next file begin so far on: see [`Vmdk`]. Files grow, and none by that much.
const FILE: Unit = Unit::from_bits(47);
/// The most digits of a content id.
const DIGITS: usize = 8;

/// One VMDK, open for writing.
pub struct Written {
    parts: Vec<Stretch>,
    size: u64,
    descriptor: Descriptor,
    stamp: Stamp,
}

/// A part of the disk.
struct Stretch {
    start: u64,
    len: u64,
    image: Filling,
    /// What host offsets begin with.
    base: u64,
    /// Which of the descriptor's files holds it.
    file: Option<usize>,
}

impl Plan {
    /// The image, over the opened [`files`](Plan::files) in their order, to be written.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for kinds of extents that are only
    /// read; as [`open`](Plan::open) besides.
    pub fn open_to_write(self, files: &[Arc<dyn Storage>]) -> Result<Written> {
        if files.len() != self.files().len() {
            return Err(Error::invalid("a storage for each file of the descriptor is needed"));
        }
        let (at, len) = self.own.as_ref().map_or((0, self.storage.len()?), |own| own.descriptor);
        let stamp = Stamp::find(Arc::clone(&self.storage), at, len)?;
        let mut written =
            Written { parts: Vec::new(), size: 0, stamp, descriptor: self.descriptor };
        if let Some(header) = self.own {
            let (len, storage) = (header.capacity, self.storage);
            written.push(len, None, |parent| sparse(storage, header, len, PAGES, parent))?;
            return Ok(written);
        }
        let lines = written.descriptor.extents.clone();
        let pages = PAGES / lines.len().max(1);
        for line in lines.iter().filter(|line| line.len != 0) {
            if !line.writable {
                return Err(Error::unsupported("a VMDK with extents that are only to be read"));
            }
            let file = line.kind.file();
            let storage = file.and_then(|file| files.get(file)).map(Arc::clone);
            written.push(line.len, file, |parent| match (line.kind, storage) {
                (Kind::Flat { offset, .. }, Some(storage)) => {
                    flat(storage, offset, line.len, parent)
                }
                (Kind::Sparse { .. }, Some(storage)) => {
                    let header = Header::read(&storage)?;
                    sparse(storage, header, line.len, pages, parent)
                }
                _ => Err(Error::unsupported("a VMDK with extents of zeroes is only read")),
            })?;
        }
        Ok(written)
    }
}

/// What a part's own reader is told of the image: whether anything shows from below.
type Parent = Descriptor;

fn sparse(
    storage: Arc<dyn Storage>,
    header: Header,
    len: u64,
    pages: usize,
    parent: Parent,
) -> Result<Filling> {
    if header.layout != Layout::Hosted {
        return Err(Error::unsupported("the snapshots of ESX are only read"));
    }
    if header.capacity < len {
        return Err(Error::corrupt("an extent is shorter than the descriptor says").at_offset(12));
    }
    let sparse = Sparse::open(Arc::clone(&storage), header.clone(), pages)?;
    let held = held(Bytes::Sparse(Box::new(sparse)), len, parent);
    let end = fill::end(&*storage, &*held, header.grain, header.overhead)?;
    if header.compressed() && end > header.overhead {
        return Err(Error::unsupported(
            "streamOptimized images are written once: convert into a new one",
        ));
    }
    let grains = Grains::new(Arc::clone(&storage), header, end);
    Ok(Filling::of_image(storage, held, Box::new(grains)))
}

fn flat(storage: Arc<dyn Storage>, offset: u64, len: u64, parent: Parent) -> Result<Filling> {
    fields::within(offset, len, storage.len()?, "a flat VMDK extent")?;
    let bytes = Bytes::Flat { storage: Arc::clone(&storage), offset };
    Ok(Filling::of_image(storage, held(bytes, len, parent), Box::new(Everywhere)))
}

/// What reads a part alone.
fn held(bytes: Bytes, len: u64, parent: Parent) -> Arc<Vmdk> {
    let part = Part { start: 0, len, bytes, base: 0, file: None, kind: "" };
    Arc::new(Vmdk::new(vec![part], len, parent))
}

impl Written {
    fn push(
        &mut self,
        len: u64,
        file: Option<usize>,
        open: impl FnOnce(Parent) -> Result<Filling>,
    ) -> Result<()> {
        let parent = Parent { parent: self.descriptor.parent.clone(), ..Parent::default() };
        let (start, image) = (self.size, open(parent)?);
        // Writers of one block are kept apart by whoever knows the disk's blocks only.
        if !image.cluster().aligned(start) {
            return Err(Error::unsupported("an extent that begins inside a grain is only read"));
        }
        let base = FILE.start(file.unwrap_or(0) as u64).filter(|base| *base < 1 << 62);
        let base = base.ok_or_else(|| Error::unsupported("a VMDK of too many files"))?;
        let end = start.checked_add(len).filter(|end| *end < 1 << 62);
        self.size = end.ok_or_else(|| Error::corrupt("the extents are larger than any disk"))?;
        self.parts.push(Stretch { start, len, image, base, file });
        Ok(())
    }

    fn part(&self, at: u64) -> Result<&Stretch> {
        let next = self.parts.partition_point(|part| part.start <= at);
        next.checked_sub(1)
            .and_then(|index| self.parts.get(index))
            .filter(|part| at - part.start < part.len)
            .ok_or_else(|| Error::invalid("past the end of the disk"))
    }
}

impl Stretch {
    /// An extent of the part as one of the disk.
    fn outward(&self, extent: Extent) -> Extent {
        let host = |host: HostOffset| HostOffset(host.0 + self.base);
        let mapping = match extent.mapping {
            Mapping::Data { host: at, exclusive } => Mapping::Data { host: host(at), exclusive },
            Mapping::Zero { host: Some(at) } => Mapping::Zero { host: Some(host(at)) },
            other => other,
        };
        Extent { start: GuestOffset(extent.start.0 + self.start), mapping, ..extent }
    }

    /// Takes [`outward`](Stretch::outward) back.
    fn inward(&self, extent: &Extent) -> Result<Extent> {
        let other = || Error::invalid("not this image's extent");
        let host = |at: HostOffset| at.0.checked_sub(self.base).map(HostOffset).ok_or_else(other);
        let mapping = match extent.mapping {
            Mapping::Data { host: at, exclusive } => Mapping::Data { host: host(at)?, exclusive },
            Mapping::Zero { host: Some(at) } => Mapping::Zero { host: Some(host(at)?) },
            mapping => mapping,
        };
        Ok(Extent { start: self.within(extent.start)?, mapping, ..*extent })
    }

    fn within(&self, at: GuestOffset) -> Result<GuestOffset> {
        let at = at.0.checked_sub(self.start).map(GuestOffset);
        at.ok_or_else(|| Error::invalid("not in this part of the disk"))
    }
}

impl Image for Written {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster(&self) -> Unit {
        let largest = self.parts.iter().map(|part| part.image.cluster().bits()).max();
        largest.map_or(runs::CLUSTER, Unit::from_bits)
    }

    fn granularity(&self) -> Unit {
        let largest = self.parts.iter().map(|part| part.image.granularity().bits()).max();
        largest.map_or(SECTOR, Unit::from_bits)
    }

    fn backing(&self) -> Option<Backing> {
        let name = self.descriptor.parent.clone()?;
        Some(Backing { name, format: Some("vmdk".to_owned()) })
    }

    fn read_only(&self) -> bool {
        false
    }

    fn starts_zeroed(&self) -> bool {
        self.parts.iter().all(|part| part.image.starts_zeroed())
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.size)?;
        let part = self.part(at.0)?;
        part.image.map(part.within(at)?, len).map(|extent| part.outward(extent))
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        let part = self.part(extent.start.0)?;
        part.image.narrow(part.inward(&extent)?).map(|extent| part.outward(extent))
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let part = self.part(extent.start.0)?;
        part.image.read(&part.inward(extent)?, part.within(at)?, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let part = self.part(extent.start.0)?;
        self.stamp.renew()?;
        part.image.overwrite(&part.inward(extent)?, part.within(at)?, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        let part = self.part(at.0)?;
        self.stamp.renew()?;
        let inner = part.image.prepare(part.within(at)?, len)?;
        Ok(Box::new(Moved { inner, by: part.start }))
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        let end = at.0.saturating_add(len).min(self.size);
        let mut pos = at.0;
        while pos < end {
            let part = self.part(pos)?;
            let len = (end - pos).min(part.start + part.len - pos);
            part.image.zero(part.within(GuestOffset(pos))?, len, unmap)?;
            pos += len;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.image.flush())?;
        self.stamp.storage.sync()
    }

    fn resize_over(&self, _: u64, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Err(fill::no_resize())
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            compress: Some(self),
            fingerprint: Some(self),
            placed: Some(self),
            ..Capabilities::default()
        }
    }
}

impl Compress for Written {
    fn pack(&self, at: GuestOffset, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        let part = self.part(at.0)?;
        part.image.pack(part.within(at)?, bytes)
    }

    fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool> {
        let part = self.part(at.0)?;
        self.stamp.renew()?;
        part.image.write_packed(part.within(at)?, packed)
    }
}

impl Fingerprint for Written {
    /// The one that it had when it was opened.
    fn fingerprint(&self) -> Option<String> {
        self.descriptor.cid.map(super::cid)
    }

    fn parent_fingerprints(&self) -> Vec<String> {
        self.descriptor.parent_fingerprints()
    }
}

impl Placed for Written {
    fn place(&self, host: HostOffset) -> Option<(&str, HostOffset)> {
        let part = self.parts.iter().rfind(|part| part.file.is_some() && part.base <= host.0)?;
        let name = self.descriptor.files.get(part.file?)?;
        Some((&name.text, HostOffset(host.0 - part.base)))
    }
}

/// A place in a part, as one of the disk.
struct Moved<'a> {
    inner: Box<dyn Allocation + 'a>,
    by: u64,
}

impl Allocation for Moved<'_> {
    fn start(&self) -> GuestOffset {
        GuestOffset(self.inner.start().0 + self.by)
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn reads_zero(&self) -> bool {
        self.inner.reads_zero()
    }

    fn write(&self, skip: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.inner.write(skip, bufs)
    }

    fn commit(self: Box<Self>) -> Result<()> {
        self.inner.commit()
    }
}

/// The content id in the descriptor: children know by it that their parent is the one they were made
/// on, so that it changes, durably, before the first byte does.
struct Stamp {
    storage: Arc<dyn Storage>,
    /// Where its digits stand, and those; `None` for a descriptor without one.
    digits: Option<(u64, Vec<u8>)>,
    renewed: Mutex<bool>,
}

impl Stamp {
    /// Looks for it in the text of `len` bytes at `at`.
    fn find(storage: Arc<dyn Storage>, at: u64, len: u64) -> Result<Stamp> {
        let len = len.min(super::descriptor::MAX_TEXT);
        let text = fields::read(&storage, at, len, "the VMDK descriptor")?;
        let mut digits = None;
        let mut from = at;
        for line in text.split(|&b| b == b'\n') {
            if let Some(value) = line.strip_prefix(b"CID=") {
                let count = value.iter().take(DIGITS).take_while(|b| b.is_ascii_hexdigit()).count();
                let value = value.get(..count).unwrap_or_default().to_vec();
                digits = Some((from + 4, value)).filter(|(_, value)| !value.is_empty());
                break;
            }
            from += line.len() as u64 + 1;
        }
        Ok(Stamp { storage, digits, renewed: Mutex::new(false) })
    }

    /// Gives the disk another id, the first time.
    fn renew(&self) -> Result<()> {
        let mut renewed = self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        if *renewed {
            return Ok(());
        }
        if let Some((at, old)) = &self.digits {
            // As many digits: nothing of the text moves, and no part of it is torn.
            self.storage.write_all_at(*at, another(old).as_bytes())?;
            self.storage.sync()?;
        }
        *renewed = true;
        Ok(())
    }
}

/// Hexadecimal digits, as many as `old` has and none of those that mean something.
fn another(old: &[u8]) -> String {
    let width = old.len().clamp(1, DIGITS);
    let mask = u32::MAX >> (4 * (DIGITS - width));
    loop {
        let id = uuid::Uuid::new_v4().as_u128() as u32 & mask;
        let text = format!("{id:0width$x}");
        if id != 0 && id != u32::MAX && !text.as_bytes().eq_ignore_ascii_case(old) {
            return text;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_id_has_as_many_digits_and_differs() {
        for old in ["1", "7d1", "0badcafe"] {
            let new = another(old.as_bytes());
            assert!(new.len() == old.len() && new != old, "{old} {new}");
        }
    }
}
