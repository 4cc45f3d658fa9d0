//! virtio-blk (virtio 1.2, 5.2): a disk as a virtio device.
//!
//! It knows a flat disk and queues, not the transport and not what the disk is made of.

use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config::{self, CONFIG_LEN, QUEUE_SIZE};
use super::execute::Executor;
use super::worker::Worker;
use super::{Activation, VirtioDevice};
use crate::block::BlockDevice;
use crate::error::Result;

/// Length in bytes of what a disk answers to "get id".
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A disk's serial number as a guest reads it: at most 20 bytes, padded with zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id([u8; ID_BYTES]);

impl Id {
    /// The first 20 bytes of `text`.
    pub fn new(text: &str) -> Id {
        let mut bytes = [0; ID_BYTES];
        let len = text.len().min(ID_BYTES);
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        Id(bytes)
    }

    /// All 20 bytes.
    pub fn bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }
}

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
    workers: Vec<Worker>,
}

impl Block {
    /// A device for `disk` with this many queues, at least one.
    pub fn new(disk: Arc<dyn BlockDevice>, id: Id, queues: u16) -> Block {
        let queues = queues.max(1);
        let (features, space) = (config::features(&*disk, queues), config::space(&*disk, queues));
        Block { disk, id, queues, features, space, workers: Vec::new() }
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

    fn refresh(&mut self) {
        self.space = config::space(&*self.disk, self.queues);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        for active in queues {
            let executor = Executor::new(Arc::clone(&self.disk), self.id, features);
            let (memory, interrupt) = (Arc::clone(&memory), Arc::clone(&interrupt));
            self.workers.push(Worker::start(active, memory, executor, interrupt)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}
