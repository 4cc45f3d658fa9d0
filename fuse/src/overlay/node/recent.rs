//! Open directories that are kept for the next use, and closed when there are too many: a process
//! has fewer descriptors than an overlay has directories. Knows no overlay.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Something that can be opened again after it was closed.
pub(crate) struct Kept<T: ?Sized> {
    open: Mutex<Option<Arc<T>>>,
    used: AtomicBool,
    pinned: AtomicBool,
}

/// A [`Kept`] of any kind.
trait Closes: Send + Sync {
    /// Closes it unless it was used since the last call.
    fn close_unused(&self) -> bool;
}

impl<T: ?Sized + Send + Sync + 'static> Closes for Kept<T> {
    fn close_unused(&self) -> bool {
        if self.used.swap(false, Ordering::Relaxed) {
            return false;
        }
        let mut open = self.lock();
        if !self.pinned.load(Ordering::Relaxed) {
            *open = None;
        }
        true
    }
}

impl<T: ?Sized + Send + Sync + 'static> Kept<T> {
    pub(crate) fn new(open: Option<Arc<T>>) -> Arc<Kept<T>> {
        let pinned = AtomicBool::new(open.is_some());
        Arc::new(Kept { open: Mutex::new(open), used: AtomicBool::new(false), pinned })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<T>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is open, or what `open` makes.
    pub(crate) fn get(
        self: &Arc<Self>,
        recent: &Recent,
        open: impl FnOnce() -> io::Result<Arc<T>>,
    ) -> io::Result<Arc<T>> {
        if let Some(open) = self.lock().as_ref() {
            self.used.store(true, Ordering::Relaxed);
            return Ok(open.clone());
        }
        // Not under the lock: to open it may take others of its kind.
        let fresh = open()?;
        let kept = self.lock().get_or_insert(fresh).clone();
        recent.enter(self);
        Ok(kept)
    }

    /// Puts in what is open, for good: it is never closed to make room.
    pub(crate) fn pin(&self, open: Arc<T>) {
        let mut place = self.lock();
        self.pinned.store(true, Ordering::Relaxed);
        *place = Some(open);
    }
}

/// The open ones, oldest first.
pub(crate) struct Recent {
    queue: Mutex<VecDeque<Weak<dyn Closes>>>,
    most: usize,
}

impl Recent {
    /// Keeps at most `most` open.
    pub(crate) fn new(most: usize) -> Recent {
        Recent { queue: Mutex::default(), most }
    }

    fn enter<T: ?Sized + Send + Sync + 'static>(&self, kept: &Arc<Kept<T>>) {
        let kept: Arc<dyn Closes> = kept.clone();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back(Arc::downgrade(&kept));
        while queue.len() > self.most {
            let Some(oldest) = queue.pop_front() else { break };
            if oldest.upgrade().is_some_and(|oldest| !oldest.close_unused()) {
                queue.push_back(oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_is_closed_and_opened_again() {
        let recent = Recent::new(2);
        let kept: Vec<_> = (0..4).map(|_| Kept::<u32>::new(None)).collect();
        for (i, kept) in kept.iter().enumerate() {
            assert_eq!(*kept.get(&recent, || Ok(Arc::new(i as u32))).unwrap(), i as u32);
        }
        assert_eq!(kept.iter().filter(|kept| kept.lock().is_some()).count(), 2);
        assert_eq!(*kept[0].get(&recent, || Ok(Arc::new(9))).unwrap(), 9);
        kept[3].pin(Arc::new(7));
        assert_eq!(*kept[3].get(&recent, || Ok(Arc::new(9))).unwrap(), 7);
    }
}
