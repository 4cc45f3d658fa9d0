//! The walk over everything that the header reaches, counting references.
//!
//! What is referred to many times is read once: the work is bounded by the size of the file, also
//! where a hostile image makes millions of entries point at one table.

use std::collections::HashMap;

use nix::libc::{EFBIG, EINVAL};

use super::counts::{Counted, Counts};
use super::{Check, Repair};
use crate::error::{Error, Result};
use crate::qcow2::bitmap::directory;
use crate::qcow2::data::crypt;
use crate::qcow2::guard::lock;
use crate::qcow2::header::{Header, MAX_L1};
use crate::qcow2::image::Image;
use crate::qcow2::refcount::bits::max_refcount;
use crate::qcow2::snapshot::Table;
use crate::qcow2::tables::entry::{COPIED, Entry, OFFSET, Shape};
use crate::qcow2::tables::words::decode;

/// Bits of an L1 entry that must be 0.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that must be 0.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// The largest bitmap directory, in bytes.
const MAX_BITMAP_DIRECTORY: u64 = 1 << 20;
/// The most bytes by which a file grows to hold the refcount blocks that it says it has.
const MAX_GROWTH: u64 = 16 << 20;
/// The largest table of one bitmap, in bytes.
const MAX_BITMAP_TABLE: u64 = 32 << 20;

pub(super) struct Walk<'a> {
    image: &'a Image,
    check: &'a mut Check,
    /// What may be mended on the way.
    repair: Repair,
    header: Header,
    counts: Counts,
    file_len: u64,
    /// The largest refcount that this width can say.
    max: u64,
    /// The L2 tables, in the order in which they were first seen.
    l2: Vec<L2>,
    /// Where in `l2` a table with this host offset is.
    l2_index: HashMap<u64, usize>,
    /// Where in `l2` the table is that was seen last.
    last_l2: usize,
    /// The host cluster after the last data cluster seen, to tell fragments.
    next_data: u64,
    /// Clusters of tables, and how often they are referred to as what they are.
    metadata: HashMap<u64, u32>,
    /// The refcounts cannot be mended where they stand.
    pub rebuild: bool,
}

/// An L2 table, and how often it is referred to.
struct L2 {
    offset: u64,
    times: u32,
    /// By the active L1 table.
    active: bool,
}

impl<'a> Walk<'a> {
    pub fn new(image: &'a Image, check: &'a mut Check, repair: Repair) -> Result<Walk<'a>> {
        Walk::of(image.header(), image, check, repair)
    }

    /// A walk of what `header` reaches, which is to become the image's.
    pub fn of(
        header: Header,
        image: &'a Image,
        check: &'a mut Check,
        repair: Repair,
    ) -> Result<Walk<'a>> {
        let file_len = image.storage.len()?;
        let max = max_refcount(header.refcount_order);
        Ok(Walk {
            image,
            check,
            repair,
            header,
            counts: Counts::default(),
            file_len,
            max,
            l2: Vec::new(),
            l2_index: HashMap::new(),
            last_l2: 0,
            next_data: 0,
            metadata: HashMap::new(),
            rebuild: false,
        })
    }

    /// The host offsets of tables that something else uses as well: to write one is to damage the
    /// other.
    pub fn overlaps(&self) -> Vec<u64> {
        let used =
            |(cluster, times): &(&u64, &u32)| self.counts.get(**cluster) > u64::from(**times);
        let shared = self.metadata.iter().filter(used);
        let mut found: Vec<u64> =
            shared.map(|(cluster, _)| cluster << self.header.cluster.bits()).collect();
        found.sort_unstable();
        found
    }

    /// Notes a table that nothing else may use.
    fn own(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.file_len);
        for cluster in self.header.cluster.index(offset)..self.header.cluster.count(end) {
            self.metadata.entry(cluster).or_insert(1);
        }
    }

    pub fn finish(self) -> Counted {
        self.counts.finish()
    }

    pub fn run(&mut self, snapshots: &Table) -> Result<()> {
        let header = self.header.clone();
        let cluster = header.cluster;
        self.check.total_clusters = cluster.count(header.size);
        self.own(0, cluster.bytes());
        self.count(0, cluster.bytes());
        self.l1("active", header.l1_offset, header.l1_size, true)?;
        self.own(header.snapshots_offset, snapshots.len);
        self.count(header.snapshots_offset, snapshots.len);
        for one in &snapshots.snapshots {
            let name = format!("snapshot {} ({})", one.id(), one.name());
            self.l1(&name, one.l1_offset, one.l1_size, false)?;
        }
        for table in std::mem::take(&mut self.l2) {
            self.metadata.entry(cluster.index(table.offset)).or_insert(table.times);
            self.l2(&table)?;
        }
        self.crypto_header(&header);
        self.bitmaps(&header)?;
        let table = u64::from(header.refcount_table_clusters) * cluster.bytes();
        self.own(header.refcount_table_offset, table);
        self.count(header.refcount_table_offset, table);
        let blocks = lock(&self.image.refcounts).blocks();
        for (index, offset) in blocks {
            self.refcount_block(index, offset)?;
        }
        Ok(())
    }

    fn refcount_block(&mut self, index: usize, offset: u64) -> Result<()> {
        let cluster = self.header.cluster;
        if !cluster.aligned(offset) {
            self.rebuild = true;
            self.check.corruption(format!(
                "refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ));
            return Ok(());
        }
        if cluster.index(offset) >= cluster.count(self.file_len) {
            return self.block_outside(index, offset);
        }
        self.own(offset, cluster.bytes());
        self.count(offset, cluster.bytes());
        let references = self.counts.get(cluster.index(offset));
        if references != 1 {
            self.rebuild = true;
            self.check.corruption(format!("refcount block {index} refcount={references}"));
        }
        Ok(())
    }

    /// A refcount block past the end of the file: an empty one, once the file is large enough.
    fn block_outside(&mut self, index: usize, offset: u64) -> Result<()> {
        let mends = self.repair == Repair::All;
        let verb = if mends { "Repairing" } else { "ERROR" };
        self.check.say(format!("{verb} refcount block {index} is outside image"));
        if !mends {
            self.check.corruptions += 1;
            return Ok(());
        }
        let cluster = self.header.cluster.bytes();
        let end = offset.checked_add(cluster).filter(|end| i64::try_from(*end).is_ok());
        let grown = match end {
            None => Err(os_text(EINVAL)),
            Some(end) if end > self.file_len.saturating_add(MAX_GROWTH) => Err(os_text(EFBIG)),
            Some(end) => self.image.storage.set_len(end).map(|()| end).map_err(|e| e.to_string()),
        };
        match grown {
            Ok(end) => {
                self.file_len = end;
                self.check.corruptions_fixed += 1;
                self.own(offset, cluster);
                self.count(offset, cluster);
            }
            Err(why) => {
                self.rebuild = true;
                self.check.corruptions += 1;
                self.check.say(format!("ERROR could not resize image: {why}"));
            }
        }
        Ok(())
    }

    /// Counts the clusters that `len` bytes at `offset` touch. A region past the end of the file
    /// is an error and is not counted: no count may take memory that no file backs.
    fn count(&mut self, offset: u64, len: u64) {
        self.count_times(offset, len, 1);
    }

    /// Counts a table that nothing else may use. Whether that holds.
    fn count_once(&mut self, what: &str, offset: u64, len: u64) -> bool {
        let cluster = self.header.cluster;
        let last = offset.saturating_add(len.saturating_sub(1)).min(self.file_len);
        let mut clusters = cluster.index(offset)..=cluster.index(last);
        let alone = clusters.all(|number| self.counts.get(number) == 0);
        if !alone {
            self.check.corruption(format!("offset={offset:#x}: {what} overlaps other metadata"));
        }
        self.own(offset, len);
        self.count(offset, len);
        alone
    }

    fn count_times(&mut self, offset: u64, len: u64, times: u32) {
        if len == 0 {
            return;
        }
        let cluster = self.header.cluster;
        // The last cluster may be there in part only.
        let limit = self.file_len.saturating_add(cluster.bytes());
        let end = offset.checked_add(len).filter(|end| *end < limit);
        let Some(end) = end else {
            self.check.corruptions += 1;
            self.check.say(format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size {len:#x}"
            ));
            return;
        };
        let (first, last) = (cluster.index(offset), cluster.index(end - 1));
        if self.counts.add_run(first, last - first + 1, times) <= self.max {
            return;
        }
        for number in first..=last {
            if self.counts.get(number) > self.max {
                self.counts.limit(number, self.max);
                self.check.corruptions += 1;
                let offset = number << cluster.bits();
                self.check.say(format!(
                    "ERROR: overflow cluster offset={offset:#x}\nUse qemu-img amend to increase the \
                     refcount entry width or qemu-img convert to create a clean copy if the image \
                     cannot be opened for writing"
                ));
            }
        }
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        // The file's last cluster may be there in part only: the rest is zero.
        let limit = self.header.cluster.ceil(self.file_len);
        if offset >= self.file_len || offset.checked_add(len).is_none_or(|end| end > limit) {
            return Err(Error::corrupt("a table lies past the end of the file").at_offset(offset));
        }
        let mut bytes = vec![0; len as usize];
        let stored = (self.file_len - offset).min(len) as usize;
        self.image.storage.read_exact_at(offset, &mut bytes[..stored])?;
        Ok(bytes)
    }

    /// Walks an L1 table and all below it; statistics count the active one only.
    fn l1(&mut self, name: &str, offset: u64, entries: u32, active: bool) -> Result<()> {
        let bytes = u64::from(entries) * 8;
        if bytes == 0 && active {
            return Ok(());
        }
        if bytes > MAX_L1 {
            self.check.corruption(format!(
                "{name} l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted"
            ));
            return Ok(());
        }
        if !self.header.cluster.aligned(offset) {
            self.check.corruption(format!(
                "{name} l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted"
            ));
            return Ok(());
        }
        if bytes == 0 || !self.count_once("L1 table", offset, bytes) {
            return Ok(());
        }
        let Ok(table) = self.read(offset, bytes) else {
            self.check.errors += 1;
            self.check.say(format!("ERROR the L1 table at {offset:#x} cannot be read"));
            return Ok(());
        };
        for (index, entry) in decode(&table).into_iter().enumerate() {
            if entry & L1_RESERVED != 0 {
                self.check.corruption(format!("found L1 entry with reserved bits set: {entry:x}"));
            }
            let l2 = entry & OFFSET;
            if l2 == 0 {
                if entry & COPIED != 0 {
                    self.check.corruption(format!("L1 entry {index} is a flag without a table"));
                }
                continue;
            }
            self.count(l2, self.header.cluster.bytes());
            if !self.header.cluster.aligned(l2) {
                self.check.corruption(format!(
                    "l2_offset={l2:#x}: Table is not cluster aligned; L1 entry {index} corrupted"
                ));
                continue;
            }
            self.note_l2(l2, active);
        }
        Ok(())
    }

    fn note_l2(&mut self, offset: u64, active: bool) {
        if offset >= self.file_len {
            return;
        }
        // Whole stretches of entries may name one table.
        let known = self.l2.get_mut(self.last_l2).filter(|table| table.offset == offset);
        if let Some(table) = known {
            table.times = table.times.saturating_add(1);
            return;
        }
        let next = self.l2.len();
        self.last_l2 = *self.l2_index.entry(offset).or_insert(next);
        match self.l2.get_mut(self.last_l2) {
            Some(table) => table.times = table.times.saturating_add(1),
            None => self.l2.push(L2 { offset, times: 1, active }),
        }
    }

    fn l2(&mut self, &L2 { offset, times, active }: &L2) -> Result<()> {
        let bytes = self.header.cluster.bytes();
        let data = self.image.storage.next_data(offset)?;
        if data.is_none_or(|(start, _)| start >= offset.saturating_add(bytes)) {
            return Ok(());
        }
        let Ok(mut table) = self.read(offset, bytes) else {
            self.check.errors += 1;
            self.check.say(format!("ERROR the L2 table at {offset:#x} cannot be read"));
            return Ok(());
        };
        let shape = Shape::of(&self.header);
        let mut mended = false;
        let (mut index, entries) = (0, (bytes / shape.entry_bytes()) as usize);
        while index < entries {
            let run = if shape.external { 1 } else { shape.run(&table, index) };
            let entry = shape.get(&table, index);
            let at = index;
            index += 1;
            if entry == Entry::default() {
                continue;
            }
            if run > 1 && self.sound_run(entry, run as u64, active, times) {
                index = at + run;
            } else if let Some(spare) = self.spare(shape, entry) {
                self.check.corruptions_fixed += 1;
                shape.put(&mut table, at, spare);
                mended = true;
            } else {
                if entry.is_compressed() && entry.bitmap != 0 {
                    self.check.corruption(format!(
                        "compressed cluster {index} with non-zero subcluster allocation bitmap, \
                         entry={:#x}",
                        entry.descriptor
                    ));
                }
                self.entry(shape, entry, active, times);
            }
        }
        if mended {
            self.image.metadata(|| self.image.storage.write_all_at(offset, &table))?;
            self.image.barrier()?;
            self.image.tables.write().forget(offset..offset + bytes);
        }
        Ok(())
    }

    /// Counts entries whose clusters follow each other from that of `entry` on; `false`, and nothing
    /// done, where not all of them are in the file.
    fn sound_run(&mut self, entry: Entry, clusters: u64, active: bool, times: u32) -> bool {
        let (host, len) = (entry.descriptor & OFFSET, clusters << self.header.cluster.bits());
        if host.saturating_add(len) > self.file_len {
            return false;
        }
        if active {
            self.check.allocated_clusters += clusters;
            self.fragment(host, len);
        }
        self.count_times(host, len, times);
        true
    }

    /// What becomes of an entry that keeps a cluster in an impossible place, where no data stands in
    /// it and it may be mended.
    fn spare(&mut self, shape: Shape, entry: Entry) -> Option<Entry> {
        let host = entry.host()?.0;
        let is_spare = shape.is_spare(entry);
        if shape.cluster.aligned(host) || !is_spare || self.repair != Repair::All {
            return None;
        }
        self.check.say(format!(
            "Repairing offset={host:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
        ));
        let empty = Entry { descriptor: 0, bitmap: entry.bitmap };
        Some(if shape.extended { empty } else { shape.with_zero(Entry::default(), 0, 0, false) })
    }

    fn entry(&mut self, shape: Shape, entry: Entry, active: bool, times: u32) {
        let cluster = self.header.cluster;
        if entry.is_compressed() {
            self.compressed(shape, entry, active, times);
            return;
        }
        let descriptor = entry.descriptor;
        if descriptor & L2_RESERVED != 0 {
            self.check.corruption(format!("found l2 entry with reserved bits set: {descriptor:x}"));
        }
        let host = descriptor & OFFSET;
        let kept = shape.host(entry);
        if entry.bitmap & entry.bitmap >> 32 & 0xffff_ffff != 0 {
            self.check
                .corruption(format!("offset={host:x}: a subcluster is both zero and allocated"));
        }
        if kept.is_none() {
            if entry.bitmap & 0xffff_ffff != 0 {
                self.check.corruption("subclusters are allocated without a cluster".to_owned());
            }
            return;
        }
        if !cluster.aligned(host) {
            self.check.corruption(format!(
                "offset={host:x}: Data cluster is not properly aligned; L2 entry corrupted."
            ));
            // What it touches is in use all the same: nothing else may be put there.
            self.count_times(host, cluster.bytes(), times);
            return;
        }
        if active {
            self.check.allocated_clusters += 1;
            self.fragment(host, cluster.bytes());
        }
        if !shape.external {
            self.count_times(host, cluster.bytes(), times);
        }
    }

    fn compressed(&mut self, shape: Shape, entry: Entry, active: bool, times: u32) {
        if entry.exclusive() {
            let at = entry.descriptor;
            self.check.corruption(format!(
                "l2_entry={at:x}: copied flag must never be set for compressed clusters"
            ));
        }
        if shape.external {
            let message = "compressed cluster entry found in image with external data file";
            self.check.corruption(message.to_owned());
            return;
        }
        let (host, len) = shape.compressed(entry.descriptor);
        if active {
            self.check.allocated_clusters += 1;
            self.check.compressed_clusters += 1;
            self.check.fragmented_clusters += 1;
        }
        // The last sector may reach past the end: its length is counted in sectors.
        let len = len.min(self.header.cluster.ceil(self.file_len).saturating_sub(host.0).max(1));
        self.count_times(host.0, len, times);
    }

    fn fragment(&mut self, host: u64, len: u64) {
        if self.next_data != 0 && self.next_data != host {
            self.check.fragmented_clusters += 1;
        }
        self.next_data = host + len;
    }

    fn crypto_header(&mut self, header: &Header) {
        if let Some((offset, len)) = crypt::area_place(header) {
            let len = header.cluster.ceil(len);
            self.own(offset, len);
            self.count(offset, len);
        }
    }

    /// Counts the bitmap directory, the bitmaps' tables and their clusters (qcow2, "Bitmaps").
    fn bitmaps(&mut self, header: &Header) -> Result<()> {
        let Some((offset, size)) = directory::recorded(header) else { return Ok(()) };
        self.own(offset, size);
        self.count(offset, size);
        if size > MAX_BITMAP_DIRECTORY {
            self.check.corruption(format!("the bitmap directory has {size} bytes"));
            return Ok(());
        }
        let Ok(bytes) = self.read(offset, size) else {
            self.check.errors += 1;
            self.check.say("ERROR the bitmap directory cannot be read".to_owned());
            return Ok(());
        };
        let mut at = 0;
        while let Some((entry, len)) = bytes.get(at..).and_then(directory::Fixed::read) {
            let entries = u64::from(entry.bitmap_table_size.get());
            self.bitmap(entry.bitmap_table_offset.get(), entries);
            at = at.saturating_add(len).next_multiple_of(8);
        }
        Ok(())
    }

    fn bitmap(&mut self, table: u64, entries: u64) {
        if entries * 8 > MAX_BITMAP_TABLE {
            self.check.corruption(format!("the bitmap table at {table:#x} has {entries} entries"));
            return;
        }
        if !self.count_once("bitmap table", table, entries * 8) {
            return;
        }
        let Ok(bytes) = self.read(table, entries * 8) else {
            self.check.errors += 1;
            self.check.say(format!("ERROR the bitmap table at {table:#x} cannot be read"));
            return;
        };
        for entry in decode(&bytes) {
            if entry & OFFSET != 0 {
                self.own(entry & OFFSET, self.header.cluster.bytes());
                self.count(entry & OFFSET, self.header.cluster.bytes());
            }
        }
    }
}

fn os_text(errno: i32) -> String {
    nix::errno::Errno::from_raw(errno).desc().to_owned()
}
