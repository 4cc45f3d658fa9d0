//! Several threads at one copy: each reads a part when it likes, and writes it when its turn comes.
//!
//! Turns come in the order of the parts: who reads a new image finds its clusters in the order of
//! the disk, whatever thread read them, and the first failure ends the copy where it would end with
//! one thread. Writers of one file would wait for each other anyway. Nothing here knows an image.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};

use crate::error::Error;

/// An earlier part failed: whoever gets this ends as well. It is never told.
#[derive(Debug, Clone, Copy)]
pub struct Stopped;

impl From<Stopped> for Error {
    fn from(_: Stopped) -> Error {
        Error::invalid("an earlier part of the copy failed")
    }
}

/// Threads that copy at once: while some wait for the disk, others have work.
const MIN_THREADS: usize = 4;
/// The most of them.
const MAX_THREADS: usize = 8;

/// Bytes of data that a part of a copy should have: so few that they are still near the processor
/// when they are written, and that no thread has the turn for long.
pub const PIECE: u64 = 512 << 10;

/// How many threads a long copy takes.
pub fn threads() -> usize {
    let cpus = thread::available_parallelism().map_or(2, usize::from);
    cpus.clamp(MIN_THREADS, MAX_THREADS)
}

/// Hands each part that `next` names, until it names none, to `work`, with a buffer that the thread
/// keeps. What `work` does after it waited for the part's turn is done in order. Ends with the first
/// failure in that order: what comes before it is done, and nothing that comes after.
///
/// # Errors
/// That first failure.
pub fn run<S, E: From<Stopped> + Send>(
    threads: usize,
    next: impl FnMut() -> Result<Option<S>, E> + Send,
    work: impl Fn(S, &Turn<'_, E>, &mut Vec<u8>) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let parts = Mutex::new(Parts { given: 0, ended: false, next });
    let order = Order { next: 0, waiting: Vec::new(), over: false, failed: None };
    let order = Mutex::new(order);
    let job = || {
        let mut buf = Vec::new();
        loop {
            // Not in the head of a `while let`: the lock would last for the whole turn.
            let taken = lock(&parts).take(&order);
            let Some((number, part)) = taken else { return };
            let turn = Turn { order: &order, number };
            let done = part.and_then(|part| work(part, &turn, &mut buf));
            if !turn.end(done) {
                return;
            }
        }
    };
    thread::scope(|scope| {
        (1..threads).for_each(|_| drop(scope.spawn(job)));
        job();
    });
    order.into_inner().unwrap_or_else(PoisonError::into_inner).failed.map_or(Ok(()), Err)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The parts that are still to be given out.
struct Parts<N> {
    given: u64,
    ended: bool,
    next: N,
}

impl<N> Parts<N> {
    /// The next part, or why there is none, and its number; nothing after the end.
    fn take<S, E>(&mut self, order: &Mutex<Order<E>>) -> Option<(u64, Result<S, E>)>
    where
        N: FnMut() -> Result<Option<S>, E>,
    {
        if self.ended || lock(order).over {
            return None;
        }
        let part = (self.next)().transpose();
        self.ended = !matches!(part, Some(Ok(_)));
        self.given += 1;
        part.map(|part| (self.given - 1, part))
    }
}

/// Whose turn it is.
struct Order<E> {
    /// The part whose turn it is.
    next: u64,
    /// Threads that wait for the turn of a part.
    waiting: Vec<(u64, Thread)>,
    /// A part failed: the turns after it never come.
    over: bool,
    failed: Option<E>,
}

/// One part's turn.
pub struct Turn<'a, E> {
    order: &'a Mutex<Order<E>>,
    number: u64,
}

impl<E> Turn<'_, E> {
    /// Returns when all parts before this one are done.
    ///
    /// # Errors
    /// Where one of them failed; that one's error is the one that is told.
    pub fn wait(&self) -> Result<(), Stopped> {
        let mut order = lock(self.order);
        if order.next != self.number && !order.over {
            order.waiting.push((self.number, thread::current()));
        }
        while order.next != self.number {
            if order.over {
                return Err(Stopped);
            }
            drop(order);
            thread::park();
            order = lock(self.order);
        }
        order.waiting.retain(|(number, _)| *number != self.number);
        Ok(())
    }

    /// Ends the part in its turn; whether the copy goes on.
    fn end(&self, done: Result<(), E>) -> bool {
        if self.wait().is_err() {
            return false;
        }
        let mut order = lock(self.order);
        match done {
            Ok(()) => {
                order.next += 1;
                let next = order.waiting.iter().find(|(number, _)| *number == order.next);
                next.inspect(|(_, thread)| thread.unpark());
                true
            }
            Err(error) => {
                order.failed = Some(error);
                order.stop();
                false
            }
        }
    }
}

impl<E> Order<E> {
    fn stop(&mut self) {
        self.over = true;
        self.waiting.iter().for_each(|(_, thread)| thread.unpark());
    }
}

impl<E> Drop for Turn<'_, E> {
    fn drop(&mut self) {
        // A thread that ends by a fault of its own must not leave others waiting for ever.
        if thread::panicking() {
            lock(self.order).stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn turns_come_in_order_whatever_the_threads_do() {
        for threads in [1, 2, 5] {
            let (mut given, told) = (0u64, Mutex::new(Vec::new()));
            let next = || {
                given += 1;
                Ok((given <= 300).then_some(given))
            };
            let work = |part: u64, turn: &Turn<'_, Error>, _: &mut Vec<u8>| {
                if part.is_multiple_of(7) {
                    thread::yield_now();
                }
                if part.is_multiple_of(5) {
                    return Ok(());
                }
                turn.wait()?;
                lock(&told).push(part);
                Ok(())
            };
            run(threads, next, work).unwrap();
            let expected: Vec<u64> = (1..=300).filter(|n| n % 5 != 0).collect();
            assert_eq!(*lock(&told), expected);
        }
    }

    #[test]
    fn parts_are_worked_on_side_by_side() {
        let (mut given, meet) = (0, Barrier::new(3));
        let next = || {
            given += 1;
            Ok((given <= 3).then_some(given))
        };
        let work = |_: u32, turn: &Turn<'_, Error>, _: &mut Vec<u8>| {
            // Nobody gets past this alone.
            meet.wait();
            Ok(turn.wait()?)
        };
        run(3, next, work).unwrap();
    }

    #[test]
    fn the_first_failure_is_told_and_nothing_after_it_is_done() {
        for (threads, in_source) in [(1, false), (5, false), (1, true), (5, true)] {
            let (mut given, told) = (0u64, Mutex::new(Vec::new()));
            let next = || {
                given += 1;
                if in_source && given == 20 {
                    return Err(Error::invalid("part 20"));
                }
                Ok(Some(given))
            };
            let work = |part: u64, turn: &Turn<'_, Error>, _: &mut Vec<u8>| {
                if part >= 20 {
                    return Err(Error::invalid(format!("part {part}")));
                }
                turn.wait()?;
                lock(&told).push(part);
                Ok(())
            };
            assert_eq!(run(threads, next, work).unwrap_err().message(), "part 20");
            assert_eq!(*lock(&told), (1..20).collect::<Vec<u64>>());
        }
    }
}
