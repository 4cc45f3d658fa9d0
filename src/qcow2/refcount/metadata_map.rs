//! Where metadata stands: no guest byte is ever written there, whatever an L2 entry says.
//!
//! A damaged or hostile image can have an L2 entry that points into the header, a table or a
//! refcount block, or refcounts that call such a cluster free. Each place that writes guest bytes,
//! gives clusters out or lets them go asks here first, for each 64 clusters of a request: a filter, and
//! where that says that metadata may stand nearby, a hash table under a shared lock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::fast::RandomState;

use crate::addr::{HostOffset, Unit};
use crate::asymmetric::RwLock;
use crate::error::{Error, Result};

/// The host clusters that hold metadata, as bits.
pub(in crate::qcow2) struct MetadataMap {
    cluster: Unit,
    filter: Filter,
    words: RwLock<Words>,
}

/// 64 clusters by number / 64.
type Words = HashMap<u64, u64, RandomState>;

impl MetadataMap {
    /// A map of a file of such clusters, with nothing in it.
    pub fn new(cluster: Unit) -> MetadataMap {
        MetadataMap { cluster, filter: Filter::default(), words: RwLock::default() }
    }

    /// Adds the clusters that `len` bytes at `offset` touch.
    pub fn add(&self, offset: u64, len: u64) {
        self.add_to(&mut self.words.write(), offset, len);
    }

    /// Removes the clusters that `len` bytes at `offset` touch.
    pub fn remove(&self, offset: u64, len: u64) {
        let mut map = self.words.write();
        for (word, bits) in words(self.cluster, offset, len) {
            if let Some(entry) = map.get_mut(&word) {
                *entry &= !bits;
                if *entry == 0 {
                    map.remove(&word);
                }
            }
        }
    }

    /// Forgets what is in it, and adds `places`, offsets and lengths in bytes.
    ///
    /// # Errors
    /// The offset of the first place that overlaps one before it; those behind are not added.
    pub fn replace(
        &self,
        places: impl IntoIterator<Item = (u64, u64)>,
    ) -> std::result::Result<(), u64> {
        let mut map = self.words.write();
        map.clear();
        let overlaps = |(offset, len): &(u64, u64)| !self.add_to(&mut map, *offset, *len);
        places.into_iter().find(overlaps).map_or(Ok(()), |(offset, _)| Err(offset))
    }

    /// Adds clusters. Whether none of them was there before.
    fn add_to(&self, map: &mut Words, offset: u64, len: u64) -> bool {
        let mut alone = true;
        for (word, bits) in words(self.cluster, offset, len) {
            self.filter.add(word);
            let entry = map.entry(word).or_default();
            alone &= *entry & bits == 0;
            *entry |= bits;
        }
        alone
    }

    /// Whether metadata stands in any of the clusters that `len` bytes at `offset` touch.
    #[inline]
    pub fn holds(&self, offset: u64, len: u64) -> bool {
        let first = self.cluster.index(offset);
        // Most requests stay within one cluster, and far from all metadata.
        if (1..=self.cluster.bytes() - self.cluster.within(offset)).contains(&len) {
            return self.filter.may_hold(first / 64) && self.hit(first / 64, 1 << (first % 64));
        }
        words(self.cluster, offset, len)
            .any(|(word, bits)| self.filter.may_hold(word) && self.hit(word, bits))
    }

    fn hit(&self, word: u64, bits: u64) -> bool {
        self.words.read().get(&word).is_some_and(|w| w & bits != 0)
    }

    /// Fails where guest data at `offset` would stand on metadata.
    #[inline]
    pub fn check(&self, offset: HostOffset, len: u64) -> Result<()> {
        if self.holds(offset.0, len) { Err(on_metadata(offset)) } else { Ok(()) }
    }
}

#[cold]
fn on_metadata(offset: HostOffset) -> Error {
    let message = "a guest cluster lies on the image's own metadata: run check";
    Error::corrupt(message).at_offset(offset.0)
}

/// The words that may have an entry: a bit for those that are alike modulo 2^14 (64 GiB of a file of 64 KiB
/// clusters), set before the first of them has one and never taken back. Read without any lock.
struct Filter(Box<[AtomicU64; 256]>);

impl Filter {
    #[inline]
    fn place(&self, word: u64) -> (&AtomicU64, u64) {
        (&self.0[(word / 64 % 256) as usize], 1 << (word % 64))
    }

    fn add(&self, word: u64) {
        let (bits, bit) = self.place(word);
        bits.fetch_or(bit, Ordering::Release);
    }

    #[inline]
    fn may_hold(&self, word: u64) -> bool {
        let (bits, bit) = self.place(word);
        bits.load(Ordering::Acquire) & bit != 0
    }
}

impl Default for Filter {
    fn default() -> Filter {
        Filter(Box::new([const { AtomicU64::new(0) }; 256]))
    }
}

/// The clusters that `len` bytes at `offset` touch, as words and their bits.
fn words(cluster: Unit, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let first = cluster.index(offset);
    let end = if len == 0 { first } else { cluster.index(offset.saturating_add(len - 1)) + 1 };
    (first / 64..end.div_ceil(64)).map(move |word| {
        let from = first.max(word * 64) - word * 64;
        let to = end.min(word * 64 + 64) - word * 64;
        (word, (u64::MAX << from) & (u64::MAX >> (64 - to)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_across_words_come_and_go() {
        let map = MetadataMap::new(Unit::from_bits(9));
        map.add(60 * 512, 10 * 512);
        for (at, free) in [(59, true), (60, false), (64, false), (69, false), (70, true)] {
            assert_eq!(map.check(HostOffset(at * 512), 512).is_ok(), free, "{at}");
        }
        map.remove(63 * 512, 3 * 512);
        assert!(map.check(HostOffset(63 * 512), 3 * 512).is_ok());
        assert!(map.check(HostOffset(0), 100 * 512).is_err());
        assert!(map.check(HostOffset(60 * 512), 0).is_ok());
    }

    #[test]
    fn words_that_share_a_bit_of_the_filter_are_told_apart() {
        let map = MetadataMap::new(Unit::from_bits(9));
        let alike = (64 * 512) << 14;
        for turn in 0..4 {
            assert!(!map.holds(turn * alike, 512));
            map.add(turn * alike, 512);
            assert!(map.holds(turn * alike, 512) && !map.holds(turn * alike + 512, 512));
        }
        map.remove(alike, 512);
        assert!(!map.holds(alike, 512) && map.holds(2 * alike, 512));
    }

    #[test]
    fn a_new_survey_takes_the_place_of_the_old_and_finds_what_overlaps() {
        let map = MetadataMap::new(Unit::from_bits(9));
        map.add(0, 512);
        assert_eq!(map.replace([(512, 512), (1024, 1)]), Ok(()));
        assert!(!map.holds(0, 512) && map.holds(512, 1024));
        assert_eq!(map.replace([(512, 1024), (1535, 1), (4096, 1)]), Err(1535));
    }
}
