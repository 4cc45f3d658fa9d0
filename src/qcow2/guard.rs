//! Taking the locks of an open image, also after a thread that panicked under one.

use std::sync::{Mutex, MutexGuard};

// A thread that panicked under a lock has left whole values behind: every change under these locks
// is one assignment or one entry.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
