//! Reading and writing a chain: the flat disk that the guest sees.
//!
//! A write to bytes that the head maps to data of its own goes straight there. Every other write
//! changes the mapping: it takes the clusters' in-flight entry, fills new clusters with what the
//! layers below show around the guest's bytes, and commits.

use std::io::{IoSlice, IoSliceMut};

use crate::addr::{GuestOffset, Unit};
use crate::block::{
    BlockDevice, BlockExtent, BlockStatus, check_range, total, total_mut, window, with_window,
};
use crate::chain::{Chain, Layers, MapExtent};
use crate::error::{ErrorKind, Result};
use crate::image::{Allocation, Begun, Extent, Mapping};

/// The most that one allocating write covers, in bytes: what is waited for stays short.
const MAX_ALLOCATION: u64 = 4 << 20;
/// Bytes of zeroes that are written at a time where a format has no zero clusters.
const ZEROES: u64 = 1 << 20;

impl Layers {
    pub(crate) fn map(&self, at: GuestOffset, len: u64, narrow: bool) -> Result<MapExtent> {
        let (mut extent, depth) = {
            let extent = self.head.image.map(at, len)?;
            if extent.mapping == Mapping::Unallocated {
                let run = self.lower.find(at, extent.len)?;
                (run.extent, if run.is_hole() { 0 } else { run.layer as usize + 1 })
            } else {
                (extent, 0)
            }
        };
        if narrow && matches!(extent.mapping, Mapping::Data { .. }) {
            let image = match depth {
                0 => &self.head.image,
                below => &self.lower.layers()[below - 1].image,
            };
            extent = image.narrow(extent)?;
        }
        Ok(MapExtent { start: at.0, len: extent.len, mapping: extent.mapping, depth })
    }

    pub(crate) fn read(&self, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = total_mut(bufs);
        let mut done = 0;
        while done < len {
            let pos = at + done;
            // By reference: to be moved out of the result is as dear as the look itself.
            let found = self.head.image.map(pos, len - done);
            let Ok(extent) = &found else { return found.map(drop) };
            if extent.len == len && extent.mapping != Mapping::Unallocated {
                return self.head.image.read(extent, pos, bufs);
            }
            with_window(bufs, done, extent.len, |target| match extent.mapping {
                Mapping::Unallocated => self.lower.read(pos, extent.len, target),
                _ => self.head.image.read(extent, pos, target),
            })?;
            done += extent.len;
        }
        Ok(())
    }

    /// Whether a range is known to read as zeroes without reading it.
    pub(crate) fn is_zero(&self, from: u64, to: u64) -> Result<bool> {
        let mut pos = from;
        while pos < to {
            let extent = self.map(GuestOffset(pos), to - pos, false)?;
            if !matches!(extent.mapping, Mapping::Zero { .. } | Mapping::Unallocated) {
                return Ok(false);
            }
            pos += extent.len;
        }
        Ok(true)
    }

    /// Fills what `token` reserved: `bufs` from `pos` on, and around them what the disk shows there
    /// now. `bufs` end within the token. `over` is what the head maps there, as far as that is known.
    pub(crate) fn fill(
        &self,
        token: &dyn Allocation,
        over: Option<&Extent>,
        pos: u64,
        bufs: &[IoSlice<'_>],
    ) -> Result<()> {
        let (start, end) = (token.start().0, token.start().0 + token.len());
        let (from, to) = (pos, pos + total(bufs));
        let known = over.filter(|o| o.start.0 <= start && end <= o.start.0 + o.len);
        let shown = Shown { mapping: known.map(|o| o.mapping), spare: token.reads_zero() };
        let front = self.padding(start, from, shown)?;
        let back = self.padding(to, end, shown)?;
        let mut all = Vec::with_capacity(bufs.len() + 2);
        all.extend(front.as_deref().map(IoSlice::new));
        all.extend_from_slice(bufs);
        all.extend(back.as_deref().map(IoSlice::new));
        token.write(if front.is_some() { 0 } else { from - start }, &all)
    }

    /// The bytes of a range that is copied up; `None` where it is empty, or where it reads as zeroes
    /// and so do the new clusters.
    fn padding(&self, from: u64, to: u64, shown: Shown) -> Result<Option<Vec<u8>>> {
        if from == to || shown.spare && self.shows_zero(from, to, shown)? {
            return Ok(None);
        }
        let mut bytes = vec![0; (to - from) as usize];
        let target = &mut [IoSliceMut::new(&mut bytes)];
        match shown.mapping {
            Some(Mapping::Zero { .. }) => {}
            Some(Mapping::Unallocated) => self.lower.read(GuestOffset(from), to - from, target)?,
            _ => self.read(GuestOffset(from), target)?,
        }
        Ok(Some(bytes))
    }

    /// Whether a range is known to read as zeroes, of which the head was looked up already.
    fn shows_zero(&self, from: u64, to: u64, shown: Shown) -> Result<bool> {
        match shown.mapping {
            Some(Mapping::Unallocated) => self.lower.is_zero(from, to),
            Some(mapping) => Ok(matches!(mapping, Mapping::Zero { .. })),
            None => self.is_zero(from, to),
        }
    }
}

/// What surrounds a write in the clusters that it gets.
#[derive(Clone, Copy)]
struct Shown {
    /// How the head maps all of it, where that is known.
    mapping: Option<Mapping>,
    /// Whether the new clusters read as zeroes.
    spare: bool,
}

impl Chain {
    /// Does what a guest asks for, a second time where the host had no space for it and some could be
    /// made.
    pub(super) fn with_space(&self, work: impl Fn() -> Result<()>) -> Result<()> {
        match work() {
            Err(e) if e.kind() == ErrorKind::NoSpace && self.make_space() => work(),
            done => done,
        }
    }

    fn zero_once(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        let layers = self.layers();
        let head = &layers.head.image;
        check_range(offset, len, head.size())?;
        self.check_not_lost().map_err(|e| e.at_path(&layers.head.path))?;
        let _hold = head.hold();
        let end = offset + len;
        let zero = || {
            let Some((from, to)) = whole_units(head.granularity(), offset, end, head.size()) else {
                return self.write_zero_bytes(&layers, offset, end);
            };
            self.write_zero_bytes(&layers, offset, from)?;
            let entry = self.inflight.enter(head.cluster().floor(from)..head.cluster().ceil(to));
            let done = head.zero(GuestOffset(from), to - from, may_unmap);
            drop(entry);
            self.or_with_bytes(&layers, done, from, to)?;
            self.write_zero_bytes(&layers, to, end)
        };
        zero().map_err(|e| e.at_path(&layers.head.path))
    }

    fn discard_once(&self, offset: u64, len: u64) -> Result<()> {
        let layers = self.layers();
        let head = &layers.head.image;
        check_range(offset, len, head.size())?;
        self.check_not_lost().map_err(|e| e.at_path(&layers.head.path))?;
        let _hold = head.hold();
        // With subclusters only whole clusters are given back: a part keeps its cluster anyway.
        let unit = if head.granularity().bits() == 0 { head.granularity() } else { head.cluster() };
        let Some((from, to)) = whole_units(unit, offset, offset + len, head.size()) else {
            return Ok(());
        };
        let _entry = self.inflight.enter(head.cluster().floor(from)..head.cluster().ceil(to));
        head.discard(GuestOffset(from), to - from, false).map_err(|e| e.at_path(&layers.head.path))
    }

    fn write_once(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let layers = self.layers();
        check_range(offset, total(bufs), layers.head.image.size())?;
        self.check_not_lost().map_err(|e| e.at_path(&layers.head.path))?;
        let _hold = layers.head.image.hold();
        self.write(&layers, offset, bufs).map_err(|e| e.at_path(&layers.head.path))
    }

    /// Writes at most `bufs`, at a place that needs a new mapping; returns how much it wrote.
    fn write_new(&self, layers: &Layers, pos: u64, bufs: &[IoSlice<'_>]) -> Result<u64> {
        let head = &layers.head.image;
        let len = total(bufs).min(MAX_ALLOCATION.max(head.cluster().bytes()));
        let cluster = head.cluster();
        let _entry = self.inflight.enter(cluster.floor(pos)..cluster.ceil(pos + len));
        let (token, over) = match head.begin_write(GuestOffset(pos), len)? {
            Begun::Reserved { token, over } => (token, over),
            Begun::InPlace(extent) => {
                // Whoever was here before has allocated it.
                let len = len.min(extent.start.0 + extent.len - pos);
                head.overwrite(&extent, GuestOffset(pos), &window(bufs, 0, len))?;
                return Ok(len);
            }
        };
        let len = len.min(token.start().0 + token.len() - pos);
        layers.fill(&*token, Some(&over), pos, &window(bufs, 0, len))?;
        token.commit()?;
        Ok(len)
    }

    pub(crate) fn write(&self, layers: &Layers, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let head = &layers.head.image;
        let len = total(bufs);
        let mut done = 0;
        while done < len {
            let pos = offset + done;
            let found = head.map(GuestOffset(pos), len - done);
            let Ok(extent) = &found else { return found.map(drop) };
            done += match extent.mapping {
                Mapping::Data { exclusive: true, .. } if extent.len == len => {
                    head.overwrite(extent, extent.start, bufs)?;
                    len
                }
                Mapping::Data { exclusive: true, .. } => {
                    head.overwrite(extent, extent.start, &window(bufs, done, extent.len))?;
                    extent.len
                }
                _ => self.write_new(layers, pos, &window(bufs, done, len - done))?,
            };
        }
        Ok(())
    }

    pub(crate) fn write_zero_bytes(&self, layers: &Layers, from: u64, to: u64) -> Result<()> {
        if from >= to || layers.is_zero(from, to)? {
            return Ok(());
        }
        let zeroes = vec![0; (to - from).min(ZEROES) as usize];
        let mut pos = from;
        while pos < to {
            let n = (to - pos).min(ZEROES);
            self.write(layers, pos, &[IoSlice::new(&zeroes[..n as usize])])?;
            pos += n;
        }
        Ok(())
    }

    /// Writes zeroes where the head's format could not say that a range is zero.
    pub(crate) fn or_with_bytes(
        &self,
        layers: &Layers,
        done: Result<()>,
        from: u64,
        to: u64,
    ) -> Result<()> {
        match done {
            Err(e) if e.kind() == ErrorKind::Unsupported => self.write_zero_bytes(layers, from, to),
            other => other,
        }
    }

    /// Writes one whole cluster of the head, or its part up to the disk's end, compressed where
    /// that saves space.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the head's format does not compress.
    pub fn write_compressed(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let packed = self.pack(offset, bytes)?;
        self.write_packed(offset, bytes, packed.as_deref())
    }

    /// The compressed form of one whole cluster of the head at `offset`, or of its part up to the
    /// disk's end; `None` where that would save nothing. Writes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the head's format does not compress.
    pub fn pack(&self, offset: u64, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        let layers = self.layers();
        let head = &layers.head;
        check_range(offset, bytes.len() as u64, head.image.size())?;
        head.image.pack(GuestOffset(offset), bytes).map_err(|e| e.at_path(&head.path))
    }

    /// Writes `bytes`, for which [`pack`](Chain::pack) returned `packed`.
    pub fn write_packed(&self, offset: u64, bytes: &[u8], packed: Option<&[u8]>) -> Result<()> {
        let Some(packed) = packed else {
            return self.write_at(offset, &[IoSlice::new(bytes)]);
        };
        self.with_space(|| self.write_packed_once(offset, bytes, packed))
    }

    fn write_packed_once(&self, offset: u64, bytes: &[u8], packed: &[u8]) -> Result<()> {
        let layers = self.layers();
        let head = &layers.head.image;
        check_range(offset, bytes.len() as u64, head.size())?;
        self.check_not_lost().map_err(|e| e.at_path(&layers.head.path))?;
        let _hold = head.hold();
        let entry = self.inflight.enter(offset..head.cluster().ceil(offset + bytes.len() as u64));
        let done = head.write_packed(GuestOffset(offset), packed);
        drop(entry);
        match done {
            Ok(true) => Ok(()),
            Ok(false) => self.write(&layers, offset, &[IoSlice::new(bytes)]),
            Err(e) => Err(e),
        }
        .map_err(|e| e.at_path(&layers.head.path))
    }

    /// Changes the size of the disk, in bytes. New bytes read as zeroes. Interrupted, it leaves the
    /// disk as it was or as it was to be.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a smaller size where the format cannot shrink.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.with_space(|| self.resize_once(size))
    }

    fn resize_once(&self, size: u64) -> Result<()> {
        self.check_not_lost()?;
        let layers = self.layers_alone();
        let head = &layers.head.image;
        let old = head.size();
        head.resize_over(size, &mut || {
            let _hold = head.hold();
            self.clear_between(&layers, old.min(size), old.max(size))?;
            if size > old { self.hide_below(&layers, old, size) } else { Ok(()) }
        })?;
        head.flush()
    }

    /// Zeroes the rest of the cluster in which the `shorter` disk ends: it keeps its place, and what it
    /// held there must not come back when the disk grows.
    fn clear_between(&self, layers: &Layers, shorter: u64, longer: u64) -> Result<()> {
        let head = &layers.head.image;
        self.write_zero_bytes(layers, shorter, head.cluster().ceil(shorter).min(longer))
    }

    /// Zeroes what a longer layer below would show where the disk ended before.
    fn hide_below(&self, layers: &Layers, old: u64, size: u64) -> Result<()> {
        let head = &layers.head.image;
        let below = layers.lower.layers().first().map_or(0, |l| l.image.size());
        let to = size.min(below);
        if to <= old {
            return Ok(());
        }
        let unit = head.granularity();
        let start = unit.ceil(old).min(to);
        self.write_zero_bytes(layers, old, start)?;
        if start == to {
            return Ok(());
        }
        let to = unit.ceil(to).min(size);
        let zeroed = head.zero(GuestOffset(start), to - start, true);
        self.or_with_bytes(layers, zeroed, start, to)
    }
}

/// The largest range of whole units within `from..to`; the disk's end counts as a boundary.
pub(crate) fn whole_units(unit: Unit, from: u64, to: u64, size: u64) -> Option<(u64, u64)> {
    let start = unit.ceil(from);
    let end = if to == size { to } else { unit.floor(to) };
    (start < end).then_some((start, end))
}

impl BlockDevice for Chain {
    fn size(&self) -> u64 {
        self.layers().head.image.size()
    }

    fn block_size(&self) -> u32 {
        self.layers().head.image.granularity().bytes().clamp(512, 1 << 20) as u32
    }

    fn read_only(&self) -> bool {
        self.layers().head.image.read_only()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let layers = self.layers();
        check_range(offset, total_mut(bufs), layers.head.image.size())?;
        let _hold = layers.head.image.hold();
        layers.read(GuestOffset(offset), bufs).map_err(|e| e.at_path(&layers.head.path))
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.with_space(|| self.write_once(offset, bufs))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.with_space(|| self.zero_once(offset, len, may_unmap))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.with_space(|| self.discard_once(offset, len))
    }

    fn flush(&self) -> Result<()> {
        // No lock is kept: a sync may last, and a snapshot that is taken meanwhile is not to wait.
        // What was written before this call is in this head, whatever is put on it.
        let head = self.published_head();
        self.check_not_lost().map_err(|e| e.at_path(&head.path))?;
        head.image.flush().map_err(|e| e.at_path(&head.path))
    }

    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<BlockExtent>> {
        let layers = self.layers();
        check_range(offset, len, layers.head.image.size())?;
        let _hold = layers.head.image.hold();
        let (mut pos, end) = (offset, offset + len);
        let mut found: Vec<BlockExtent> = Vec::new();
        while pos < end {
            let extent = layers.map(GuestOffset(pos), end - pos, true)?;
            let status = match extent.mapping {
                Mapping::Zero { .. } | Mapping::Unallocated => BlockStatus::Zero,
                Mapping::Data { .. } | Mapping::Compressed { .. } => BlockStatus::Data,
            };
            let full = found.len() >= limit;
            match found.last_mut() {
                Some(last) if last.status == status => last.len += extent.len,
                _ if full => break,
                _ => found.push(BlockExtent { offset: pos, len: extent.len, status }),
            }
            pos += extent.len;
        }
        Ok(found)
    }
}
