//! Slices of metadata tables in memory: bounded, second chance, dirty slices are never evicted.
//!
//! The cache does no I/O. Its owner loads slices, and writes dirty ones in the order that the
//! format needs.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use foldhash::fast::RandomState;

/// The largest slice in bytes; a table smaller than this is one slice.
pub(in crate::qcow2) const SLICE: u64 = 4096;

/// A dirty slice's bytes as they were when they were taken to be written.
pub(in crate::qcow2) struct Dirty {
    pub offset: u64,
    pub bytes: Box<[u8]>,
}

/// Slices by their host offset.
pub(in crate::qcow2) struct Cache {
    slots: Vec<Slot>,
    /// Looked into for every request: its keys are hashed in a few cycles, seeded all the same, since
    /// they come from the image.
    index: HashMap<u64, usize, RandomState>,
    hand: usize,
    capacity: usize,
    dirty: usize,
    generation: u64,
}

struct Slot {
    offset: u64,
    bytes: Box<[u8]>,
    used: AtomicBool,
    dirty: bool,
    /// It was changed since it was read from the file: what others read before is out of date.
    changed: bool,
    /// Its bytes are on their way to the file: until they are there, the file is behind.
    writing: bool,
}

impl Cache {
    /// A cache of at most `capacity` clean slices; dirty ones may make it exceed that.
    pub fn new(capacity: usize) -> Cache {
        Cache {
            slots: Vec::new(),
            index: HashMap::default(),
            hand: 0,
            capacity: capacity.max(4),
            dirty: 0,
            generation: 0,
        }
    }

    /// How many clean slices it keeps.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Changes whenever a slice leaves that is not what it was when it came, or whose table is gone:
    /// bytes read from the file before that may be out of date.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    #[inline]
    pub fn get(&self, offset: u64) -> Option<&[u8]> {
        self.slot(offset).map(|slot| self.bytes(slot))
    }

    /// The number of a slice's slot, good as long as the cache does not change.
    #[inline]
    pub fn slot(&self, offset: u64) -> Option<usize> {
        self.index.get(&offset).copied()
    }

    /// The slice in a slot that [`slot`](Cache::slot) returned.
    #[inline]
    pub fn bytes(&self, slot: usize) -> &[u8] {
        let slot = &self.slots[slot];
        // Readers share the cache: write the mark only where it changes, not to bounce the line.
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        &slot.bytes
    }

    /// The slice in a slot, to be changed: it is dirty from now on.
    pub fn bytes_mut(&mut self, slot: usize) -> &mut [u8] {
        let slot = &mut self.slots[slot];
        self.dirty += usize::from(!slot.dirty);
        slot.dirty = true;
        slot.changed = true;
        *slot.used.get_mut() = true;
        &mut slot.bytes
    }

    /// The slice to be changed: it is dirty from now on.
    pub fn get_mut(&mut self, offset: u64) -> Option<&mut [u8]> {
        let slot = self.slot(offset)?;
        Some(self.bytes_mut(slot))
    }

    /// Adds a clean slice, unless it is there already.
    pub fn insert(&mut self, offset: u64, bytes: Box<[u8]>) {
        if self.index.contains_key(&offset) {
            return;
        }
        if self.slots.len() >= self.capacity {
            self.evict();
        }
        self.index.insert(offset, self.slots.len());
        let used = AtomicBool::new(true);
        let (dirty, changed, writing) = (false, false, false);
        self.slots.push(Slot { offset, bytes, used, dirty, changed, writing });
    }

    /// Whether so much is dirty that it should be written.
    pub fn crowded(&self) -> bool {
        self.dirty * 2 > self.capacity
    }

    /// Forgets the slices in `range`, dirty or not: their table is gone.
    pub fn forget(&mut self, range: Range<u64>) {
        self.generation += 1;
        let gone: Vec<u64> = self.index.keys().copied().filter(|o| range.contains(o)).collect();
        for offset in gone {
            if let Some(at) = self.index.get(&offset) {
                self.remove(*at);
            }
        }
    }

    /// Copies of all dirty slices in the order of the file; they are clean from now on, but stay
    /// until [`written`](Cache::written).
    pub fn take_dirty(&mut self) -> Vec<Dirty> {
        if self.dirty == 0 {
            return Vec::new();
        }
        let mut taken = Vec::with_capacity(self.dirty);
        for slot in self.slots.iter_mut().filter(|s| s.dirty) {
            (slot.dirty, slot.writing) = (false, true);
            taken.push(Dirty { offset: slot.offset, bytes: slot.bytes.clone() });
        }
        self.dirty = 0;
        taken.sort_unstable_by_key(|d| d.offset);
        taken
    }

    /// The bytes that were taken are in the file.
    pub fn written(&mut self, slices: &[Dirty]) {
        for slice in slices {
            if let Some(at) = self.index.get(&slice.offset) {
                self.slots[*at].writing = false;
            }
        }
    }

    fn evict(&mut self) {
        // Two turns of the hand: the first may only take second chances away.
        for _ in 0..self.slots.len() * 2 {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[self.hand];
            if !slot.dirty && !slot.writing && !std::mem::take(slot.used.get_mut()) {
                self.remove(self.hand);
                return;
            }
        }
    }

    fn remove(&mut self, at: usize) {
        let slot = self.slots.swap_remove(at);
        self.index.remove(&slot.offset);
        self.dirty -= usize::from(slot.dirty);
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.offset, at);
        }
        self.generation += u64::from(slot.changed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_slices_stay_until_they_are_written() {
        let mut cache = Cache::new(4);
        for offset in 0..4 {
            cache.insert(offset, Box::new([0]));
            cache.get_mut(offset).unwrap()[0] = offset as u8;
        }
        cache.insert(9, Box::new([9]));
        assert!((0..4).all(|o| cache.get(o) == Some(&[o as u8])));
        let taken = cache.take_dirty();
        assert_eq!(taken.len(), 4);
        cache.insert(10, Box::new([10]));
        assert!((0..4).all(|o| cache.get(o).is_some()), "still on their way to the file");
        cache.written(&taken);
        (20..24).for_each(|o| cache.insert(o, Box::new([0])));
        assert!((0..4).any(|o| cache.get(o).is_none()));
    }

    #[test]
    fn a_forgotten_table_leaves_no_slice() {
        let mut cache = Cache::new(4);
        cache.insert(4096, Box::new([1]));
        cache.get_mut(4096).unwrap()[0] = 2;
        cache.forget(0..8192);
        assert!(cache.get(4096).is_none() && cache.take_dirty().is_empty());
    }
}
