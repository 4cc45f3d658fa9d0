//! Where in its cluster what stands of a header.
//!
//! A medium writes a sector whole or not at all, and a labelled header is changed by one write of its
//! first sector. What it has no room for there (the rest of a label, long names, extensions of
//! others) is written past what the header takes in the file, and made durable, before the sector that
//! leads to it. The *gap* in between is an extension, too: other programs keep those that they do not
//! know, and the file's bytes that it covers mean nothing.
//!
//! A header without a label stands as QEMU writes it, in one piece. Where that changes past the first
//! sector, one without the feature name table, which only helps messages, stands in between: it does
//! without what is written anew.

use std::ops::Range;

use zerocopy::IntoBytes;

use crate::error::{Error, Result};
use crate::image::{Label, Parts};
use crate::qcow2::header::extension::{self, Extension, HEAD, Head};
use crate::qcow2::header::{Header, MAX_BACKING_NAME};
use crate::storage::Storage;

/// What a medium writes whole or not at all, in bytes.
pub(in crate::qcow2) const SECTOR: u64 = 512;
/// The magic of a gap, "vdgp".
const GAP: u32 = 0x7664_6770;

/// A header's bytes.
pub(in crate::qcow2) struct Layout {
    /// What is written, and where: each is durable before the next.
    writes: Vec<(u64, Vec<u8>)>,
    /// The bytes past the first sector that the header takes then.
    pub spill: Range<u64>,
}

impl Layout {
    /// Writes the header, durably.
    pub fn write(&self, storage: &dyn Storage) -> Result<()> {
        for (at, bytes) in &self.writes {
            storage.write_all_at(*at, bytes)?;
            storage.sync()?;
        }
        Ok(())
    }

    fn whole(bytes: Vec<u8>) -> Layout {
        let len = bytes.len() as u64;
        let spill = if len > SECTOR { SECTOR..len } else { 0..0 };
        Layout { writes: vec![(0, bytes)], spill }
    }
}

/// What stands in the first sector, but for the way to the rest, and what stands in the rest.
struct Divided {
    near: Vec<Extension>,
    /// Extensions past the first sector.
    far: Vec<Extension>,
}

impl Header {
    /// The bytes of the first cluster of a new file.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let layout = Header { spill: 0..0, ..self.clone() }.lay_out_new()?;
        let mut bytes = Vec::new();
        for (at, part) in layout.writes {
            let at = at as usize;
            bytes.resize(bytes.len().max(at + part.len()), 0);
            bytes[at..at + part.len()].copy_from_slice(&part);
        }
        Ok(bytes)
    }

    fn lay_out_new(&self) -> Result<Layout> {
        let bytes = self.encode_whole()?;
        let divided = self.is_labelled() && bytes.len() as u64 > SECTOR;
        let divided = if divided { self.divide() } else { None };
        let layout = divided.and_then(|divided| self.place(divided, &[], SECTOR));
        Ok(layout.unwrap_or(Layout::whole(bytes)))
    }

    /// The header's bytes and their places. `now` are those of [`Header::spill`] in the file.
    pub(in crate::qcow2) fn lay_out(&self, now: &[u8]) -> Result<Layout> {
        let bytes = self.encode_whole()?;
        let Some(tail) = bytes.get(SECTOR as usize..) else { return Ok(Layout::whole(bytes)) };
        if self.is_labelled() {
            let layout = self.divide().and_then(|divided| self.place(divided, now, SECTOR));
            // In clusters that leave no choice it is written in one piece.
            return Ok(layout.unwrap_or(Layout::whole(bytes)));
        }
        let (end, stays) = (bytes.len() as u64, self.spill.start == SECTOR && tail == now);
        let between = self.divide().filter(|divided| !stays && divided.far.is_empty());
        let between = between.and_then(|divided| self.place(divided, &[], end));
        let mut writes = between.map_or(Vec::new(), |layout| layout.writes);
        if writes.is_empty() && !stays {
            return Ok(Layout::whole(bytes));
        }
        if !stays {
            writes.push((SECTOR, tail.to_vec()));
        }
        writes.push((0, bytes[..SECTOR as usize].to_vec()));
        Ok(Layout { writes, spill: SECTOR..end })
    }

    fn is_labelled(&self) -> bool {
        self.extension(Label::MAGIC).is_some()
    }

    /// All of it in one piece. The feature name table, which only helps messages, is left out where it
    /// does not fit, and where a labelled header fits into one sector without it.
    fn encode_whole(&self) -> Result<Vec<u8>> {
        let mut extensions = self.all_extensions();
        let room = if self.is_labelled() { SECTOR } else { self.cluster.bytes() };
        let name = self.backing_name();
        if name.len() > MAX_BACKING_NAME {
            return Err(Error::invalid(format!(
                "the backing file's name has {} bytes, {MAX_BACKING_NAME} at most",
                name.len()
            )));
        }
        let encode = |extensions: &[Extension]| {
            let encoded = extension::encode(extensions);
            let mut out = self.encode_fixed((self.fixed_len() + encoded.len()) as u64);
            out.extend_from_slice(&encoded);
            out.extend_from_slice(name);
            out
        };
        let mut bytes = encode(&extensions);
        if bytes.len() as u64 > room {
            extensions.retain(|e| e.magic != extension::FEATURE_NAMES);
            bytes = encode(&extensions);
        }
        if bytes.len() as u64 > self.cluster.bytes() {
            return Err(Error::invalid(format!(
                "the header with its names takes {} bytes and must fit into one cluster of {} bytes",
                bytes.len(),
                self.cluster.bytes()
            )));
        }
        Ok(bytes)
    }

    /// With the one that is not among [`Header::extensions`].
    fn all_extensions(&self) -> Vec<Extension> {
        let mut all = self.extensions.clone();
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.as_ref()) {
            let data = format.clone().into_bytes();
            all.push(Extension { magic: extension::BACKING_FORMAT, data });
        }
        all
    }

    /// Divides the extensions; `None` where not even what has to fits into the sector.
    fn divide(&self) -> Option<Divided> {
        let mut all = self.all_extensions();
        all.retain(|e| e.magic != extension::FEATURE_NAMES);
        let size = |list: &[Extension]| extension::encode(list).len();
        let room = (SECTOR as usize).checked_sub(self.fixed_len())?;
        if size(&all) <= room {
            // Only the base's name does not.
            return Some(Divided { near: all, far: Vec::new() });
        }
        let (mut near, mut far): (Vec<_>, Vec<_>) = all.into_iter().partition(extension::is_near);
        let at = far.iter().position(|e| e.magic == Label::MAGIC)?;
        let label = far.remove(at);
        // The end mark is as long as the gap's head, which takes its place.
        let left = room.checked_sub(size(&near) + HEAD)? & !7;
        if label.data.len() <= left {
            near.push(label);
        } else {
            let Parts { front, rest } = Label::split(&label.data, left, self.backing_name())?;
            near.push(Extension { magic: Label::MAGIC, data: front });
            far.insert(0, Extension { magic: Label::REST_MAGIC, data: rest });
        }
        Some(Divided { near, far })
    }

    /// Finds a place at or after `floor` for what stands past the sector, unless that is what stands
    /// there `now`; `None` where there is none.
    fn place(&self, divided: Divided, now: &[u8], floor: u64) -> Option<Layout> {
        let Divided { near, far } = divided;
        let mut rest = if far.is_empty() { Vec::new() } else { extension::encode(&far) };
        let name_at = rest.len() as u64;
        rest.extend_from_slice(self.backing_name());
        let len = rest.len() as u64;
        let stays = rest == now && !rest.is_empty();
        let at = if stays { self.spill.start } else { self.free_place(len, floor)? };
        let mut front = self.encode_fixed(at + name_at);
        front.extend_from_slice(&extension::encode(&near));
        if !far.is_empty() {
            // In the place of the end mark.
            let covered = (at - front.len() as u64) as u32;
            front.truncate(front.len() - HEAD);
            front.extend_from_slice(Head::new(GAP, covered).as_bytes());
        }
        let mut writes = vec![(0, front)];
        if !stays && !rest.is_empty() {
            writes.insert(0, (at, rest));
        }
        Some(Layout { writes, spill: at..at + len })
    }

    /// A place for `len` bytes, at or after `floor`, that the header does not take now.
    fn free_place(&self, len: u64, floor: u64) -> Option<u64> {
        let before = floor + len <= self.spill.start || self.spill.is_empty();
        let at = if before { floor } else { floor.max(self.spill.end) };
        let at = at.next_multiple_of(8);
        (at + len <= self.cluster.bytes()).then_some(at)
    }

    /// Takes what only serves the layout out of the extensions, which stand at `area` of `cluster`,
    /// and notes where the header ends; `end` is the end of the base's name.
    pub(in crate::qcow2) fn take_layout(&mut self, cluster: &[u8], area: Range<usize>, end: u64) {
        let base = area.start;
        let area = cluster.get(area).unwrap_or_default();
        let mut start = SECTOR;
        let mut last = end;
        extension::each(area, |magic, place| {
            let place = (base + place.start) as u64..(base + place.end) as u64;
            if magic == GAP && place.start < SECTOR {
                start = start.max(place.end);
            }
            last = last.max(place.end);
        });
        let last = last.min(cluster.len() as u64);
        self.spill = if last > start { start..last } else { 0..0 };
        self.extensions.retain(|e| e.magic != GAP);
        let find = |magic| self.extensions.iter().find(|e| e.magic == magic);
        let label = find(Label::MAGIC).zip(find(Label::REST_MAGIC));
        if let Some(whole) = label.and_then(|(front, rest)| Label::join(&front.data, &rest.data)) {
            self.set_extension(Label::REST_MAGIC, None);
            self.set_extension(Label::MAGIC, Some(whole));
        }
    }
}
