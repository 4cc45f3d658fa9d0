//! What a driver must not do, one thing at a time: the device refuses it, does nothing or asks to be reset, and
//! works after a reset; the others go on.
//!
//! These are virtio-villain's cases (<https://github.com/weltling/virtio-villain>) as far as they apply, with its
//! numbers: M of the MMIO transport, T of split queues, B, N and RNG of a disk, a network card and an entropy
//! source. Cases of a disk's requests (B0001 to B0099) are beside the requests' own code. What there is none of
//! here is left out: PCI, packed queues, administration queues, zones, secure erase, lifetimes (B0021, B0052, B0061,
//! B0062, B0065, B0074, B0090, Z), queues that are reset by themselves (M0023, M0024), shared memory but for that
//! there is none (M0025 to M0028), data with notifications (M0031, T0098), order (T0085), other devices.

use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::*;

const KNOWN: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

const MAGIC: u64 = 0;
const VERSION: u64 = 4;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const SHM_SEL: u64 = 0xac;
const SHM_LEN: u64 = 0xb0;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

const BLOCK: usize = 0;
const NET: usize = 2;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Where the rings of queues 0 and 1 are, and a table of further descriptors.
const BASES: [u32; 2] = [0x1000, 0x2000];
const FURTHER: u64 = 0x7000;
const DATA: u64 = 0x8000;

type Descriptor = (u64, u32, u16, u16);

impl Devices {
    /// Up to the features that were agreed on.
    fn agree(&self, low: u32) -> u32 {
        for (register, value) in [(STATUS, 0), (STATUS, KNOWN), (STATUS, KNOWN | DRIVER)] {
            self.set(BLOCK, register, value);
        }
        for (half, value) in [(0, low), (1, 1)] {
            self.set(BLOCK, FEATURES_SEL, half);
            self.set(BLOCK, FEATURES, value);
        }
        self.set(BLOCK, STATUS, KNOWN | DRIVER | FEATURES_OK);
        self.get(BLOCK, STATUS)
    }

    /// Says where queue 0 is, of so many descriptors; whether it is ready then.
    fn queue(&self, size: u32, [table, available, used]: [u32; 3]) -> u32 {
        let places = [(DESCRIPTORS, table), (AVAILABLE, available), (USED, used)];
        self.set(BLOCK, QUEUE_SEL, 0);
        self.set(BLOCK, QUEUE_NUM, size);
        places.into_iter().for_each(|(register, at)| self.set(BLOCK, register, at));
        self.set(BLOCK, QUEUE_READY, 1);
        self.get(BLOCK, QUEUE_READY)
    }

    fn descriptors(&self, at: u64, all: &[Descriptor]) {
        for (number, (address, len, flags, next)) in all.iter().enumerate() {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.put(at + number as u64 * 16, &bytes);
        }
    }

    /// Makes the chain that begins at `head` available on a queue, which says it has come to `index`.
    fn offer(&self, device: usize, queue: usize, (head, index): (u16, u16), all: &[Descriptor]) {
        let base = u64::from(BASES[queue]);
        self.descriptors(base, all);
        self.put(base + 0x404, &head.to_le_bytes());
        self.put(base + 0x402, &index.to_le_bytes());
        self.all[device].kicks()[queue].write(1).unwrap();
    }

    /// Waits until a queue was answered, or the device asks to be reset.
    fn reacts(&self, device: usize, queue: usize) -> bool {
        let (end, used) = (Instant::now() + PATIENCE, u64::from(BASES[queue]) + 0x802);
        while Instant::now() < end {
            let index: u16 = self.memory.read_obj(GuestAddress(used)).unwrap();
            if index != 0 || self.get(device, STATUS) & NEEDS_RESET != 0 {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }
}

type Case = (&'static str, fn(&Devices));

/// The transport's cases; each is handed fresh devices.
const REGISTERS: [Case; 16] = [
    ("M0001, M0002, M0018: registers of another width", |devices| {
        devices.all[BLOCK].write(STATUS, &[KNOWN as u8]);
        devices.all[BLOCK].write(STATUS, &u64::from(KNOWN).to_le_bytes());
        devices.all[BLOCK].write(STATUS + 1, &[1, 0, 0, 0]);
        assert_eq!(devices.get(BLOCK, STATUS), 0);
        let mut wide = [9; 8];
        devices.all[BLOCK].read(MAGIC, &mut wide);
        assert_eq!(wide, [0; 8]);
        devices.all[BLOCK].read(CONFIG, &mut wide);
        assert_eq!(u64::from_le_bytes(wide), 128, "sectors");
    }),
    ("M0003, M0008, M0009: what is not there, or is only read or written", |devices| {
        for register in (0..0x1000).step_by(4).filter(|at| ![STATUS, QUEUE_NOTIFY].contains(at)) {
            devices.set(BLOCK, register, u32::MAX);
            devices.get(BLOCK, register);
        }
        assert_eq!(devices.get(BLOCK, MAGIC), u32::from_le_bytes(*b"virt"));
        assert_eq!((devices.get(BLOCK, VERSION), devices.get(BLOCK, STATUS)), (2, 0));
        assert_eq!((devices.get(BLOCK, QUEUE_NOTIFY), devices.get(BLOCK, QUEUE_NUM)), (0, 0));
    }),
    ("M0004, M0019: a queue that does not exist", |devices| {
        devices.agree(0);
        for queue in [2, 1 << 16, u32::MAX] {
            devices.set(BLOCK, QUEUE_SEL, queue);
            devices.set(BLOCK, QUEUE_READY, 1);
            assert_eq!(
                (devices.get(BLOCK, QUEUE_NUM_MAX), devices.get(BLOCK, QUEUE_READY)),
                (0, 0)
            );
        }
    }),
    (
        "M0005, M0035, T0034: bits of the status that are not the driver's, or taken back",
        |devices| {
            devices.set(BLOCK, STATUS, 0xffff_ff00 | 0x30 | NEEDS_RESET | KNOWN);
            assert_eq!(devices.get(BLOCK, STATUS), KNOWN);
            devices.set(BLOCK, STATUS, DRIVER);
            assert_eq!(devices.get(BLOCK, STATUS), KNOWN | DRIVER);
        },
    ),
    ("M0011: halves of the features that there are none of", |devices| {
        devices.set(BLOCK, DEVICE_FEATURES_SEL, 2);
        assert_eq!(devices.get(BLOCK, DEVICE_FEATURES), 0);
        devices.set(BLOCK, FEATURES_SEL, u32::MAX);
        devices.set(BLOCK, FEATURES, u32::MAX);
        assert_eq!(devices.agree(0), KNOWN | DRIVER | FEATURES_OK);
    }),
    ("M0012, T0041, T0042, T0043: sizes that no queue has", |devices| {
        devices.agree(0);
        for size in [3, 0xffff, 1 << 16, u32::MAX] {
            // It keeps the size that it had.
            devices.queue(size, [0x1000, 0x1400, 0x1800]);
            devices.set(BLOCK, STATUS, 15);
            devices.agree(0);
        }
    }),
    ("M0013, T0049: a queue without places", |devices| {
        devices.agree(0);
        devices.set(BLOCK, QUEUE_READY, 1);
        devices.set(BLOCK, STATUS, 15);
        devices.all[BLOCK].kicks()[0].write(1).unwrap();
    }),
    ("M0014, M0021, M0029: ready once more, and not a truth", |devices| {
        devices.agree(0);
        assert_eq!(devices.queue(QUEUE, [0x1000, 0x1400, 0x1800]), 1);
        assert_eq!(devices.queue(QUEUE, [0xffff_f000; 3]), 1);
        devices.set(BLOCK, QUEUE_READY, 2);
        devices.set(BLOCK, QUEUE_SEL, 1);
        devices.set(BLOCK, QUEUE_READY, u32::MAX);
        assert_eq!(devices.get(BLOCK, QUEUE_READY), 0);
    }),
    ("M0015, T0036: a queue that is moved while it is at work", |devices| {
        devices.set_up(BLOCK, &BASES);
        assert_eq!(devices.queue(QUEUE, [0x9000, 0x9400, 0x9800]), 1);
        let all =
            [(DATA, 16, NEXT, 1), (DATA + 16, 512, NEXT | WRITE, 2), (DATA + 600, 1, WRITE, 0)];
        devices.offer(BLOCK, 0, (0, 1), &all);
        assert!(devices.reacts(BLOCK, 0), "it is where it was");
    }),
    ("M0007, M0020: interrupts that are not, or partly, acknowledged", |devices| {
        devices.all[BLOCK].reconfigure();
        assert_eq!(devices.get(BLOCK, INTERRUPT_STATUS), 0, "nobody drives it");
        devices.set_up(BLOCK, &BASES);
        (0..100).for_each(|_| devices.all[BLOCK].reconfigure());
        devices.set(BLOCK, INTERRUPT_ACK, 0xffff_fffc | 1);
        assert_eq!(devices.get(BLOCK, INTERRUPT_STATUS), 2);
        devices.set(BLOCK, INTERRUPT_ACK, 2);
        assert_eq!(devices.get(BLOCK, INTERRUPT_STATUS), 0);
    }),
    ("M0016: the generation of a configuration that did not change", |devices| {
        let before = devices.get(BLOCK, CONFIG_GENERATION);
        devices.set(BLOCK, CONFIG_GENERATION, before + 1);
        assert_eq!(devices.get(BLOCK, CONFIG_GENERATION), before);
        devices.all[BLOCK].reconfigure();
        assert_ne!(devices.get(BLOCK, CONFIG_GENERATION), before);
    }),
    ("M0025 to M0028: shared memory, of which there is none", |devices| {
        for region in [0, 1, 255, u32::MAX] {
            devices.set(BLOCK, SHM_SEL, region);
            devices.set(BLOCK, SHM_LEN, 4096);
            let said: Vec<_> = (0..4).map(|n| devices.get(BLOCK, SHM_LEN + 4 * n)).collect();
            assert_eq!(said, [u32::MAX; 4]);
        }
    }),
    ("M0030, T0044 to T0048: rings that are askew, nowhere, or on top of each other", |devices| {
        for places in [[0x1001, 0x1400, 0x1800], [0x1000, 0x1401, 0x1800], [0x1000, 0x1400, 0x1802]]
        {
            devices.agree(0);
            devices.queue(QUEUE, places);
            devices.set(BLOCK, STATUS, 15);
        }
        for places in
            [[0x1_fff0, 0x1400, 0x1800], [0x1000, 0x2_0000, 0x1800], [0x1000, 0x1400, 0xffff_fffc]]
        {
            devices.agree(0);
            assert_eq!(devices.queue(QUEUE, places), 0, "{places:x?}");
        }
        devices.agree(0);
        // That one is the guest's own loss.
        assert_eq!(devices.queue(QUEUE, [0x1000; 3]), 1);
        devices.set(BLOCK, STATUS, 15);
        devices.all[BLOCK].kicks()[0].write(1).unwrap();
    }),
    (
        "T0030 to T0032, T0060, T0068: kicks before it works, after it did, and for nothing",
        |devices| {
            let kick = || {
                (0..3).for_each(|queue| devices.set(BLOCK, QUEUE_NOTIFY, queue));
                devices.all.iter().flat_map(|d| d.kicks()).for_each(|kick| kick.write(1).unwrap());
            };
            kick();
            devices.agree(0);
            kick();
            devices.set_up(BLOCK, &BASES);
            kick();
            devices.set(BLOCK, STATUS, 0);
            kick();
        },
    ),
    ("T0037 to T0040, T0079: features that were not offered, or come late", |devices| {
        assert_eq!(devices.agree(u32::MAX), KNOWN | DRIVER);
        assert_eq!(devices.agree(0), KNOWN | DRIVER | FEATURES_OK);
        devices.set(BLOCK, FEATURES_SEL, 0);
        devices.set(BLOCK, FEATURES, u32::MAX);
        devices.set(BLOCK, STATUS, 15);
        assert_eq!(devices.get(BLOCK, STATUS), 15, "what was agreed on counts");
        devices.set(BLOCK, STATUS, 0);
        devices.set(BLOCK, STATUS, KNOWN | DRIVER | DRIVER_OK);
        assert_eq!(devices.get(BLOCK, STATUS) & DRIVER_OK, 0);
    }),
    ("T0033, T0035: at work twice, and a driver that has given up", |devices| {
        devices.set_up(BLOCK, &BASES);
        devices.set(BLOCK, STATUS, 15);
        devices.set(BLOCK, STATUS, 15 | FAILED);
        devices.all[BLOCK].kicks()[0].write(1).unwrap();
        assert_eq!(devices.get(BLOCK, STATUS), 15 | FAILED);
    }),
];

/// Chains that lie, with where they begin and how far the queue says it has come.
fn chains() -> Vec<(&'static str, (u16, u16), Vec<Descriptor>)> {
    let one = |name, descriptor: Descriptor| (name, (0, 1), vec![descriptor]);
    vec![
        one("T0001, RNG0006: a loop", (DATA, 16, NEXT | WRITE, 0)),
        one("T0003, RNG0007: a next one that is none", (DATA, 16, NEXT | WRITE, 16)),
        one("T0004, T0061: nothing at all", (0, 0, 0, 0)),
        one("T0005, RNG0029: behind all memory", (0x2_0000, 16, WRITE, 0)),
        one("T0006, RNG0002: no length", (DATA, 0, WRITE, 0)),
        one("T0007, RNG0004: a length past all memory", (DATA, u32::MAX, WRITE, 0)),
        one("T0008, RNG0030: an address that wraps", (u64::MAX - 7, 16, WRITE, 0)),
        one("T0009, RNG0003: only to be read", (DATA, 16, 0, 0)),
        one("T0010, N: only to be written", (DATA, 16, WRITE, 0)),
        one("T0063: a device's own registers", (0xd000_0000, 16, WRITE, 0)),
        one("T0070: its own queue", (0x1000, 0x1000, WRITE, 0)),
        one("T0073: past the end of memory", (0x1_fff8, 16, WRITE, 0)),
        one("T0016: a table in a table", (FURTHER, 16, INDIRECT, 0)),
        one("T0018, RNG0011: a table of an odd length", (FURTHER, 17, INDIRECT, 0)),
        one("T0019, T0072, RNG0010: a table of none", (FURTHER, 0, INDIRECT, 0)),
        one("T0020: a table behind all memory", (0x2_0000, 16, INDIRECT, 0)),
        one("T0067, T0089, RNG0013: every flag", (FURTHER, 32, 7, 0)),
        one("T0099, RNG0033: a table of the largest length", (FURTHER, 0xffff_fff0, INDIRECT, 0)),
        one("T0082: every bit", (u64::MAX, u32::MAX, u16::MAX, u16::MAX)),
        (
            "T0017, T0059: a table and a next one",
            (0, 1),
            vec![(FURTHER, 16, INDIRECT | NEXT, 1), (DATA, 16, WRITE, 0)],
        ),
        ("T0025, T0084: a head that is none", (0xffff, 1), vec![(DATA, 16, WRITE, 0)]),
        ("T0023: more than the queue has", (0, 17), vec![(DATA, 16, WRITE, 0)]),
        ("T0024, T0057: backwards", (0, 0xffff), vec![(DATA, 16, WRITE, 0)]),
        ("T0002, T0054, RNG0014: longer than the queue", (0, 1), {
            (0..16).map(|n| (DATA, 16, NEXT | WRITE, (n + 1) % 16)).collect()
        }),
        ("T0077: more than fits into a number", (0, 1), {
            (0..16).map(|n| (DATA, u32::MAX, WRITE | (NEXT * u16::from(n < 15)), n + 1)).collect()
        }),
    ]
}

#[test]
fn what_a_driver_must_not_do_to_registers_leaves_devices_that_work() {
    for (name, case) in REGISTERS {
        let devices = Devices::new().unwrap();
        eprintln!("{name}");
        case(&devices);
        assert!(devices.answers(), "{name}");
        devices.all.iter().for_each(|device| device.stop());
    }
}

#[test]
fn a_chain_that_lies_is_answered_or_stops_its_device_alone() {
    for (name, head, chain) in chains() {
        let devices = Devices::new().unwrap();
        // A table for those that name one: nested, and round in a circle.
        devices.descriptors(FURTHER, &[(FURTHER, 16, INDIRECT, 0), (DATA, 16, NEXT | WRITE, 1)]);
        for device in [1, NET] {
            let queue = usize::from(device == NET);
            devices.set_up(device, &BASES[..=queue]);
            devices.offer(device, queue, head, &chain);
            assert!(devices.reacts(device, queue), "{name}: device {device}");
            devices.set(device, STATUS, 0);
            (0..2).for_each(|queue| devices.put(u64::from(BASES[queue]) + 0x400, &[0; 0x600]));
        }
        // A frame comes back to a buffer that lies.
        devices.set_up(NET, &BASES);
        devices.offer(NET, 0, head, &chain);
        devices.offer(NET, 1, (0, 1), &[(0x9000, 100, 0, 0)]);
        assert!(devices.reacts(NET, 0), "{name}: a frame");
        devices.set(NET, STATUS, 0);
        devices.put(u64::from(BASES[0]) + 0x400, &[0; 0x600]);
        devices.set_up(BLOCK, &BASES);
        devices.offer(BLOCK, 0, head, &chain);
        assert!(devices.reacts(BLOCK, 0), "{name}: the disk");
        assert!(devices.answers(), "{name}");
        devices.all.iter().for_each(|device| device.stop());
    }
}
