//! A guest that does to its devices whatever bytes say: registers in any order, rings and descriptors
//! that loop, overlap and lie, changed while several queues are at work. For a fuzz target and a seeded
//! test; the devices are the guest's own, over memory of a few pages, without KVM.

#[cfg(test)]
mod violations;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::block::{BlockDevice, BlockExtent, total, total_mut};
use crate::error::{Error, Result};
use crate::virtio::{Block, Frames, Id, Link, MAX_FRAME, Memory, Net, Rng, VirtioDevice};
use crate::vm::bus::BusDevice;
use crate::vm::mmio::Transport;

const MEMORY: u64 = 0x2_0000;
const DISK: u64 = 64 << 10;
/// Bytes of one step.
const STEP: usize = 12;
/// The most steps of one run.
const STEPS: usize = 4096;
/// How long devices may take to serve a request once they are left alone.
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk in memory.
struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn with<T>(&self, offset: u64, len: u64, work: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(len) as usize;
        let part = bytes.get_mut(offset as usize..end);
        part.map(work).ok_or_else(|| Error::invalid("past the end of the disk"))
    }
}

impl BlockDevice for Ram {
    fn size(&self) -> u64 {
        DISK
    }
    fn block_size(&self) -> u32 {
        4096
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.with(offset, total_mut(bufs), |from| {
            let mut from = from.iter();
            bufs.iter_mut()
                .flat_map(|buf| buf.iter_mut())
                .zip(&mut from)
                .for_each(|(to, from)| *to = *from);
        })
    }
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.with(offset, total(bufs), |to| {
            let from = bufs.iter().flat_map(|buf| buf.iter());
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        })
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<()> {
        self.with(offset, len, |to| to.fill(0))
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<BlockExtent>> {
        Ok(Vec::new())
    }
}

/// A network that gives back what it is sent.
struct Echo {
    near: UnixStream,
    far: UnixStream,
}

impl Link for Echo {
    fn fd(&self) -> BorrowedFd<'_> {
        self.near.as_fd()
    }
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        // As much as there is room for: a frame that is cut short is another hostile one.
        io::Write::write(&mut &self.far, frame).map(drop)
    }
}

impl Frames for Arc<Echo> {
    fn receive(&mut self, buffer: &mut [u8; MAX_FRAME]) -> io::Result<Option<usize>> {
        match io::Read::read(&mut &self.near, buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            read => read.map(Some),
        }
    }
}

/// Devices as a guest sees them.
struct Devices {
    memory: Arc<Memory>,
    all: Vec<Transport>,
}

impl Devices {
    fn new() -> Result<Devices> {
        let failed = |e| Error::io("cannot make devices", e);
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)])
            .map_err(|e| Error::invalid(e.to_string()))?;
        let memory = Arc::new(memory);
        let (near, far) = UnixStream::pair().map_err(failed)?;
        near.set_nonblocking(true).map_err(failed)?;
        far.set_nonblocking(true).map_err(failed)?;
        let echo = Arc::new(Echo { near, far });
        let disk = Arc::new(Ram(Mutex::new(vec![0x11; DISK as usize])));
        let devices: [Box<dyn VirtioDevice>; 3] = [
            Box::new(Block::new(disk, Id::new("ram"), 2)),
            Box::new(Rng::default()),
            Box::new(Net::new([2, 0, 0, 0, 0, 1], Arc::clone(&echo) as _, Box::new(echo))),
        ];
        let all: Result<Vec<_>> =
            devices.into_iter().map(|device| Transport::new(device, Arc::clone(&memory))).collect();
        Ok(Devices { memory, all: all? })
    }

    fn set(&self, device: usize, register: u64, value: u32) {
        if let Some(device) = self.all.get(device) {
            device.write(register, &value.to_le_bytes());
        }
    }

    fn get(&self, device: usize, register: u64) -> u32 {
        let mut value = [0; 4];
        if let Some(device) = self.all.get(device) {
            device.read(register, &mut value);
        }
        u32::from_le_bytes(value)
    }

    /// As a driver does it, with a queue's rings at `base`: descriptors, 0x400 on the available ones,
    /// 0x800 on the used ones.
    fn set_up(&self, device: usize, bases: &[u32]) {
        self.set(device, STATUS, 0);
        for (register, value) in [(STATUS, 1), (STATUS, 3), (FEATURES_SEL, 1), (FEATURES, 1)] {
            self.set(device, register, value);
        }
        self.set(device, STATUS, 11);
        for (queue, base) in bases.iter().enumerate() {
            let rings = [(DESCRIPTORS, *base), (AVAILABLE, base + 0x400), (USED, base + 0x800)];
            self.set(device, QUEUE_SEL, queue as u32);
            self.set(device, QUEUE_NUM, QUEUE);
            rings.into_iter().for_each(|(register, at)| self.set(device, register, at));
            self.set(device, QUEUE_READY, 1);
        }
        self.set(device, STATUS, 15);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        // A guest cannot write outside of its memory either.
        let _ = self.memory.write_slice(bytes, GuestAddress(at % MEMORY));
    }

    /// One step of a guest.
    fn step(&self, step: &[u8; STEP]) {
        let [kind, device, a, b, rest @ ..] = *step;
        let [v0, v1, v2, v3, w0, w1, w2, w3] = rest;
        let (value, other) =
            (u32::from_le_bytes([v0, v1, v2, v3]), u32::from_le_bytes([w0, w1, w2, w3]));
        let number = usize::from(device) % self.all.len().max(1);
        let Some(device) = self.all.get(number) else { return };
        let base = 0x1000 * (1 + u32::from(a % 4));
        match kind % 8 {
            0 => {
                let width = [1, 2, 4, 8][usize::from(b % 4)];
                let bytes = u64::from(value).to_le_bytes();
                device.write(
                    u64::from(a) * 4 + u64::from(b / 64),
                    bytes.get(..width).unwrap_or_default(),
                );
            }
            1 => device.read(u64::from(a) * 2, &mut [0; 8]),
            2 => self.put(other.into(), &value.to_le_bytes()),
            3 => self.set_up(number, &[base, base + 0x1000]),
            4 => {
                // A descriptor: its address and length near what is there, its flags and next any.
                let at = u64::from(base) + u64::from(b % 16) * 16;
                let mut bytes = u64::from(value % 0x3_0000).to_le_bytes().to_vec();
                bytes.extend((other & 0xffff).to_le_bytes());
                bytes.extend([w2 & 7, 0, w3 % 18, 0]);
                self.put(at, &bytes);
            }
            5 | 6 => {
                let at = u64::from(base) + 0x400;
                self.put(at + 4 + u64::from(b % 16) * 2, &[v0 % 18, 0]);
                self.put(at + 2, &u16::from_le_bytes([v1 % 32, v2 / 250]).to_le_bytes());
                for kick in device.kicks() {
                    // KVM signals it so.
                    let _ = kick.write(1);
                }
            }
            _ => {
                // A well-formed header of a block request, to get further than the first check.
                let mut bytes = u32::from(a % 16).to_le_bytes().to_vec();
                bytes.extend([0; 4]);
                bytes.extend(u64::from(value % 256).to_le_bytes());
                self.put(other.into(), &bytes);
            }
        }
    }

    /// Whether the disk still answers to a driver that behaves.
    fn answers(&self) -> bool {
        // Rings are empty before a device sees them, and nobody is at work in them after a reset.
        self.set(0, STATUS, 0);
        let end = Instant::now() + PATIENCE;
        while self.get(0, STATUS) != 0 && Instant::now() < end {
            std::thread::yield_now();
        }
        self.put(0x1400, &[0; 6]);
        self.put(0x1800, &[0; 6]);
        let header = [0u8; 16];
        self.put(0x5000, &header);
        self.put(0x6200, &[0xee]);
        for (number, (at, len, flags)) in
            [(0x5000u64, 16u32, 1u16), (0x6000, 512, 3), (0x6200, 1, 2)].into_iter().enumerate()
        {
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((number as u16 + 1).to_le_bytes());
            self.put(0x1000 + number as u64 * 16, &bytes);
        }
        self.set_up(0, &[0x1000]);
        self.put(0x1402, &1u16.to_le_bytes());
        if let Some(kick) = self.all.first().and_then(|device| device.kicks().first()) {
            let _ = kick.write(1);
        }
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if self.memory.read_obj::<u8>(GuestAddress(0x6200)).is_ok_and(|status| status == 0) {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }
}

const QUEUE: u32 = 16;
const FEATURES: u64 = 0x20;
const FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
const DESCRIPTORS: u64 = 0x80;
const AVAILABLE: u64 = 0x90;
const USED: u64 = 0xa0;

/// Does to fresh devices what `script` says, a second thread changing memory meanwhile, and then uses
/// the disk as a driver that behaves does.
///
/// # Errors
/// The disk does not answer any more. A panic is a finding, also one of a device's own thread: a debug
/// build hands it on.
pub fn drive(script: &[u8]) -> Result<()> {
    let devices = Devices::new()?;
    let (steps, _) = script.as_chunks::<STEP>();
    let half = steps.len().min(STEPS) / 2;
    std::thread::scope(|scope| {
        // What descriptors say changes while they are read.
        let scribbles = steps.get(half..).unwrap_or_default();
        scope.spawn(|| {
            for step in scribbles.iter().take(STEPS) {
                let [kind, rest @ ..] = *step;
                let mut step = [0; STEP];
                step[0] = if kind.is_multiple_of(2) { 2 } else { 4 };
                step[1..].copy_from_slice(&rest);
                devices.step(&step);
            }
        });
        steps.iter().take(half).for_each(|step| devices.step(step));
    });
    // Where their rings lie among each other is the guest's own fault: the others are stopped.
    (1..devices.all.len()).for_each(|device| devices.set(device, STATUS, 0));
    let answers = devices.answers();
    // Also a device that is at work stops.
    devices.all.iter().for_each(Transport::stop);
    match answers && devices.get(0, 0) == u32::from_le_bytes(*b"virt") {
        true => Ok(()),
        false => Err(Error::invalid("the disk does not answer any more")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngSeed, TestRunner};

    use super::*;

    /// As the neighbours' random tests: `VDISK_SEED=N` repeats a run.
    fn seed() -> u64 {
        let fresh = || {
            let mut bytes = [0; 8];
            getrandom::fill(&mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        match std::env::var("VDISK_SEED").as_deref() {
            Ok("fresh") => fresh(),
            Ok(number) => number.parse().unwrap(),
            Err(_) => 1,
        }
    }

    #[test]
    fn a_guest_that_does_anything_leaves_devices_that_work() {
        let seed = seed();
        eprintln!("VDISK_SEED={seed}");
        let config = Config { cases: 200, rng_seed: RngSeed::Fixed(seed), ..Config::default() };
        // Most steps set up, offer and describe: what registers alone do is soon seen.
        let kind = prop_oneof![
            1 => Just(0u8), 1 => Just(1), 1 => Just(2), 3 => Just(3), 6 => Just(4), 6 => Just(5), 2 => Just(7)
        ];
        let step = (kind, prop::array::uniform11(any::<u8>())).prop_map(|(kind, rest)| {
            let mut step = vec![kind];
            step.extend(rest);
            step
        });
        let script = prop::collection::vec(step, 1..400).prop_map(|steps| steps.concat());
        TestRunner::new(config)
            .run(&script, |script| drive(&script).map_err(|e| TestCaseError::fail(e.to_string())))
            .unwrap();
    }
}
