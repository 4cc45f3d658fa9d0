//! The requests of one queue of a disk: carried out one after the other while they are short, several at
//! once where each takes so long that it pays. A device below gets the queue's depth then, and what is only
//! copied is copied by several processors.
//!
//! They are given back in the order in which they came, whichever is done first: what is under way is what
//! stands behind the used ring's index, and nothing before it, so that another server can go on from there.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use virtio_queue::DescriptorChain;

use super::Memory;
use super::execute::Executor;
use super::request::{Unanswerable, parse};
use super::ring::{Lent, Serve};

/// The most requests of a queue that are carried out at once.
const AT_ONCE: usize = 8;
/// A request that takes longer than this on average is worth two changes of threads.
const LONG: Duration = Duration::from_micros(50);
/// The weight of what came before in the average is one less of this many parts.
const PARTS: u32 = 8;

/// How long to look for the next request.
const WINDOW: Duration = Duration::from_micros(64);
/// The most times in a row that nobody looks.
const MOST_PASSED: u32 = 1023;

/// How many bytes were written.
type Answer = Result<u32, Unanswerable>;
type Work = Box<dyn FnOnce() -> Answer + Send>;

/// One queue's requests, with the threads that help with them: none before they are needed.
pub struct Pool {
    executor: Executor,
    pace: Pace,
    patience: Patience,
    /// When the request before was done.
    since: Option<Instant>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Carries out requests as `executor` does.
    pub fn new(executor: Executor) -> Pool {
        let (pace, patience, shared) = (Pace::default(), Patience::default(), Arc::default());
        Pool { executor, pace, patience, since: None, shared, threads: Vec::new() }
    }

    /// Whether requests take so long that several at once pay.
    pub(super) fn pays(&self) -> bool {
        self.pace.is_long()
    }

    /// How many are under way.
    pub(super) fn under_way(&self) -> usize {
        self.shared.lock().under_way.len()
    }

    /// Whether one more may be begun.
    pub(super) fn has_room(&self) -> bool {
        self.pays() && self.under_way() < AT_ONCE
    }

    /// Takes on one more request; its turn comes in [`next`](Pool::next).
    pub(super) fn begin<M: Lent>(&mut self, chain: DescriptorChain<M>, memory: M) {
        let (head, executor) = (chain.head_index(), self.executor.clone());
        let work = move || parse(chain, &memory).map(|request| executor.answer(request));
        let mut state = self.shared.lock();
        state.begun += 1;
        let number = state.begun;
        state.under_way.push_back(Begun { head, done: None });
        state.waiting.push_back((number, Box::new(work)));
    }

    /// Waits until one of those that are under way is done. Those that are, up to the first that is not, with
    /// the heads of their chains.
    pub(super) fn next(&mut self) -> Vec<(u16, Answer)> {
        let alone = self.under_way() == 1;
        while !alone && self.threads.len() < self.under_way().min(AT_ONCE) {
            let shared = Arc::clone(&self.shared);
            let helper = Builder::new().name("requests".into());
            let Ok(thread) = helper.spawn(move || help(&shared)) else { break };
            self.threads.push(thread);
        }
        let own = if alone || self.threads.is_empty() { self.shared.take() } else { None };
        if let Some((number, work)) = own {
            self.shared.carry_out(number, work);
        }
        let mut state = self.shared.lock();
        state.waiting.iter().for_each(|_| self.shared.waiting.notify_one());
        while !std::mem::take(&mut state.news) && !state.under_way.is_empty() {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut done = Vec::new();
        while let Some((answer, took)) = state.under_way.front().and_then(|begun| begun.done) {
            self.pace.note(took);
            done.extend(state.under_way.pop_front().map(|begun| (begun.head, answer)));
        }
        done
    }

    /// Begins nothing more, and waits for what is under way: from then on guest memory is left alone.
    pub(super) fn rest(&mut self) {
        let mut state = self.shared.lock();
        let waiting: Vec<u64> = state.waiting.drain(..).map(|(number, _)| number).collect();
        waiting.into_iter().for_each(|number| state.end(number, Err(Unanswerable), Duration::ZERO));
        while state.under_way.iter().any(|begun| begun.done.is_none()) {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.under_way.clear();
    }
}

impl Serve for Pool {
    fn serve<'m>(
        &mut self,
        chain: DescriptorChain<&'m Memory>,
        memory: &'m Memory,
    ) -> Result<u32, Unanswerable> {
        let since = self.since.take().unwrap_or_else(Instant::now);
        let answer = parse(chain, memory).map(|request| self.executor.answer(request));
        let now = Instant::now();
        self.pace.note(now - since);
        self.since = Some(now);
        answer
    }

    fn patience(&mut self) -> Option<Duration> {
        self.since = None;
        self.patience.window()
    }

    fn lingered(&mut self, came: bool) {
        self.patience.note(came);
    }

    fn pool(&mut self) -> Option<&mut Pool> {
        self.pays().then_some(self)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.rest();
        self.shared.lock().closed = true;
        self.shared.waiting.notify_all();
        for thread in self.threads.drain(..) {
            // A panic has been reported on stderr, and its request broke the queue.
            let _ = thread.join();
        }
    }
}

/// How long requests take, on average over the last ones.
#[derive(Default)]
struct Pace(Duration);

impl Pace {
    fn note(&mut self, took: Duration) {
        // A single one that had to wait for a processor says nothing of the others.
        let took = took.min(LONG * 4);
        self.0 = (self.0 * (PARTS - 1) + took) / PARTS;
    }

    fn is_long(&self) -> bool {
        self.0 > LONG
    }
}

/// Whether to look for the next request pays: it does where the last time something came, and is tried again
/// ever more seldom where nothing did.
#[derive(Default)]
struct Patience {
    /// How many times not to look from now on.
    pass: u32,
    /// How many it was the last time.
    passed: u32,
}

impl Patience {
    fn window(&mut self) -> Option<Duration> {
        match self.pass.checked_sub(1) {
            Some(left) => {
                self.pass = left;
                None
            }
            None => Some(WINDOW),
        }
    }

    fn note(&mut self, came: bool) {
        self.passed = if came { 0 } else { (2 * self.passed + 1).min(MOST_PASSED) };
        self.pass = self.passed;
    }
}

/// What the threads share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is work that waits, or none will come any more.
    waiting: Condvar,
    /// A request is done.
    done: Condvar,
}

#[derive(Default)]
struct State {
    /// Numbers that were given to requests.
    begun: u64,
    waiting: VecDeque<(u64, Work)>,
    /// In the order in which they came, the last one has the number `begun`.
    under_way: VecDeque<Begun>,
    /// Whether a request was done since somebody looked.
    news: bool,
    closed: bool,
}

struct Begun {
    head: u16,
    done: Option<(Answer, Duration)>,
}

impl State {
    fn end(&mut self, number: u64, answer: Answer, took: Duration) {
        let from_last = usize::try_from(self.begun - number).unwrap_or(usize::MAX);
        let place = self.under_way.len().checked_sub(from_last + 1);
        if let Some(begun) = place.and_then(|place| self.under_way.get_mut(place)) {
            begun.done = Some((answer, took));
        }
        self.news = true;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<(u64, Work)> {
        self.lock().waiting.pop_front()
    }

    fn carry_out(&self, number: u64, work: Work) {
        let mut ending = Ending { shared: self, number, answer: Err(Unanswerable), took: LONG };
        let since = Instant::now();
        ending.answer = work();
        ending.took = since.elapsed();
    }
}

/// Says that a request is done, also where it ends in a panic: nobody is to wait for it for ever.
struct Ending<'a> {
    shared: &'a Shared,
    number: u64,
    answer: Answer,
    took: Duration,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.shared.lock().end(self.number, self.answer, self.took);
        self.shared.done.notify_one();
    }
}

/// Carries out what waits, until the pool is closed.
fn help(shared: &Shared) {
    loop {
        let mut state = shared.lock();
        let (number, work) = loop {
            if let Some(taken) = state.waiting.pop_front() {
                break taken;
            }
            if state.closed {
                return;
            }
            state = shared.waiting.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        shared.carry_out(number, work);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, IoSliceMut};
    use std::sync::atomic::{AtomicBool, Ordering};

    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::block::{BlockDevice, BlockExtent};
    use crate::error::{Error, Result};
    use crate::virtio::ring::{Broken, Turn};
    use crate::virtio::{Block, Id};

    #[test]
    fn one_request_that_had_to_wait_makes_no_long_ones() {
        let mut pace = Pace::default();
        pace.note(Duration::from_secs(1));
        assert!(!pace.is_long());
        (0..3).for_each(|_| pace.note(LONG * 2));
        assert!(!pace.is_long());
        (0..20).for_each(|_| pace.note(LONG * 2));
        assert!(pace.is_long());
        (0..20).for_each(|_| pace.note(LONG / 20));
        assert!(!pace.is_long());
    }

    #[test]
    fn who_looks_in_vain_looks_ever_more_seldom() {
        let mut patience = Patience::default();
        let mut looks = |came: bool, times: u32| {
            let mut count = 0;
            for _ in 0..times {
                if patience.window().is_some() {
                    patience.note(came);
                    count += 1;
                }
            }
            count
        };
        assert_eq!(looks(true, 100), 100);
        assert!(looks(false, 10_000) < 20);
        assert!(looks(true, 10_000) > 8000);
    }

    /// A disk whose reads are long and, from the fifth on, wait until another one is under way too, or all
    /// have come.
    struct Slow {
        come: Mutex<u64>,
        met: Condvar,
        reads: u64,
        fails: bool,
        /// Waits for no other.
        alone: bool,
    }

    impl BlockDevice for Slow {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn block_size(&self) -> u32 {
            512
        }
        fn read_only(&self) -> bool {
            true
        }
        fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
            let mut come = self.come.lock().unwrap();
            *come += 1;
            let own = *come;
            self.met.notify_all();
            if own > 4 && !self.alone {
                let patience = Duration::from_secs(60);
                let waited = self
                    .met
                    .wait_timeout_while(come, patience, |come| *come == own && own < self.reads);
                let timed_out = waited.unwrap().1.timed_out();
                assert!(!timed_out, "nothing else was under way with read {own}");
            } else {
                drop(come);
            }
            std::thread::sleep(LONG * 8);
            if self.fails && own > 6 {
                return Err(Error::invalid("such a read fails"));
            }
            bufs.iter_mut().for_each(|buf| buf.fill((offset / 512) as u8));
            Ok(())
        }
        fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> Result<()> {
            unreachable!("it is read only")
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
            unreachable!("it is read only")
        }
        fn discard(&self, _: u64, _: u64) -> Result<()> {
            unreachable!("it is read only")
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
        fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<BlockExtent>> {
            Ok(Vec::new())
        }
    }

    const READS: u16 = 40;
    const SIZE: u16 = 128;
    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const HEADERS: u64 = 0x4000;
    const STATES: u64 = 0x5000;
    const DATA: u64 = 0x8000;

    /// Memory with reads of sectors 0, 1 and so on in a queue of its own.
    fn reads(lost: Option<u16>) -> (Arc<Memory>, Queue) {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        for n in 0..READS {
            let (at, first) = (u64::from(n), n * 3);
            let written = if lost == Some(n) { 0 } else { 2 };
            for (part, (address, len, flags)) in (0u16..).zip([
                (HEADERS + 16 * at, 16, 1),
                (DATA + 512 * at, 512, 3),
                (STATES + at, 1, written),
            ]) {
                let raw = Descriptor::new(address, len, flags, first + part + 1);
                let place = GuestAddress(16 * u64::from(first + part));
                memory.write_obj(RawDescriptor::from(raw), place).unwrap();
            }
            memory.write_obj(at, GuestAddress(HEADERS + 16 * at + 8)).unwrap();
            memory.write_obj(0xeeu8, GuestAddress(STATES + at)).unwrap();
            memory.write_obj(first, GuestAddress(AVAIL + 4 + 2 * at)).unwrap();
        }
        memory.write_obj(READS, GuestAddress(AVAIL + 2)).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(0), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        (memory, queue)
    }

    fn serve(
        (memory, queue): &mut (Arc<Memory>, Queue),
        (fails, alone): (bool, bool),
        limit: u64,
    ) -> std::result::Result<u64, Broken> {
        let (come, met) = (Mutex::default(), Condvar::new());
        let disk = Arc::new(Slow { come, met, reads: limit.min(READS.into()), fails, alone });
        let mut pool = Pool::new(Block::new(disk, Id::new("slow"), 1).executor(!0));
        let told = AtomicBool::new(false);
        let turn = Turn { queue, memory: &*memory, stop: &AtomicBool::new(false), limit };
        let served = turn.drain(&mut pool, || told.store(true, Ordering::Relaxed));
        assert!(told.into_inner());
        served
    }

    #[test]
    fn long_requests_are_carried_out_at_once_and_given_back_in_their_order() {
        let mut made = reads(None);
        assert_eq!(serve(&mut made, (false, false), u64::MAX).unwrap(), u64::from(READS));
        let memory = made.0;
        for n in 0..READS {
            let at = u64::from(n);
            let head: u32 = memory.read_obj(GuestAddress(USED + 4 + 8 * at)).unwrap();
            let len: u32 = memory.read_obj(GuestAddress(USED + 8 + 8 * at)).unwrap();
            assert_eq!((head, len), (u32::from(n) * 3, 513));
            let status: u8 = memory.read_obj(GuestAddress(STATES + at)).unwrap();
            let byte: u8 = memory.read_obj(GuestAddress(DATA + 512 * at + 511)).unwrap();
            assert_eq!((status, byte), (0, n as u8));
        }
    }

    #[test]
    fn a_turn_takes_no_more_requests_than_it_may() {
        let mut made = reads(None);
        assert_eq!(serve(&mut made, (false, false), 11).unwrap(), 11);
        let used: u16 = made.0.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!((used, made.1.next_avail()), (11, 11));
    }

    #[test]
    fn a_long_request_that_fails_has_its_status() {
        let mut made = reads(None);
        assert_eq!(serve(&mut made, (true, false), u64::MAX).unwrap(), u64::from(READS));
        let failed = (0..READS)
            .filter(|n| made.0.read_obj::<u8>(GuestAddress(STATES + u64::from(*n))).unwrap() == 1);
        assert_eq!(failed.count(), usize::from(READS) - 6);
    }

    #[test]
    fn a_chain_without_a_status_breaks_the_queue_and_what_is_under_way_ends() {
        let mut made = reads(Some(9));
        assert_eq!(serve(&mut made, (false, true), u64::MAX), Err(Broken));
        let used: u16 = made.0.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, 9, "what came before is given back");
    }
}
