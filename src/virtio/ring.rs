//! Takes descriptor chains off a queue in batches and gives them back (virtio 1.2, 2.7).
//!
//! It knows no kind of device: what a chain means is its caller's business.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

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

    /// As [`drain`], with the queue's own memory and interrupt.
    pub fn drain(
        &mut self,
        stop: &AtomicBool,
        serve: impl for<'m> FnMut(DescriptorChain<&'m Memory>, &'m Memory) -> Result<u32, Unanswerable>,
    ) -> Result<u64, Broken> {
        let Ring { index, queue, memory, interrupt } = self;
        drain(queue, memory, stop, serve, || interrupt.queue_used(*index))
    }
}

/// Hands every available chain of a queue to `serve`, which returns how many bytes it wrote, until
/// none are left or `stop` is set. Calls `tell` where the driver wants to hear of it. Returns how many
/// were served.
pub fn drain(
    queue: &mut Queue,
    memory: &Memory,
    stop: &AtomicBool,
    mut serve: impl for<'m> FnMut(DescriptorChain<&'m Memory>, &'m Memory) -> Result<u32, Unanswerable>,
    tell: impl Fn(),
) -> Result<u64, Broken> {
    let announce = |queue: &mut Queue| -> Result<(), Broken> {
        if queue.needs_notification(memory)? {
            tell();
        }
        Ok(())
    };
    let mut served = 0;
    loop {
        queue.disable_notification(memory)?;
        let mut pending = 0;
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            let written = serve(chain, memory)?;
            queue.add_used(memory, head, written)?;
            served += 1;
            pending += 1;
            if pending == BATCH {
                announce(queue)?;
                pending = 0;
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        if pending > 0 {
            announce(queue)?;
        }
        // Something may have come between the last look and the request to be told.
        if !queue.enable_notification(memory)? || stop.load(Ordering::Relaxed) {
            return Ok(served);
        }
    }
}
