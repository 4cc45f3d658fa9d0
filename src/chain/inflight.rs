//! Who is changing the mapping of which guest clusters right now.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

/// The ranges being changed. Two that overlap wait for each other; others do not meet.
#[derive(Default)]
pub(crate) struct InFlight {
    ranges: Mutex<Vec<Range<u64>>>,
    changed: Condvar,
}

/// The right to change the mapping of a range, given back when dropped.
pub(crate) struct Entry<'a> {
    owner: &'a InFlight,
    range: Range<u64>,
}

impl InFlight {
    /// Waits until nobody else changes any of `range`, and takes it. A thread holds one entry at a
    /// time, so waiting always ends.
    pub fn enter(&self, range: Range<u64>) -> Entry<'_> {
        let mut ranges = self.lock();
        while ranges.iter().any(|r| r.start < range.end && range.start < r.end) {
            ranges = self.changed.wait(ranges).unwrap_or_else(|e| e.into_inner());
        }
        ranges.push(range.clone());
        Entry { owner: self, range }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.ranges.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut ranges = self.owner.lock();
        if let Some(at) = ranges.iter().position(|r| *r == self.range) {
            ranges.swap_remove(at);
        }
        drop(ranges);
        self.owner.changed.notify_all();
    }
}
