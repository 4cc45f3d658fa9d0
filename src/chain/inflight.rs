//! Who is changing the mapping of which guest clusters right now.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

/// The ranges being changed. Two that overlap wait for each other; others do not meet.
#[derive(Default)]
pub(crate) struct InFlight {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ranges: Vec<Range<u64>>,
    /// Threads that wait for a range: to wake nobody is a system call, too.
    waiting: usize,
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
        let mut state = self.lock();
        while state.ranges.iter().any(|r| r.start < range.end && range.start < r.end) {
            state.waiting += 1;
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
            state.waiting -= 1;
        }
        state.ranges.push(range.clone());
        Entry { owner: self, range }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut state = self.owner.lock();
        if let Some(at) = state.ranges.iter().position(|r| *r == self.range) {
            state.ranges.swap_remove(at);
        }
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.owner.changed.notify_all();
        }
    }
}
