//! The MMIO transport (virtio 1.2, 4.2): registers, status and notifications of one device.
//!
//! It carries any [`VirtioDevice`] and knows no disk. What the guest writes here is checked here:
//! a driver that breaks the order of initialisation is ignored, or told to reset.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::bus::BusDevice;
use crate::error::{Error, Result};
use crate::virtio::{Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};

/// Size in bytes of a device's registers and configuration space.
pub const LEN: u64 = 0x1000;
/// Offset of the register that tells of new buffers.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"VDSK");
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// What a new status bit brings about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    Negotiate,
    Activate,
}

/// The order of initialisation (virtio 3.1.1): (status so far, the bit that may follow, effect).
const STEPS: [(u32, u32, Step); 4] = {
    const KNOWN: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
    const DRIVEN: u32 = KNOWN | VIRTIO_CONFIG_S_DRIVER;
    const AGREED: u32 = DRIVEN | VIRTIO_CONFIG_S_FEATURES_OK;
    [
        (0, VIRTIO_CONFIG_S_ACKNOWLEDGE, Step::Nothing),
        (KNOWN, VIRTIO_CONFIG_S_DRIVER, Step::Nothing),
        (DRIVEN, VIRTIO_CONFIG_S_FEATURES_OK, Step::Negotiate),
        (AGREED, VIRTIO_CONFIG_S_DRIVER_OK, Step::Activate),
    ]
};

/// The device's line to the guest's interrupt controller.
struct Line {
    pending: AtomicU32,
    needs_reset: AtomicBool,
    irq: EventFd,
}

impl Line {
    fn raise(&self, reason: u32) {
        self.pending.fetch_or(reason, Ordering::SeqCst);
        // A full counter means that the interrupt is on its way already.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for Line {
    fn queue_used(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}

/// One device with its registers.
pub struct Transport {
    memory: Arc<Memory>,
    line: Arc<Line>,
    kicks: Vec<EventFd>,
    offered: u64,
    state: Mutex<State>,
}

struct State {
    device: Box<dyn VirtioDevice>,
    status: u32,
    /// Features that the driver accepts, so far.
    accepted: u64,
    offered_half: u32,
    accepted_half: u32,
    queues: Vec<Queue>,
    selected: u32,
    /// Changes with the configuration space, so that a driver notices that it has read parts of two
    /// (virtio 2.5.1).
    generation: u32,
}

impl Transport {
    /// The transport of `device` in a guest with this memory.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<Memory>) -> Result<Transport> {
        let event = || EventFd::new(EFD_CLOEXEC).map_err(|e| Error::io("cannot make an event", e));
        let queues = device
            .queue_sizes()
            .into_iter()
            .map(|size| Queue::new(size).map_err(|e| Error::invalid(e.to_string())))
            .collect::<Result<Vec<_>>>()?;
        let kicks = queues.iter().map(|_| event()).collect::<Result<Vec<_>>>()?;
        let line =
            Line { pending: AtomicU32::new(0), needs_reset: AtomicBool::new(false), irq: event()? };
        let offered = device.features() | 1 << VIRTIO_F_VERSION_1;
        let state = State {
            device,
            status: 0,
            accepted: 0,
            offered_half: 0,
            accepted_half: 0,
            queues,
            selected: 0,
            generation: 0,
        };
        Ok(Transport { memory, line: Arc::new(line), kicks, offered, state: Mutex::new(state) })
    }

    /// To be signalled when the guest writes a queue's number to [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Signalled when the guest's interrupt is to be raised.
    pub fn irq(&self) -> &EventFd {
        &self.line.irq
    }

    /// Tells the driver that the device's configuration space has changed.
    pub fn reconfigure(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.device.refresh();
        state.generation = state.generation.wrapping_add(1);
        // Before the driver has seen the device there is nothing to tell (virtio 2.1.2).
        if state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.line.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// Stops the device. When it returns, the device touches the guest's memory no more.
    pub fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.device.reset();
    }

    fn status(&self, state: &State) -> u32 {
        match self.line.needs_reset.load(Ordering::SeqCst) {
            true => state.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            false => state.status,
        }
    }

    fn register(&self, state: &State, offset: u64) -> u32 {
        let queue = state.queues.get(state.selected as usize);
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => state.device.device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, state.offered_half),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |q| q.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |q| q.ready().into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.line.pending.load(Ordering::SeqCst),
            VIRTIO_MMIO_STATUS => self.status(state),
            // There is no shared memory: all ones for its length and its base (virtio 4.2.2.1).
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => state.generation,
            _ => 0,
        }
    }

    fn set_register(&self, state: &mut State, offset: u64, value: u32) {
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => state.offered_half = value,
            VIRTIO_MMIO_DRIVER_FEATURES => state.accept(value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => state.accepted_half = value,
            VIRTIO_MMIO_QUEUE_SEL => state.selected = value,
            // Reached only where KVM does not signal the kick itself.
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.line.pending.fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => self.set_status(state, value),
            VIRTIO_MMIO_QUEUE_READY => self.set_ready(state, value),
            register => state.set_queue(register, value),
        }
    }

    fn notify(&self, queue: u32) {
        if let Some(kick) = self.kicks.get(queue as usize) {
            // A full counter means that the worker has been told already.
            let _ = kick.write(1);
        }
    }

    fn set_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            return self.reset(state);
        }
        state.status |= value & VIRTIO_CONFIG_S_FAILED;
        if state.status & VIRTIO_CONFIG_S_FAILED != 0 {
            return;
        }
        for (before, bit, step) in STEPS {
            if value & bit == 0 || state.status != before {
                continue;
            }
            match step {
                Step::Nothing => state.status |= bit,
                // The driver reads the status back and finds the bit missing (virtio 3.1.1).
                Step::Negotiate if !self.agreed(state) => {}
                Step::Negotiate => state.status |= bit,
                Step::Activate => {
                    state.status |= bit;
                    if self.activate(state).is_err() {
                        self.line.needs_reset();
                    }
                }
            }
        }
    }

    /// Only what was offered, and no legacy driver (virtio 6.1).
    fn agreed(&self, state: &State) -> bool {
        state.accepted & !self.offered == 0 && state.accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn reset(&self, state: &mut State) {
        state.device.reset();
        state.queues.iter_mut().for_each(Queue::reset);
        state.status = 0;
        state.accepted = 0;
        (state.offered_half, state.accepted_half, state.selected) = (0, 0, 0);
        self.line.needs_reset.store(false, Ordering::SeqCst);
        self.line.pending.store(0, Ordering::SeqCst);
    }

    /// A queue becomes ready only with rings that lie in guest memory; else the driver reads 0 back.
    fn set_ready(&self, state: &mut State, value: u32) {
        let memory = &self.memory;
        if let Some(queue) = state.configurable(value == 0) {
            queue.set_ready(value == 1);
            if value == 1 && !queue.is_valid(&**memory) {
                queue.set_ready(false);
            }
        }
    }

    fn activate(&self, state: &mut State) -> Result<()> {
        let event_idx = state.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (index, (queue, kick)) in state.queues.iter_mut().zip(&self.kicks).enumerate() {
            if !queue.ready() {
                continue;
            }
            queue.set_event_idx(event_idx);
            let working = Queue::try_from(queue.state())
                .map_err(|e| Error::invalid(format!("a queue cannot work: {e}")))?;
            let kick =
                kick.try_clone().map_err(|e| Error::io("cannot hand an event to a device", e))?;
            queues.push(ActiveQueue { index: index as u16, queue: working, kick });
        }
        state.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            features: state.accepted,
            queues,
            interrupt: Arc::clone(&self.line) as Arc<dyn Interrupt>,
        })
    }
}

impl State {
    /// Features are fixed once agreed on.
    fn accept(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 && self.accepted_half < 2 {
            let shift = self.accepted_half * 32;
            self.accepted &= !(u64::from(u32::MAX) << shift);
            self.accepted |= u64::from(value) << shift;
        }
    }

    /// The selected queue while it may be changed: before the device runs, and not once it is ready
    /// unless to make it unready.
    fn configurable(&mut self, even_ready: bool) -> Option<&mut Queue> {
        let running = self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED) != 0;
        let agreed = self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let queue = self.queues.get_mut(self.selected as usize)?;
        (agreed && !running && (even_ready || !queue.ready())).then_some(queue)
    }

    fn set_queue(&mut self, register: u32, value: u32) {
        let Some(queue) = self.configurable(false) else { return };
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

/// One half of a set of 64 feature bits.
fn half(features: u64, which: u32) -> u32 {
    match which {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl BusDevice for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if offset >= CONFIG {
            state.device.read_config(offset - CONFIG, data);
            return;
        }
        // Registers are 32 bits wide (virtio 4.2.2.2).
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(register) => *register = self.register(&state, offset).to_le_bytes(),
            Err(_) => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if offset >= CONFIG {
            state.device.write_config(offset - CONFIG, data);
        } else if let Ok(register) = <[u8; 4]>::try_from(data) {
            self.set_register(&mut state, offset, u32::from_le_bytes(register));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    /// Counts what its transport does to it.
    struct Probe(Arc<Mutex<(usize, usize)>>);

    impl VirtioDevice for Probe {
        fn device_type(&self) -> u32 {
            42
        }
        fn features(&self) -> u64 {
            1 << 5
        }
        fn queue_sizes(&self) -> Vec<u16> {
            vec![16, 16]
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn activate(&mut self, activation: Activation) -> Result<()> {
            self.0.lock().unwrap().0 += activation.queues.len();
            Ok(())
        }
        fn reset(&mut self) {
            self.0.lock().unwrap().1 += 1;
        }
    }

    struct Driver {
        transport: Transport,
        seen: Arc<Mutex<(usize, usize)>>,
    }

    impl Driver {
        fn new() -> Driver {
            let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            let seen = Arc::default();
            let probe = Box::new(Probe(Arc::clone(&seen)));
            Driver { transport: Transport::new(probe, Arc::new(memory)).unwrap(), seen }
        }

        fn get(&self, register: u32) -> u32 {
            let mut data = [0; 4];
            self.transport.read(register.into(), &mut data);
            u32::from_le_bytes(data)
        }

        fn set(&self, register: u32, value: u32) {
            self.transport.write(register.into(), &value.to_le_bytes());
        }

        fn agree(&self, low: u32, high: u32) -> u32 {
            self.set(VIRTIO_MMIO_STATUS, 0);
            self.set(VIRTIO_MMIO_STATUS, 1);
            self.set(VIRTIO_MMIO_STATUS, 3);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, low);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, high);
            self.set(VIRTIO_MMIO_STATUS, 11);
            self.get(VIRTIO_MMIO_STATUS)
        }

        fn ready(&self, queue: u32, used: u32) -> u32 {
            self.set(VIRTIO_MMIO_QUEUE_SEL, queue);
            self.set(VIRTIO_MMIO_QUEUE_NUM, 8);
            self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
            self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
            self.set(VIRTIO_MMIO_QUEUE_USED_LOW, used);
            self.set(VIRTIO_MMIO_QUEUE_READY, 1);
            self.get(VIRTIO_MMIO_QUEUE_READY)
        }
    }

    #[test]
    fn a_device_starts_only_by_the_order_of_initialisation() {
        let driver = Driver::new();
        for status in [2, 4, 8, 14] {
            driver.set(VIRTIO_MMIO_STATUS, status);
            assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
        }
        assert_eq!(driver.agree(0, 0), 3, "a legacy driver");
        assert_eq!(driver.agree(1 << 6, 1), 3, "a feature that was not offered");
        assert_eq!(driver.agree(1 << 5, 1), 11);
        assert_eq!(driver.seen.lock().unwrap().0, 0);
        assert_eq!(driver.ready(1, 0x3000), 1);
        driver.set(VIRTIO_MMIO_STATUS, 15);
        assert_eq!((driver.get(VIRTIO_MMIO_STATUS), driver.seen.lock().unwrap().0), (15, 1));
        let resets = driver.seen.lock().unwrap().1;
        driver.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
        assert_eq!(driver.seen.lock().unwrap().1, resets + 1);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }

    #[test]
    fn a_queue_outside_of_memory_never_becomes_ready() {
        let driver = Driver::new();
        assert_eq!(driver.ready(0, 0x3000), 0, "before features were agreed on");
        assert_eq!(driver.agree(0, 1), 11);
        for used in [0xfff0, 0x10000, 0xffff_fff0] {
            assert_eq!(driver.ready(0, used), 0, "used ring at {used:#x}");
        }
        assert_eq!(driver.ready(0, 0x3000), 1);
        // It is fixed from then on.
        assert_eq!(driver.ready(0, 0x10000), 1);
        assert_eq!(driver.ready(7, 0x3000), 0, "a queue that does not exist");
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    }

    #[test]
    fn registers_say_what_the_device_is() {
        let driver = Driver::new();
        assert_eq!(driver.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(driver.get(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_ID), 42);
        assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 1 << 5);
        driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 1);
        driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
        assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
        assert_eq!(driver.get(VIRTIO_MMIO_CONFIG + 8), 0x0808_0808);
        let mut narrow = [9; 2];
        driver.transport.read(0, &mut narrow);
        assert_eq!(narrow, [0, 0]);
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        assert_eq!(driver.transport.kicks()[1].read().unwrap(), 1);
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 99);
    }

    #[test]
    fn an_interrupt_is_pending_until_it_is_acknowledged() {
        let driver = Driver::new();
        driver.transport.line.queue_used(0);
        driver.transport.line.needs_reset();
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
        driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), VIRTIO_CONFIG_S_NEEDS_RESET);
        driver.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
    }
}
