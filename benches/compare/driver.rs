//! A small guest, without a virtual machine: a front end of vhost-user, and a driver of virtio-blk for each
//! queue, in memory that both ends share. The queues are split ones with event indices, and a thread waits for
//! interrupts as a guest's processor that has nothing else to do.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Writes last when they are flushed, as the drivers of systems have it: else a device makes each of them last,
/// or one that does not keep to that seems fast.
const FLUSH: u64 = 1 << 9;
/// Of a disk with several queues.
const MQ: u64 = 1 << 12;

/// Descriptors of a queue: three for each request.
const SIZE: u16 = 256;
/// Where a queue's parts are from the begin of its memory, and how much of that it has.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATES: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
const EACH: u64 = 16 << 20;

/// How long a request may take.
const PATIENCE_MS: i32 = 60_000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const SECTOR: u64 = 512;

/// What is asked of a disk.
#[derive(Clone, Copy)]
pub struct Job {
    pub write: bool,
    /// Bytes in each request.
    pub len: u32,
    /// Requests under way in each queue.
    pub depth: u16,
    /// Requests of all queues together.
    pub requests: u64,
    /// The disk's part that is read and written.
    pub size: u64,
    /// Whether one follows the other, or anywhere.
    pub random: bool,
}

/// A connection to a server of a disk.
pub struct Driver {
    _front_end: Frontend,
    queues: Vec<Queue>,
}

/// One queue.
struct Queue {
    memory: Arc<GuestMemoryMmap>,
    base: u64,
    kick: EventFd,
    call: EventFd,
    called: Epoll,
    available: u16,
    seen: u16,
}

impl Driver {
    /// Connects to the server at `socket`, once it is there, and sets up so many queues.
    pub fn connect(socket: &Path, queues: u16) -> Driver {
        let mut front_end = connected(socket, queues);
        front_end.set_owner().unwrap();
        let offered = front_end.get_features().unwrap();
        let wanted = EVENT_IDX | VERSION_1 | PROTOCOL_FEATURES | FLUSH | MQ;
        front_end.set_features(offered & wanted).unwrap();
        assert_eq!(offered & (VERSION_1 | EVENT_IDX), VERSION_1 | EVENT_IDX);
        let protocol = front_end.get_protocol_features().unwrap();
        front_end.set_protocol_features(protocol & VhostUserProtocolFeatures::MQ).unwrap();

        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        let len = EACH * u64::from(queues);
        file.set_len(len).unwrap();
        let file = Some(FileOffset::new(file, 0));
        let region = GuestRegionMmap::from_range(GuestAddress(0), len as usize, file).unwrap();
        let shared = VhostUserMemoryRegionInfo::from_guest_region(&region).unwrap();
        front_end.set_mem_table(&[shared]).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());

        let queues = (0..queues)
            .map(|index| {
                let queue = Queue::new(&memory, EACH * u64::from(index));
                queue.hand_over(&mut front_end, index, shared.userspace_addr);
                queue
            })
            .collect();
        Driver { _front_end: front_end, queues }
    }

    /// Has all requests of a job carried out, each queue's in a thread of its own; how long that takes, in
    /// seconds.
    pub fn run(&mut self, job: Job, seed: u64) -> f64 {
        let part = self.queues.len() as u64;
        let begun = Instant::now();
        thread::scope(|scope| {
            for (index, queue) in self.queues.iter_mut().enumerate() {
                let of_queue = Job { requests: job.requests / part, ..job };
                scope.spawn(move || queue.run(of_queue, seed + index as u64 * 7919));
            }
        });
        begun.elapsed().as_secs_f64()
    }
}

fn connected(socket: &Path, queues: u16) -> Frontend {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match Frontend::connect(socket, queues.into()) {
            Ok(front_end) => return front_end,
            Err(e) => assert!(Instant::now() < until, "nobody serves at {}: {e}", socket.display()),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

impl Queue {
    fn new(memory: &Arc<GuestMemoryMmap>, base: u64) -> Queue {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (kick, call) = (event(), event());
        let called = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        called.ctl(ControlOperation::Add, call.as_raw_fd(), event).unwrap();
        Queue { memory: Arc::clone(memory), base, kick, call, called, available: 0, seen: 0 }
    }

    fn hand_over(&self, front_end: &mut Frontend, index: u16, memory: u64) {
        let at = memory + self.base;
        let places = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: at + USED,
            avail_ring_addr: at + AVAIL,
            log_addr: None,
        };
        let index = usize::from(index);
        front_end.set_vring_num(index, SIZE).unwrap();
        front_end.set_vring_addr(index, &places).unwrap();
        front_end.set_vring_base(index, 0).unwrap();
        front_end.set_vring_call(index, &self.call).unwrap();
        front_end.set_vring_kick(index, &self.kick).unwrap();
        front_end.set_vring_enable(index, true).unwrap();
    }

    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.base).unchecked_add(offset)
    }

    fn load(&self, offset: u64) -> u16 {
        self.memory.load(self.at(offset), Ordering::Acquire).unwrap()
    }

    fn store(&self, offset: u64, value: u16) {
        self.memory.store(value, self.at(offset), Ordering::Release).unwrap();
    }

    /// The descriptors of the request in place `slot`, which stay as they are.
    fn describe(&self, slot: u16, job: Job) {
        let n = u64::from(slot);
        let (header, state) = (HEADERS + 16 * n, STATES + n);
        let data = DATA + u64::from(job.len) * n;
        let way = if job.write { 0 } else { WRITE };
        let parts = [(header, 16, NEXT), (data, job.len, NEXT | way), (state, 1, WRITE)];
        for (part, (offset, len, flags)) in (0u16..).zip(parts) {
            let number = 3 * slot + part;
            let at = self.at(16 * u64::from(number));
            self.memory.write_obj(self.at(offset).raw_value(), at).unwrap();
            self.memory.write_obj(len, at.unchecked_add(8)).unwrap();
            self.memory.write_obj(flags, at.unchecked_add(12)).unwrap();
            self.memory.write_obj(number + 1, at.unchecked_add(14)).unwrap();
        }
        self.memory.write_obj(u32::from(job.write), self.at(header)).unwrap();
    }

    fn submit(&mut self, slot: u16, offset: u64) {
        let n = u64::from(slot);
        self.memory.write_obj(offset / SECTOR, self.at(HEADERS + 16 * n + 8)).unwrap();
        self.memory.write_obj(0xeeu8, self.at(STATES + n)).unwrap();
        let entry = AVAIL + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(3 * slot, self.at(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
    }

    /// Makes what was submitted since `before` available (virtio 1.2, 2.7.13.4).
    fn publish(&self, before: u16) {
        self.store(AVAIL + 2, self.available);
        fence(Ordering::SeqCst);
        let event = self.load(USED + 4 + 8 * u64::from(SIZE));
        let passed = self.available.wrapping_sub(event).wrapping_sub(1);
        if passed < self.available.wrapping_sub(before) {
            self.kick.write(1).unwrap();
        }
    }

    /// Waits for an interrupt, unless something was used in the meantime.
    fn wait(&self) {
        self.store(AVAIL + 4 + 2 * u64::from(SIZE), self.seen);
        fence(Ordering::SeqCst);
        if self.load(USED + 2) != self.seen {
            return;
        }
        // A server may have made it one that does not wait.
        match self.called.wait(PATIENCE_MS, &mut [EpollEvent::default()]) {
            Ok(0) => panic!("no interrupt within {PATIENCE_MS} ms"),
            Err(e) if e.kind() != io::ErrorKind::Interrupted => panic!("no interrupt: {e}"),
            _ => {}
        }
        // Its count says nothing, and where it is read for a second time, it is not there.
        let _ = self.call.read();
    }

    fn run(&mut self, job: Job, seed: u64) {
        let blocks = job.size / u64::from(job.len);
        let mut state = seed | 1;
        let mut next = move || {
            let step = if job.random { 6_364_136_223_846_793_005 } else { 1 };
            state = state.wrapping_mul(step).wrapping_add(if job.random {
                1_442_695_040_888_963_407
            } else {
                1
            });
            let block = if job.random { state >> 33 } else { state };
            block % blocks * u64::from(job.len)
        };
        (0..job.depth).for_each(|slot| self.describe(slot, job));
        let (mut left, mut under_way) = (job.requests, 0);
        let mut free: Vec<u16> = (0..job.depth).collect();
        while left > 0 || under_way > 0 {
            let before = self.available;
            while left > 0
                && let Some(slot) = free.pop()
            {
                self.submit(slot, next());
                (left, under_way) = (left - 1, under_way + 1);
            }
            if self.available != before {
                self.publish(before);
            }
            while self.load(USED + 2) == self.seen {
                self.wait();
            }
            while self.load(USED + 2) != self.seen {
                let entry = USED + 4 + 8 * u64::from(self.seen % SIZE);
                let number: u32 = self.memory.read_obj(self.at(entry)).unwrap();
                let slot = number as u16 / 3;
                let status: u8 = self.memory.read_obj(self.at(STATES + u64::from(slot))).unwrap();
                assert_eq!(status, 0, "the server refuses a request");
                free.push(slot);
                self.seen = self.seen.wrapping_add(1);
                under_way -= 1;
            }
        }
    }
}
