//! Virtio devices (OASIS virtio 1.2), apart from the transports that carry them.
//!
//! A transport (MMIO in a guest of our own, vhost-user for others) owns registers, status and
//! notifications. A device owns its features, its configuration space and what its queues mean.
//! Nothing here knows a register, a process or a file.

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::error::Result;

mod block;
mod config;
mod execute;
#[cfg(test)]
mod hostile;
mod net;
mod pool;
mod request;
mod ring;
mod rng;
mod worker;

pub use block::Block;
pub use config::Id;
pub use net::{Frames, Link, MAX_FRAME, Mac, Net};
pub use pool::Pool;
pub use ring::{Broken, Turn};
pub use rng::Rng;

/// The memory of a guest, mapped into this process.
pub type Memory = GuestMemoryMmap<()>;

/// How a device tells its driver that something happened.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` have been used (virtio 2.9).
    fn queue_used(&self, index: u16);

    /// The device cannot go on until the driver resets it (virtio 2.1.2, DEVICE_NEEDS_RESET).
    fn needs_reset(&self);
}

/// One queue that the driver has set up.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// Its rings, valid in the guest's memory.
    pub queue: Queue,
    /// Signalled when the driver makes buffers available.
    pub kick: EventFd,
}

/// All a device needs to run, handed over when the driver sets DRIVER_OK.
pub struct Activation {
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// The feature bits that the driver accepted: a subset of those that were offered.
    pub features: u64,
    /// The queues that are ready.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A virtio device as its transport sees it.
pub trait VirtioDevice: Send {
    /// The device type (virtio 5).
    fn device_type(&self) -> u32;

    /// The feature bits on offer.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Fills `data` from the configuration space at `offset`; zeroes past its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes `data` to the configuration space at `offset`; what cannot be written stays.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Takes over into the configuration space what has changed since.
    fn refresh(&mut self) {}

    /// Starts to serve the queues.
    fn activate(&mut self, activation: Activation) -> Result<()>;

    /// Stops. When it returns, the device touches the guest's memory no more.
    fn reset(&mut self);
}
