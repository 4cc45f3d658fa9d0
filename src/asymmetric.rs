//! A reader-writer lock for what every request reads and hardly anything changes.
//!
//! The atomic operations of an ordinary lock, sharded or not, are much of what the engine adds to a
//! request that the page cache serves: the one behind a read waits until all that was copied has left the
//! processor. Here a reader marks a place that only its own thread writes, by plain stores, and a writer
//! pays: it has every thread of the process pass a memory barrier (membarrier(2), private expedited), and
//! looks at all places then. A mark that was made before that barrier is seen by the writer; a thread that
//! makes one after it sees the writer, takes it back, and waits at an ordinary lock.
//!
//! A writer ends this, so that many of them pay no more than they would elsewhere: readers take the ordinary
//! lock, until one thread has done so often enough with no writer seen that marks are worth their price again.
//! (The two are known as asymmetric locks and, with the switch, as biased ones: Dice and Kogan, BRAVO, 2019.)

use std::cell::UnsafeCell;
use std::hint;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, compiler_fence};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};
use rustix::thread::{MembarrierCommand, membarrier};

/// Threads of this process that have places at a time; more of them use the ordinary lock.
const PLACES: usize = 64;
/// Times that a thread takes the ordinary lock before it lets all mark their places: a barrier and a look at
/// all places cost as much as some hundred of them.
const WORTH: u32 = 1000;
/// Looks at a mark that stays before the processor is given up, and before the writer sleeps.
const SPINS: u32 = 64;
const YIELDS: u32 = 128;
/// Between two looks then.
const NAP: Duration = Duration::from_micros(50);
/// What a store may take until other processors see it, more than generously.
const VISIBLE: Duration = Duration::from_millis(20);

/// A reader-writer lock whose readers write no memory that others write. See the [module](self).
///
/// A thread takes it once at a time: a second time may wait for a writer that waits for the first.
pub(crate) struct RwLock<T> {
    /// By the threads' places; made when they are first of use.
    marks: OnceLock<Box<[CachePadded<Mark>]>>,
    /// Whether readers mark their places. Set with the ordinary lock held for reading, and taken back with
    /// that held for writing.
    marking: AtomicBool,
    ordinary: ShardedLock<()>,
    value: UnsafeCell<T>,
}

/// What a thread, and no other, says at its place.
#[derive(Debug, Default)]
struct Mark {
    /// How often it has the lock.
    readers: AtomicU32,
    /// How often it took the ordinary lock since it last marked.
    ordinary: AtomicU32,
}

// SAFETY: it hands out what an ordinary lock does, `&T` to several threads or `&mut T` to one.
unsafe impl<T: Send + Sync> Sync for RwLock<T> {}

/// The value, for reading, in the thread that took the lock.
pub(crate) struct ReadGuard<'a, T> {
    value: &'a T,
    reading: Reading<'a>,
}

/// The value, and nobody else has it.
pub(crate) struct WriteGuard<'a, T> {
    value: &'a UnsafeCell<T>,
    _alone: ShardedLockWriteGuard<'a, ()>,
}

/// What keeps writers out.
#[derive(Debug)]
enum Reading<'a> {
    Marked(#[allow(dead_code, reason = "held for its lifetime")] Marked<'a>),
    Ordinary(#[allow(dead_code, reason = "held for its lifetime")] ShardedLockReadGuard<'a, ()>),
}

/// A mark in the place of this thread, which alone may take it back.
#[derive(Debug)]
struct Marked<'a>(&'a Mark, PhantomData<*const ()>);

impl<T> RwLock<T> {
    pub fn new(value: T) -> RwLock<T> {
        RwLock {
            marks: OnceLock::new(),
            marking: AtomicBool::new(false),
            ordinary: ShardedLock::new(()),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for a writer, and keeps writers out.
    #[inline]
    pub fn read(&self) -> ReadGuard<'_, T> {
        let reading = match self.mark() {
            Some(marked) => Reading::Marked(marked),
            None => Reading::Ordinary(self.read_ordinary()),
        };
        // SAFETY: `write` gives out no `&mut T` while this thread's mark or its guard of the ordinary
        // lock is there, which is as long as this reference.
        ReadGuard { value: unsafe { &*self.value.get() }, reading }
    }

    /// Marks this thread's place, where that is done now.
    #[inline]
    fn mark(&self) -> Option<Marked<'_>> {
        // Only to waste nothing: it counts when the mark is made.
        if !self.marking.load(Ordering::Relaxed) {
            return None;
        }
        let mark: &Mark = self.marks.get()?.get(place()?)?;
        let before = mark.readers.load(Ordering::Relaxed);
        mark.readers.store(before + 1, Ordering::Relaxed);
        // The writer's barrier makes one of the processor, too.
        compiler_fence(Ordering::SeqCst);
        let marked = Marked(mark, PhantomData);
        self.marking.load(Ordering::Acquire).then_some(marked)
    }

    #[cold]
    fn read_ordinary(&self) -> ShardedLockReadGuard<'_, ()> {
        let guard = self.ordinary.read().unwrap_or_else(PoisonError::into_inner);
        self.count();
        guard
    }

    /// Counts a reader that has the ordinary lock, and lets all mark their places where it is worth it.
    fn count(&self) {
        let Some(place) = place() else { return };
        let marks =
            self.marks.get_or_init(|| (0..PLACES).map(|_| CachePadded::default()).collect());
        let Some(mark) = marks.get(place) else { return };
        let times = mark.ordinary.load(Ordering::Relaxed) + 1;
        mark.ordinary.store(times % WORTH, Ordering::Relaxed);
        if times == WORTH && has_barrier() {
            self.marking.store(true, Ordering::Release);
        }
    }

    /// Waits for all readers, and keeps them and other writers out.
    pub fn write(&self) -> WriteGuard<'_, T> {
        let alone = self.ordinary.write().unwrap_or_else(PoisonError::into_inner);
        if self.marking.load(Ordering::Relaxed) {
            self.marking.store(false, Ordering::SeqCst);
            pass_barrier();
            self.marks.get().into_iter().flatten().for_each(|mark| wait_for(mark));
        }
        WriteGuard { value: &self.value, _alone: alone }
    }
}

impl<T: Default> Default for RwLock<T> {
    fn default() -> RwLock<T> {
        RwLock::new(T::default())
    }
}

/// Waits until a thread that reads is done.
fn wait_for(mark: &Mark) {
    let mut looks = 0;
    while mark.readers.load(Ordering::Acquire) != 0 {
        match looks {
            0..SPINS => hint::spin_loop(),
            SPINS..YIELDS => thread::yield_now(),
            _ => thread::sleep(NAP),
        }
        looks = (looks + 1).min(YIELDS);
    }
}

impl Drop for Marked<'_> {
    fn drop(&mut self) {
        let readers = self.0.readers.load(Ordering::Relaxed);
        self.0.readers.store(readers - 1, Ordering::Release);
    }
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value
    }
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `write` waited for all readers, and none comes past the ordinary lock, which this has.
        unsafe { &*self.value.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above; the guard itself is borrowed for as long.
        unsafe { &mut *self.value.get() }
    }
}

impl<T> std::fmt::Debug for ReadGuard<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.reading.fmt(f)
    }
}

/// Whether this process can have all its threads pass a barrier; asks the kernel to be ready for it.
fn has_barrier() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    *READY.get_or_init(|| membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok())
}

/// Has all threads of this process pass a barrier between what they did and what they will do.
fn pass_barrier() {
    if membarrier(MembarrierCommand::PrivateExpedited).is_ok() {
        return;
    }
    // A process that was forked may have to be registered anew.
    let again = membarrier(MembarrierCommand::RegisterPrivateExpedited)
        .and_then(|()| membarrier(MembarrierCommand::PrivateExpedited));
    if again.is_err() {
        thread::sleep(VISIBLE);
    }
}

/// The place of a thread, as long as it runs.
struct Place(Option<usize>);

/// The places that no thread has.
struct Free {
    given_back: Vec<usize>,
    never_given: usize,
}

static FREE: Mutex<Free> = Mutex::new(Free { given_back: Vec::new(), never_given: 0 });

thread_local! {
    static PLACE: Place = Place::take();
}

/// This thread's place, if it has one.
fn place() -> Option<usize> {
    PLACE.try_with(|place| place.0).ok().flatten()
}

impl Place {
    fn take() -> Place {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let place = free.given_back.pop().or_else(|| {
            let next = free.never_given;
            free.never_given = (next + 1).min(PLACES);
            (next < PLACES).then_some(next)
        });
        Place(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            FREE.lock().unwrap_or_else(PoisonError::into_inner).given_back.push(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// Takes it often enough that readers mark their places, where they can.
    fn warm<T>(lock: &RwLock<T>) {
        (0..WORTH).for_each(|_| drop(lock.read()));
        assert_eq!(lock.marking.load(Ordering::Relaxed), place().is_some() && has_barrier());
    }

    /// Many threads, more than have places, read two numbers that writers keep alike.
    #[test]
    fn readers_see_no_half_of_a_change() {
        const CHANGES: u64 = 200;
        let lock = RwLock::new((0_u64, 0_u64));
        thread::scope(|scope| {
            for _ in 0..PLACES + 8 {
                scope.spawn(|| {
                    let mut last = 0;
                    while last < CHANGES {
                        let pair = lock.read();
                        let first = hint::black_box(&*pair).0;
                        // All give way, and none is stopped for the whole of its turn with the lock.
                        thread::yield_now();
                        assert_eq!(hint::black_box(&*pair).1, first);
                        drop(pair);
                        assert!(first >= last);
                        last = first;
                        thread::yield_now();
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for change in 0..CHANGES / 2 {
                        // What has just been changed is mostly not marked: some changes come later.
                        if change.is_multiple_of(8) {
                            (0..WORTH).for_each(|_| drop(lock.read()));
                        }
                        let mut pair = lock.write();
                        pair.0 += 1;
                        hint::spin_loop();
                        pair.1 += 1;
                        drop(pair);
                        thread::yield_now();
                    }
                });
            }
        });
        assert_eq!(*lock.read(), (CHANGES, CHANGES));
    }

    /// Threads that come and go take over each other's places.
    #[test]
    fn a_place_goes_from_thread_to_thread() {
        let lock = RwLock::new(0);
        for _ in 0..PLACES * 2 {
            warm(&lock);
            thread::scope(|scope| {
                scope.spawn(|| *lock.read());
                scope.spawn(|| *lock.write() += 1);
            });
        }
        assert_eq!(*lock.read(), PLACES * 2);
    }

    #[test]
    fn a_writer_waits_for_each_reader() {
        let lock = RwLock::new(1);
        warm(&lock);
        let (entered, has_entered) = channel();
        let (leave, may_leave) = channel::<()>();
        let (first, lock) = (lock.read(), &lock);
        thread::scope(|scope| {
            // Goes with a failure, too: nobody waits for it then.
            let leave = leave;
            scope.spawn(move || {
                let guard = lock.read();
                entered.send(()).unwrap();
                may_leave.recv().unwrap();
                assert_eq!(*guard, 1);
            });
            has_entered.recv().unwrap();
            let writer = scope.spawn(|| *lock.write() = 2);
            thread::sleep(Duration::from_millis(20));
            assert!(!writer.is_finished());
            assert_eq!(*first, 1);
            drop(first);
            thread::sleep(Duration::from_millis(20));
            assert!(!writer.is_finished());
            leave.send(()).unwrap();
            writer.join().unwrap();
        });
        assert_eq!(*lock.read(), 2);
    }
}
