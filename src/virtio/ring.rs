//! Takes descriptor chains off a queue in batches and gives them back (virtio 1.2, 2.7).
//!
//! It knows no kind of device: what a chain means is its caller's business.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::pool::Pool;
use super::request::Unanswerable;
use super::{Interrupt, Memory};

/// How many chains are given back before the driver hears of them: it can go on with the first
/// while the rest of a long batch is at work.
const BATCH: usize = 16;

/// The queue holds something that cannot be answered: nothing more is taken from it until the
/// driver resets the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Broken {
        Broken
    }
}

impl From<Unanswerable> for Broken {
    fn from(_: Unanswerable) -> Broken {
        Broken
    }
}

/// Guest memory that a thread can hold on to.
pub trait Lent: Deref<Target = Memory> + Clone + Send + 'static {}

impl<M: Deref<Target = Memory> + Clone + Send + 'static> Lent for M {}

/// What is done with each chain of a queue.
pub trait Serve {
    /// Serves one chain; returns how many bytes it has written.
    fn serve<'m>(
        &mut self,
        chain: DescriptorChain<&'m Memory>,
        memory: &'m Memory,
    ) -> Result<u32, Unanswerable>;

    /// The queue is empty. How long to look for the next chain before the driver is asked to say when there is
    /// one: to be woken up takes longer than many a driver needs.
    fn patience(&mut self) -> Option<Duration> {
        None
    }

    /// Whether a chain came within that time.
    fn lingered(&mut self, _came: bool) {}

    /// Who serves several chains at once, where that pays now.
    fn pool(&mut self) -> Option<&mut Pool> {
        None
    }
}

/// One queue at work. Its rings lie in guest memory, where the guest may write anything at any time.
pub struct Ring {
    index: u16,
    queue: Queue,
    memory: Arc<Memory>,
    interrupt: Arc<dyn Interrupt>,
}

impl Ring {
    /// Queue number `index`, whose addresses have been checked against `memory`.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: Arc<Memory>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Ring {
        Ring { index, queue, memory, interrupt }
    }

    /// Hands every available chain to `serve`, as [`Turn::drain`], with the queue's own memory and interrupt.
    pub fn drain(&mut self, stop: &AtomicBool, serve: &mut impl Serve) -> Result<u64, Broken> {
        let Ring { index, queue, memory, interrupt } = self;
        let turn = Turn { queue, memory: &*memory, stop, limit: u64::MAX };
        turn.drain(serve, || interrupt.queue_used(*index))
    }
}

/// A stretch of work on a queue.
pub struct Turn<'a, M> {
    /// The queue.
    pub queue: &'a mut Queue,
    /// Where its rings and buffers lie.
    pub memory: &'a M,
    /// Set where no more chains are to be taken.
    pub stop: &'a AtomicBool,
    /// The most chains to be served.
    pub limit: u64,
}

impl<M: Lent> Turn<'_, M> {
    /// Hands available chains to `serve` until none are left, `limit` were served or `stop` is set; all that
    /// were begun have ended then. Calls `tell` where the driver wants to hear of it. Returns how many were
    /// served.
    pub fn drain(self, serve: &mut impl Serve, tell: impl Fn()) -> Result<u64, Broken> {
        let Turn { queue, memory, stop, limit } = self;
        let mut work = Draining { queue, memory, stop, limit, tell, served: 0, untold: 0 };
        work.run(serve)?;
        Ok(work.served)
    }
}

struct Draining<'a, M, T> {
    queue: &'a mut Queue,
    memory: &'a M,
    stop: &'a AtomicBool,
    limit: u64,
    tell: T,
    served: u64,
    /// How many were given back since the driver was told.
    untold: usize,
}

impl<M: Lent, T: Fn()> Draining<'_, M, T> {
    fn run(&mut self, serve: &mut impl Serve) -> Result<(), Broken> {
        loop {
            self.queue.disable_notification(&**self.memory)?;
            self.serve(serve)?;
            self.announce()?;
            if self.linger(serve)? {
                continue;
            }
            // Something may have come between the last look and the request to be told.
            if !self.queue.enable_notification(&**self.memory)? || self.is_over(0) {
                return Ok(());
            }
        }
    }

    /// Looks for more while the driver thinks that somebody does; whether it came.
    fn linger(&mut self, serve: &mut impl Serve) -> Result<bool, Broken> {
        let since = Instant::now();
        let Some(patience) = serve.patience().filter(|_| !self.is_over(0)) else {
            return Ok(false);
        };
        loop {
            let came = self.queue.avail_idx(&**self.memory, Ordering::Acquire)?.0;
            let came = came != self.queue.next_avail();
            if came || self.is_over(0) || since.elapsed() > patience {
                serve.lingered(came);
                return Ok(came);
            }
            // Whoever needs this processor has it: the driver may be among them.
            thread::yield_now();
        }
    }

    /// Whether no more chains are to be taken, where so many were and have not been given back.
    fn is_over(&self, under_way: usize) -> bool {
        self.stop.load(Ordering::Relaxed) || self.served + under_way as u64 >= self.limit
    }

    fn serve(&mut self, serve: &mut impl Serve) -> Result<(), Broken> {
        while !self.is_over(0) {
            if let Some(pool) = serve.pool() {
                let served = self.by_pool(pool);
                if served.is_err() {
                    pool.rest();
                }
                if !served? {
                    return Ok(());
                }
                continue;
            }
            let memory = &**self.memory;
            let Some(chain) = self.queue.iter(memory)?.next() else { return Ok(()) };
            let head = chain.head_index();
            let written = serve.serve(chain, memory)?;
            self.give_back(head, written)?;
        }
        Ok(())
    }

    /// Serves chains several at once, for as long as that pays; whether some may be left.
    fn by_pool(&mut self, pool: &mut Pool) -> Result<bool, Broken> {
        loop {
            while pool.has_room() && !self.is_over(pool.under_way()) {
                let Some(chain) = self.queue.iter(self.memory.clone())?.next() else { break };
                pool.begin(chain, self.memory.clone());
            }
            if pool.under_way() == 0 {
                return Ok(!pool.pays());
            }
            for (head, written) in pool.next() {
                self.give_back(head, written?)?;
            }
            // The driver has long been waiting.
            self.announce()?;
        }
    }

    fn give_back(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.queue.add_used(&**self.memory, head, written)?;
        self.served += 1;
        self.untold += 1;
        if self.untold == BATCH { self.announce() } else { Ok(()) }
    }

    fn announce(&mut self) -> Result<(), Broken> {
        if std::mem::take(&mut self.untold) > 0 && self.queue.needs_notification(&**self.memory)? {
            (self.tell)();
        }
        Ok(())
    }
}
