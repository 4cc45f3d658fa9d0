//! virtio-rng (virtio 1.2, 5.4): random bytes from the host's kernel.
//!
//! It knows queues, not the transport.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryError};

use super::request::Unanswerable;
use super::ring::Serve;
use super::worker::Worker;
use super::{Activation, Memory, VirtioDevice};
use crate::error::Result;

const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request is given: a driver asks again.
const MOST: usize = 4096;

/// A source of random bytes.
#[derive(Default)]
pub struct Rng {
    workers: Vec<Worker>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let Activation { memory, queues, interrupt, .. } = activation;
        for active in queues {
            let (memory, interrupt) = (memory.clone(), interrupt.clone());
            self.workers.push(Worker::start("virtio-rng", active, memory, Filler, interrupt)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}

struct Filler;

impl Serve for Filler {
    fn serve<'m>(
        &mut self,
        chain: DescriptorChain<&'m Memory>,
        memory: &'m Memory,
    ) -> std::result::Result<u32, Unanswerable> {
        let mut written = 0;
        for descriptor in chain.writable() {
            let len = (descriptor.len() as usize).min(MOST - written);
            let mut bytes = [0; MOST];
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            getrandom::fill(bytes).map_err(|_| Unanswerable)?;
            let put = memory.write_slice(bytes, descriptor.addr());
            put.map_err(|_: GuestMemoryError| Unanswerable)?;
            written += len;
            if written == MOST {
                break;
            }
        }
        Ok(written as u32)
    }
}
