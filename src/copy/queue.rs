//! Several threads at one copy: parts are read side by side, and written one at a time, in order.
//!
//! In order: who reads a new image finds its clusters in the order of the disk, whatever thread read
//! them, and the first failure ends the copy where it would end with one thread. One at a time:
//! writers of one file would wait for each other anyway. Who has read the next part writes it and
//! all that are ready behind it: nobody has to be woken for that. Nothing here knows an image.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Threads that copy at once: while some wait for the disk, others have work.
const MIN_THREADS: usize = 4;
/// The most of them.
const MAX_THREADS: usize = 8;
/// Parts for each thread that are read, or are being read, and not yet written.
const BUFFERS: usize = 2;

/// Bytes of data that a part of a copy should have: so few that they are still near the processor
/// when they are written, and that no thread writes for long.
pub const PIECE: u64 = 512 << 10;

/// How many threads a long copy takes.
pub fn threads() -> usize {
    let cpus = thread::available_parallelism().map_or(2, usize::from);
    cpus.clamp(MIN_THREADS, MAX_THREADS)
}

/// Has `read` prepare each part that `next` names, until it names none, by several threads at once,
/// and `write` what it returned, one after the other in the order of the parts. `read` has a buffer
/// for its own, of any length and contents, which `write` gets as it left it.
///
/// # Errors
/// The first in the order of the parts: what comes before it is written, and nothing after it.
pub fn run<S, R: Send, E: Send>(
    threads: usize,
    next: impl FnMut() -> Result<Option<S>, E> + Send,
    read: impl Fn(S, &mut Vec<u8>) -> Result<R, E> + Sync,
    write: impl Fn(R, &[u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let buffers = threads * BUFFERS;
    let state = State {
        ready: BTreeMap::new(),
        next: 0,
        writing: false,
        free: vec![Vec::new(); buffers],
        asleep: 0,
        ended: false,
        failed: None,
    };
    let copy = Copy {
        parts: Mutex::new(Parts { given: 0, ended: false, next }),
        state: Mutex::new(state),
        wake: Condvar::new(),
        buffers,
        read,
        write,
    };
    thread::scope(|scope| {
        (1..threads).for_each(|_| drop(scope.spawn(|| copy.work())));
        copy.work();
    });
    copy.state.into_inner().unwrap_or_else(PoisonError::into_inner).failed.map_or(Ok(()), Err)
}

/// As [`run`], where parts may be finished in any order: `work` does all that there is to do.
///
/// # Errors
/// The first in the order of the parts; some that come after it may be done.
pub fn unordered<S, E: Send>(
    threads: usize,
    next: impl FnMut() -> Result<Option<S>, E> + Send,
    work: impl Fn(S, &mut Vec<u8>) -> Result<(), E> + Sync,
) -> Result<(), E> {
    run(threads, next, work, |(), _| Ok(()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One copy under way.
struct Copy<N, F, W, R, E> {
    parts: Mutex<Parts<N>>,
    state: Mutex<State<R, E>>,
    /// Buffers came free, or nothing more is read.
    wake: Condvar,
    buffers: usize,
    read: F,
    write: W,
}

/// The parts that are still to be given out.
struct Parts<N> {
    given: u64,
    ended: bool,
    next: N,
}

/// What was read, and how far it is written.
struct State<R, E> {
    /// Parts that wait to be written, by their numbers: why there is none, where reading failed.
    ready: BTreeMap<u64, (Result<R, E>, Vec<u8>)>,
    /// The part that is written next, or now.
    next: u64,
    writing: bool,
    free: Vec<Vec<u8>>,
    /// Threads that wait for a buffer.
    asleep: usize,
    /// Nothing more is read.
    ended: bool,
    /// Why nothing more is written.
    failed: Option<E>,
}

impl<N> Parts<N> {
    /// The next part, or why there is none, and its number; nothing after the end.
    fn take<S, E>(&mut self) -> Option<(u64, Result<S, E>)>
    where
        N: FnMut() -> Result<Option<S>, E>,
    {
        if self.ended {
            return None;
        }
        let part = (self.next)().transpose();
        self.ended = !matches!(part, Some(Ok(_)));
        self.given += 1;
        part.map(|part| (self.given - 1, part))
    }
}

impl<S, N, F, W, R, E> Copy<N, F, W, R, E>
where
    N: FnMut() -> Result<Option<S>, E>,
    F: Fn(S, &mut Vec<u8>) -> Result<R, E>,
    W: Fn(R, &[u8]) -> Result<(), E>,
{
    /// What each thread does.
    fn work(&self) {
        let _fault = Fault(self);
        while let Some(mut buf) = self.buffer() {
            // Not in the head of an `if let`: the lock would last as long as the reading.
            let taken = lock(&self.parts).take();
            let Some((number, part)) = taken else {
                // Whoever reads now writes what is left.
                return self.stop_reading();
            };
            let part = part.and_then(|part| (self.read)(part, &mut buf));
            lock(&self.state).ready.insert(number, (part, buf));
            self.write_ready();
        }
    }

    /// A buffer to read into, as soon as there is one; none where nothing is to be read.
    fn buffer(&self) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        while !state.ended {
            if let Some(buf) = state.free.pop() {
                return Some(buf);
            }
            state.asleep += 1;
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.asleep -= 1;
        }
        None
    }

    /// Writes for as long as the next part is there, unless another thread does.
    fn write_ready(&self) {
        let mut state = lock(&self.state);
        while let Some((part, buf)) = state.due() {
            state.writing = true;
            drop(state);
            let done = part.and_then(|part| (self.write)(part, &buf));
            state = lock(&self.state);
            state.writing = false;
            state.next += 1;
            state.free.push(buf);
            if let Err(error) = done {
                state.failed = Some(error);
                state.ended = true;
            }
            // Not for each of them: to wake somebody takes time from the writing.
            let many = state.ended || state.free.len() >= self.buffers / 2;
            if many && state.asleep > 0 {
                self.wake.notify_all();
            }
        }
    }
}

impl<N, F, W, R, E> Copy<N, F, W, R, E> {
    fn stop_reading(&self) {
        lock(&self.state).ended = true;
        self.wake.notify_all();
    }
}

impl<R, E> State<R, E> {
    /// The part that is to be written now, if it is read.
    fn due(&mut self) -> Option<(Result<R, E>, Vec<u8>)> {
        if self.writing || self.failed.is_some() {
            return None;
        }
        self.ready.remove(&self.next)
    }
}

/// A thread that ends by a fault of its own must not leave others waiting for ever: its part is never
/// written, nor what comes after it.
struct Fault<'a, N, F, W, R, E>(&'a Copy<N, F, W, R, E>);

impl<N, F, W, R, E> Drop for Fault<'_, N, F, W, R, E> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop_reading();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::error::Error;

    /// Names the numbers from 1 to `last`.
    fn count(last: u64) -> impl FnMut() -> Result<Option<u64>, Error> {
        let mut numbers = 1..=last;
        move || Ok(numbers.next())
    }

    #[test]
    fn parts_are_written_in_order_one_at_a_time_with_what_was_read() {
        for threads in [1, 2, 5] {
            let (told, busy) = (Mutex::new(Vec::new()), AtomicBool::new(false));
            let read = |part: u64, buf: &mut Vec<u8>| {
                if part.is_multiple_of(7) {
                    thread::yield_now();
                }
                buf.resize(8, 0);
                buf.copy_from_slice(&part.to_le_bytes());
                Ok(part)
            };
            let write = |part: u64, buf: &[u8]| {
                assert!(!busy.swap(true, Ordering::SeqCst));
                assert_eq!(buf, part.to_le_bytes());
                lock(&told).push(part);
                busy.store(false, Ordering::SeqCst);
                Ok(())
            };
            run(threads, count(300), read, write).unwrap();
            assert_eq!(*lock(&told), (1..=300).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn parts_are_read_side_by_side() {
        let meet = Barrier::new(3);
        // Nobody gets past this alone.
        let read = |_, _: &mut Vec<u8>| {
            meet.wait();
            Ok(())
        };
        run(3, count(3), read, |(), _| Ok(())).unwrap();
    }

    #[test]
    fn parts_are_read_while_one_is_written() {
        let meet = Barrier::new(2);
        let read = |part: u64, _: &mut Vec<u8>| {
            if part == 2 {
                meet.wait();
            }
            Ok(part)
        };
        let write = |part: u64, _: &[u8]| {
            if part == 1 {
                meet.wait();
            }
            Ok(())
        };
        run(2, count(2), read, write).unwrap();
    }

    #[test]
    fn no_more_is_read_ahead_than_there_are_buffers() {
        let (given, written) = (Mutex::new(0), Mutex::new(0));
        let mut count = count(500);
        let next = || {
            *lock(&given) += 1;
            assert!(*lock(&given) <= *lock(&written) + 1 + 4 * BUFFERS);
            count()
        };
        let write = |_, _: &[u8]| {
            thread::yield_now();
            *lock(&written) += 1;
            Ok(())
        };
        run(4, next, |part, _| Ok(part), write).unwrap();
    }

    #[test]
    fn the_first_failure_is_told_and_nothing_after_it_is_written() {
        fn failed<T>(part: u64) -> Result<T, Error> {
            Err(Error::invalid(format!("part {part}")))
        }
        enum Fails {
            Naming,
            Reading,
            Writing,
        }
        for fails in [Fails::Naming, Fails::Reading, Fails::Writing] {
            for threads in [1, 5] {
                let (mut given, told) = (0u64, Mutex::new(Vec::new()));
                let next = || {
                    given += 1;
                    if matches!(fails, Fails::Naming) && given == 20 {
                        return failed(given);
                    }
                    Ok(Some(given))
                };
                let read = |part: u64, _: &mut Vec<u8>| {
                    if matches!(fails, Fails::Reading) && part >= 20 {
                        return failed(part);
                    }
                    Ok(part)
                };
                let write = |part: u64, _: &[u8]| {
                    if part >= 20 {
                        return failed(part);
                    }
                    lock(&told).push(part);
                    Ok(())
                };
                assert_eq!(run(threads, next, read, write).unwrap_err().message(), "part 20");
                assert_eq!(*lock(&told), (1..20).collect::<Vec<u64>>());
            }
        }
    }

    #[test]
    fn a_fault_in_one_thread_ends_all() {
        for (reading, threads) in [(true, 1), (true, 4), (false, 1), (false, 4)] {
            let fault = |here: bool, part: u64| {
                assert!(!(here && part == 10), "a fault of its own");
                Ok(part)
            };
            let ended = std::panic::catch_unwind(|| {
                let read = |part, _: &mut Vec<u8>| fault(reading, part);
                run(threads, count(u64::MAX), read, |part, _| fault(!reading, part).map(drop))
            });
            assert!(ended.is_err());
        }
    }
}
