//! Where metadata stands: no guest byte is ever written there, whatever an L2 entry says.
//!
//! A damaged or hostile image can have an L2 entry that points into the header, a table or a
//! refcount block, or refcounts that call such a cluster free. Each place that writes guest bytes,
//! gives clusters out or lets them go asks here first: one shared lock and one look into a hash
//! table for each 64 clusters of a request.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::addr::{HostOffset, Unit};
use crate::error::{Error, Result};

/// The host clusters that hold metadata, as bits.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct MetadataMap {
    /// 64 clusters by number / 64.
    words: HashMap<u64, u64, RandomState>,
}

impl MetadataMap {
    /// Adds the clusters that `len` bytes at `offset` touch. Whether none of them was there before.
    pub fn add(&mut self, cluster: Unit, offset: u64, len: u64) -> bool {
        let mut alone = true;
        for (word, bits) in words(cluster, offset, len) {
            let entry = self.words.entry(word).or_default();
            alone &= *entry & bits == 0;
            *entry |= bits;
        }
        alone
    }

    /// Removes the clusters that `len` bytes at `offset` touch.
    pub fn remove(&mut self, cluster: Unit, offset: u64, len: u64) {
        for (word, bits) in words(cluster, offset, len) {
            if let Some(entry) = self.words.get_mut(&word) {
                *entry &= !bits;
                if *entry == 0 {
                    self.words.remove(&word);
                }
            }
        }
    }

    /// Whether metadata stands in any of the clusters that `len` bytes at `offset` touch.
    pub fn holds(&self, cluster: Unit, offset: u64, len: u64) -> bool {
        let hit = |(word, bits): (u64, u64)| self.words.get(&word).is_some_and(|w| w & bits != 0);
        let first = cluster.index(offset);
        // Most requests stay within one cluster.
        if (1..=cluster.bytes() - cluster.within(offset)).contains(&len) {
            return hit((first / 64, 1 << (first % 64)));
        }
        words(cluster, offset, len).any(hit)
    }

    /// Fails where guest data at `offset` would stand on metadata.
    pub fn check(&self, cluster: Unit, offset: HostOffset, len: u64) -> Result<()> {
        if self.holds(cluster, offset.0, len) {
            let message = "a guest cluster lies on the image's own metadata: run check";
            return Err(Error::corrupt(message).at_offset(offset.0));
        }
        Ok(())
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
        let (mut metadata_map, unit) = (MetadataMap::default(), Unit::from_bits(9));
        assert!(metadata_map.add(unit, 60 * 512, 10 * 512));
        assert!(!metadata_map.add(unit, 69 * 512 + 1, 1));
        for (at, free) in [(59, true), (60, false), (64, false), (69, false), (70, true)] {
            assert_eq!(metadata_map.check(unit, HostOffset(at * 512), 512).is_ok(), free, "{at}");
        }
        metadata_map.remove(unit, 63 * 512, 3 * 512);
        assert!(metadata_map.check(unit, HostOffset(63 * 512), 3 * 512).is_ok());
        assert!(metadata_map.check(unit, HostOffset(0), 100 * 512).is_err());
        assert!(metadata_map.check(unit, HostOffset(60 * 512), 0).is_ok());
    }
}
