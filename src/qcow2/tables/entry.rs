//! L1 and L2 entries: what their bits mean.
//!
//! Specification: qcow2, "Cluster mapping", "Extended L2 Entries".

use crate::addr::{HostOffset, Unit};
use crate::error::{Error, Result};
use crate::image::Mapping;
use crate::qcow2::header::Header;
use crate::qcow2::tables::words::{words, words_mut};

/// The cluster's refcount is exactly one: it may be written where it stands.
pub(in crate::qcow2) const COPIED: u64 = 1 << 63;
/// The descriptor is of compressed bytes.
pub(in crate::qcow2) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (standard entries of version 3).
const ZERO: u64 = 1;
/// Host cluster offset in L1 entries, L2 entries.
pub(in crate::qcow2) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of a cluster with an extended entry.
const SUBCLUSTERS: u64 = 32;

/// An L2 entry; `bitmap` is 0 where entries are not extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::qcow2) struct Entry {
    pub descriptor: u64,
    pub bitmap: u64,
}

/// How one cluster, or one subcluster, is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum Kind {
    Unallocated,
    Zero,
    Data,
    Compressed,
}

impl Entry {
    pub fn is_compressed(self) -> bool {
        self.descriptor & COMPRESSED != 0
    }

    /// The cluster of the image's own file that the entry keeps, whether or not its bytes count.
    pub fn host(self) -> Option<HostOffset> {
        let offset = self.descriptor & OFFSET;
        (!self.is_compressed() && offset != 0).then_some(HostOffset(offset))
    }

    pub fn exclusive(self) -> bool {
        self.descriptor & COPIED != 0
    }
}

/// The shape of L2 tables in one image.
#[derive(Debug, Clone, Copy)]
pub(in crate::qcow2) struct Shape {
    pub version: u32,
    pub cluster: Unit,
    pub extended: bool,
    /// Data clusters stand in an external data file, each at its guest offset.
    pub external: bool,
}

impl Shape {
    pub fn of(header: &Header) -> Shape {
        Shape {
            version: header.version,
            cluster: header.cluster,
            extended: header.extended_l2(),
            external: header.has_data_file(),
        }
    }

    /// The host cluster that the entry keeps, whether or not its bytes count. The first cluster of a
    /// data file is one; in the image's own file, that is the header.
    pub fn host(self, entry: Entry) -> Option<HostOffset> {
        let first = self.external && entry.descriptor & (COPIED | COMPRESSED | OFFSET) == COPIED;
        if first { Some(HostOffset(0)) } else { entry.host() }
    }

    /// The unit that one L2 entry, or one bit of its bitmap, speaks for.
    pub fn granularity(self) -> Unit {
        if self.extended { Unit::from_bits(self.cluster.bits() - 5) } else { self.cluster }
    }

    pub fn entry_bytes(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entry number `index` of the table bytes; `index` lies within.
    #[inline]
    pub fn get(self, table: &[u8], index: usize) -> Entry {
        let words = words(table);
        if self.extended {
            return Entry {
                descriptor: words[2 * index].get(),
                bitmap: words[2 * index + 1].get(),
            };
        }
        Entry { descriptor: words[index].get(), bitmap: 0 }
    }

    /// How many entries from `index` on, at least 1, keep clusters that follow each other on the host
    /// and are alike in all else. More than 1 only where nothing is wrong with any of them by itself.
    pub fn run(self, table: &[u8], index: usize) -> usize {
        let first = self.get(table, index);
        let both = first.bitmap & first.bitmap >> SUBCLUSTERS & u64::from(u32::MAX);
        let sound = |descriptor: u64| descriptor & !(OFFSET | COPIED | ZERO) == 0;
        let host = first.descriptor & OFFSET;
        if both != 0 || !sound(first.descriptor) || host == 0 || !self.cluster.aligned(host) {
            return 1;
        }
        let (size, step) = (self.entry_bytes() as usize, self.cluster.bytes());
        let behind = words(table.get((index + 1) * size..).unwrap_or_default());
        let mut next = first.descriptor;
        let follows = behind.chunks_exact(size / 8).take_while(|entry| {
            next = next.wrapping_add(step);
            entry[0].get() == next
                && sound(next)
                && (!self.extended || entry[1].get() == first.bitmap)
        });
        1 + follows.count()
    }

    pub fn put(self, table: &mut [u8], index: usize, entry: Entry) {
        let words = words_mut(table);
        if self.extended {
            words[2 * index].set(entry.descriptor);
            words[2 * index + 1].set(entry.bitmap);
        } else {
            words[index].set(entry.descriptor);
        }
    }

    /// The cluster of an entry that names one in the image's own file and says nothing else, as nearly
    /// every entry of a disk in use does: told by one look. `None` of any other.
    #[inline]
    pub fn plain(self, entry: Entry) -> Option<HostOffset> {
        let host = entry.descriptor & !COPIED;
        let plain = !self.extended && !self.external && host & !OFFSET == 0;
        (plain && host != 0 && self.cluster.aligned(host)).then_some(HostOffset(host))
    }

    /// What the entry says about the guest's byte at `at`.
    pub fn mapping(self, entry: Entry, at: u64) -> Result<Mapping> {
        let within = self.cluster.within(at);
        Ok(match self.kind(entry, within)? {
            Kind::Unallocated => Mapping::Unallocated,
            Kind::Zero => Mapping::Zero { host: self.host(entry).map(|h| h + within) },
            Kind::Compressed => Mapping::Compressed { descriptor: entry.descriptor },
            Kind::Data if self.external && entry.descriptor & OFFSET != at - within => {
                return Err(Error::corrupt(format!(
                    "External data file host cluster offset {:#x} does not match guest cluster \
                     offset: {:#x}",
                    entry.descriptor & OFFSET,
                    at - within
                )));
            }
            Kind::Data => Mapping::Data {
                host: HostOffset((entry.descriptor & OFFSET) + within),
                exclusive: entry.exclusive(),
            },
        })
    }

    /// How the part of the cluster at `within` bytes is mapped.
    #[inline]
    pub fn kind(self, entry: Entry, within: u64) -> Result<Kind> {
        if entry.is_compressed() && self.external {
            let message = "Compressed cluster entry found in image with external data file";
            return Err(Error::corrupt(message));
        }
        if entry.is_compressed() {
            return Ok(Kind::Compressed);
        }
        let host = entry.descriptor & OFFSET;
        if !self.cluster.aligned(host) {
            return Err(
                Error::corrupt("an L2 entry points at an unaligned cluster").at_offset(host)
            );
        }
        if self.extended {
            return self.subcluster_kind(entry, self.granularity().index(within));
        }
        if entry.descriptor & ZERO != 0 {
            if self.version < 3 {
                let message = "a version 2 image has an L2 entry with the zero flag";
                return Err(Error::corrupt(message).at_offset(host));
            }
            return Ok(Kind::Zero);
        }
        Ok(if self.host(entry).is_none() { Kind::Unallocated } else { Kind::Data })
    }

    fn subcluster_kind(self, entry: Entry, sub: u64) -> Result<Kind> {
        let allocated = entry.bitmap >> sub & 1 != 0;
        let zero = entry.bitmap >> (sub + SUBCLUSTERS) & 1 != 0;
        match (allocated, zero) {
            (true, true) => {
                Err(Error::corrupt("an L2 entry says both zero and allocated of one subcluster"))
            }
            (true, false) if self.host(entry).is_none() => {
                Err(Error::corrupt("an L2 entry has allocated subclusters but no cluster"))
            }
            (true, false) => Ok(Kind::Data),
            (false, true) => Ok(Kind::Zero),
            (false, false) => Ok(Kind::Unallocated),
        }
    }

    /// The bits of a bitmap half for the bytes `from..to` of a cluster, on subcluster boundaries.
    fn bits(self, from: u64, to: u64) -> u64 {
        let (first, last) = (self.granularity().index(from), self.granularity().count(to));
        let below = |n: u64| if n >= SUBCLUSTERS { u64::from(u32::MAX) } else { (1 << n) - 1 };
        below(last) & !below(first)
    }

    /// The entry with the bytes `from..to` of the cluster as data in `host`.
    pub fn with_data(self, old: Entry, host: HostOffset, from: u64, to: u64) -> Entry {
        let descriptor = host.0 | COPIED;
        if !self.extended {
            return Entry { descriptor, bitmap: 0 };
        }
        let kept = if old.is_compressed() { 0 } else { old.bitmap };
        let bits = self.bits(from, to);
        Entry { descriptor, bitmap: kept & !(bits << SUBCLUSTERS) | bits }
    }

    /// The entry with the bytes `from..to` of the cluster reading as zeroes, keeping its host
    /// cluster where `keep`. Compressed entries are only zeroed whole.
    pub fn with_zero(self, old: Entry, from: u64, to: u64, keep: bool) -> Entry {
        let kept =
            if keep && !old.is_compressed() { old.descriptor & (OFFSET | COPIED) } else { 0 };
        if !self.extended {
            return Entry { descriptor: kept | ZERO, bitmap: 0 };
        }
        let bits = self.bits(from, to);
        let before = if old.is_compressed() { 0 } else { old.bitmap };
        Entry { descriptor: kept, bitmap: before & !bits | bits << SUBCLUSTERS }
    }

    /// Whether the entry keeps a host cluster of which nothing is read.
    pub fn is_spare(self, entry: Entry) -> bool {
        let read = if self.extended {
            entry.bitmap & u64::from(u32::MAX) != 0
        } else {
            entry.descriptor & ZERO == 0
        };
        entry.host().is_some() && !read
    }

    /// Whether no part of the cluster is stored in `entry`'s host cluster.
    pub fn holds_no_data(self, entry: Entry) -> bool {
        self.extended && !entry.is_compressed() && entry.bitmap & u64::from(u32::MAX) == 0
    }

    /// The entry with the bytes `from..to` showing the layer below, keeping the host cluster.
    /// Extended entries only.
    pub fn without(self, old: Entry, from: u64, to: u64) -> Entry {
        let bits = self.bits(from, to);
        Entry { descriptor: old.descriptor, bitmap: old.bitmap & !bits & !(bits << SUBCLUSTERS) }
    }

    /// The entry for `len` compressed bytes, not 0 and fewer than a cluster, at `host`; `None` where
    /// the descriptor has no room for the offset.
    pub fn with_compressed(self, host: HostOffset, len: u64) -> Option<Entry> {
        let offset_bits = 62 - (self.cluster.bits() - 8);
        let last = host.0.checked_add(len)?.checked_sub(1)?;
        let sectors = last / 512 - host.0 / 512;
        let descriptor = COMPRESSED | sectors << offset_bits | host.0;
        (last >> offset_bits == 0).then_some(Entry { descriptor, bitmap: 0 })
    }

    /// Where the compressed bytes of a descriptor stand, and how many there may be.
    pub fn compressed(self, descriptor: u64) -> (HostOffset, u64) {
        let offset_bits = 62 - (self.cluster.bits() - 8);
        let offset = descriptor & ((1 << offset_bits) - 1);
        let sectors = (descriptor & !(COPIED | COMPRESSED)) >> offset_bits;
        (HostOffset(offset), (sectors + 1) * 512 - offset % 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Shape =
        Shape { version: 3, cluster: Unit::from_bits(16), extended: false, external: false };
    const EXTENDED: Shape = Shape { extended: true, ..PLAIN };

    #[test]
    fn subclusters_turn_from_zero_to_data_and_back() {
        let entry = EXTENDED.with_zero(Entry::default(), 0, 65536, false);
        assert_eq!(entry.bitmap, 0xffff_ffff_0000_0000);
        let entry = EXTENDED.with_data(entry, HostOffset(65536), 2048, 6144);
        assert_eq!(entry.bitmap, 0xffff_fff9_0000_0006);
        assert_eq!(EXTENDED.kind(entry, 2048).unwrap(), Kind::Data);
        assert_eq!(EXTENDED.kind(entry, 6144).unwrap(), Kind::Zero);
        let entry = EXTENDED.with_zero(entry, 2048, 4096, true);
        assert_eq!((entry.bitmap, entry.host()), (0xffff_fffb_0000_0004, Some(HostOffset(65536))));
    }

    #[test]
    fn a_run_ends_where_an_entry_is_unlike_those_before_it() {
        let mut table = [0; 64];
        let data = |number: u64| Entry { descriptor: number << 16 | COPIED, bitmap: 0 };
        for index in 0..8 {
            PLAIN.put(&mut table, index, data(index as u64 + 1));
        }
        assert_eq!((PLAIN.run(&table, 0), PLAIN.run(&table, 5)), (8, 3));
        PLAIN.put(&mut table, 3, Entry { descriptor: 4 << 16, bitmap: 0 });
        assert_eq!((PLAIN.run(&table, 0), PLAIN.run(&table, 3)), (3, 1));
        PLAIN.put(&mut table, 0, Entry { descriptor: 1 << 16 | COPIED | 2, bitmap: 0 });
        PLAIN.put(&mut table, 1, Entry { descriptor: 2 << 16 | COPIED | 2, bitmap: 0 });
        assert_eq!(PLAIN.run(&table, 0), 1, "each of them is to be looked at");
    }

    #[test]
    fn the_first_cluster_of_a_data_file_is_data() {
        let external = Shape { external: true, ..PLAIN };
        let entry = Entry { descriptor: COPIED, bitmap: 0 };
        assert_eq!(external.kind(entry, 0).unwrap(), Kind::Data);
        assert_eq!(PLAIN.kind(entry, 0).unwrap(), Kind::Unallocated);
        assert_eq!(external.kind(Entry::default(), 0).unwrap(), Kind::Unallocated);
        assert!(external.kind(Entry { descriptor: COMPRESSED | 512, bitmap: 0 }, 0).is_err());
    }

    #[test]
    fn a_compressed_descriptor_tells_offset_and_length() {
        let shape = PLAIN;
        let descriptor = COMPRESSED | 3 << 54 | 0x5_0123;
        assert_eq!(shape.compressed(descriptor), (HostOffset(0x5_0123), 4 * 512 - 0x123));
        let entry = shape.with_compressed(HostOffset(0x5_0123), 3 * 512).unwrap();
        assert_eq!(entry, Entry { descriptor, bitmap: 0 });
        assert_eq!(shape.with_compressed(HostOffset(1 << 54), 1), None);
    }
}
