//! virtio-blk (virtio 1.2, 5.2): a disk as a virtio device.
//!
//! It knows a flat disk and queues, not the transport and not what the disk is made of.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config::{self, CONFIG_LEN, Id, QUEUE_SIZE, WRITEBACK};
use super::execute::Executor;
use super::pool::Pool;
use super::worker::Worker;
use super::{Activation, VirtioDevice};
use crate::block::BlockDevice;
use crate::error::Result;

/// A block device with one worker thread for each queue.
///
/// Its configuration space stays as it was when the device was made, or last
/// [refreshed](VirtioDevice::refresh): then a disk that has grown is seen at its new size.
pub struct Block {
    disk: Arc<dyn BlockDevice>,
    id: Id,
    queues: u16,
    features: u64,
    space: [u8; CONFIG_LEN],
    /// Whether the driver flushes what it writes: else each write is durable when it completes.
    writeback: Arc<AtomicBool>,
    workers: Vec<Worker>,
}

impl Block {
    /// A device for `disk` with this many queues, at least one.
    pub fn new(disk: Arc<dyn BlockDevice>, id: Id, queues: u16) -> Block {
        let queues = queues.max(1);
        let (features, space) = (config::features(&*disk, queues), config::space(&*disk, queues));
        let writeback = Arc::new(AtomicBool::new(true));
        Block { disk, id, queues, features, space, writeback, workers: Vec::new() }
    }

    /// Serves requests as this device does, for a driver that accepted `features`.
    pub fn executor(&self, features: u64) -> Executor {
        Executor::new(Arc::clone(&self.disk), self.id, features, Arc::clone(&self.writeback))
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only the cache mode can be written, and only with a byte (virtio 5.2.5, 4.2.2.2).
        if let (true, [mode]) = (offset == WRITEBACK as u64, data)
            && !self.disk.read_only()
        {
            self.writeback.store(*mode != 0, Ordering::Release);
            self.space[WRITEBACK] = u8::from(*mode != 0);
        }
    }

    fn refresh(&mut self) {
        self.space = config::space(&*self.disk, self.queues);
        self.space[WRITEBACK] = self.writeback.load(Ordering::Acquire).into();
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        for active in queues {
            let requests = Pool::new(self.executor(features));
            let (memory, interrupt) = (Arc::clone(&memory), Arc::clone(&interrupt));
            let name = "virtio-blk";
            self.workers.push(Worker::start(name, active, memory, requests, interrupt)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
        // A driver that knows nothing of the cache mode is to find the usual one.
        self.writeback.store(true, Ordering::Release);
        self.space[WRITEBACK] = 1;
    }
}
