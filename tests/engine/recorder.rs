//! Storages that remember, and storages that fail.

use std::collections::HashSet;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use vdisk::storage::{MemoryStorage, Storage};
use vdisk::{Error, Result};

use crate::dice::Dice;

/// One change of a storage.
#[derive(Debug, Clone)]
pub enum Event {
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    /// Zeroes, extending the length where `grow`.
    Zero {
        offset: u64,
        len: u64,
        grow: bool,
    },
    SetLen(u64),
    Sync,
}

/// Memory that keeps a log of all changes.
#[derive(Default)]
pub struct Recorder {
    now: MemoryStorage,
    log: Mutex<Vec<Event>>,
}

impl Recorder {
    pub fn new(bytes: Vec<u8>) -> Recorder {
        Recorder { now: MemoryStorage::new(bytes), log: Mutex::default() }
    }

    pub fn log(&self) -> Vec<Event> {
        self.log.lock().unwrap().clone()
    }

    pub fn events(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    /// The change and its entry in the log are one step.
    fn note(&self, event: Event, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut log = self.log.lock().unwrap();
        change()?;
        log.push(event);
        Ok(())
    }
}

impl Storage for Recorder {
    fn len(&self) -> Result<u64> {
        self.now.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.note(Event::SetLen(len), || self.now.set_len(len))
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.now.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let bytes = bufs.iter().flat_map(|b| b.to_vec()).collect();
        self.note(Event::Write { offset, bytes }, || self.now.write_at(offset, bufs))
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        let event = Event::Zero { offset, len, grow: false };
        self.note(event, || self.now.punch_hole(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let event = Event::Zero { offset, len, grow: true };
        self.note(event, || self.now.write_zeroes(offset, len))
    }

    fn sync(&self) -> Result<()> {
        self.note(Event::Sync, || Ok(()))
    }
}

/// Does `event` to the bytes of a file.
pub fn replay(file: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write { offset, bytes } => put(file, *offset as usize, bytes),
        Event::Zero { offset, len, grow } => {
            let (from, mut to) = (*offset as usize, (offset + len) as usize);
            if *grow && file.len() < to {
                file.resize(to, 0);
            }
            to = to.min(file.len());
            if from < to {
                file[from..to].fill(0);
            }
        }
        Event::SetLen(len) => file.resize(*len as usize, 0),
        Event::Sync => {}
    }
}

/// Writes to the bytes of a file, which grows where need be.
pub fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// What may be left of `pending`, the changes after the last barrier, when the power goes: every
/// sector as one of the changes left it, or as it was before all of them.
pub fn crash(file: &mut Vec<u8>, pending: &[Event], dice: &mut Dice) {
    let keep = dice.pick(&[0, 20, 50, 80, 97]);
    let torn_writes = dice.pick(&[0, 30, 100]);
    // A sector that missed a change misses those that came after it, too.
    let mut lost = HashSet::new();
    for event in pending {
        let torn = dice.below(100) < torn_writes;
        let whole = dice.below(100) < keep;
        for (at, piece) in sectors(event) {
            let kept = if torn { dice.below(100) < keep } else { whole };
            if !kept {
                lost.insert(at / 512);
            } else if !lost.contains(&(at / 512)) {
                replay(file, &piece);
            }
        }
    }
}

/// A change, sector of the medium by sector.
fn sectors(event: &Event) -> Vec<(u64, Event)> {
    let (offset, len) = match event {
        Event::Write { offset, bytes } => (*offset, bytes.len() as u64),
        Event::Zero { offset, len, .. } => (*offset, *len),
        Event::SetLen(_) | Event::Sync => return vec![(u64::MAX, event.clone())],
    };
    let mut found = Vec::new();
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let n = (512 - at % 512).min(len - done);
        let piece = match event {
            Event::Write { bytes, .. } => {
                let bytes = bytes[done as usize..(done + n) as usize].to_vec();
                Event::Write { offset: at, bytes }
            }
            Event::Zero { grow, .. } => Event::Zero { offset: at, len: n, grow: *grow },
            other => other.clone(),
        };
        found.push((at, piece));
        done += n;
    }
    found
}

/// Which calls of a [`Faulty`] storage count, and fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The `n`th change, and those after it while `lasting`, find no room.
    Full,
    /// The `n`th call of any kind fails once.
    Io,
}

/// Memory of which the `n`th call fails.
pub struct Faulty {
    pub now: Recorder,
    calls: AtomicU64,
    fail_at: AtomicU64,
    fault: Fault,
}

impl Faulty {
    pub fn new(bytes: Vec<u8>, fault: Fault) -> Faulty {
        let fail_at = AtomicU64::new(u64::MAX);
        Faulty { now: Recorder::new(bytes), calls: AtomicU64::new(0), fail_at, fault }
    }

    /// From now on, call number `n` (from 0) fails.
    pub fn arm(&self, n: u64) {
        self.calls.store(0, Ordering::Relaxed);
        self.fail_at.store(n, Ordering::Relaxed);
    }

    pub fn disarm(&self) {
        self.fail_at.store(u64::MAX, Ordering::Relaxed);
    }

    /// Whether the call that was to fail has been made.
    pub fn has_failed(&self) -> bool {
        self.calls.load(Ordering::Relaxed) > self.fail_at.load(Ordering::Relaxed)
    }

    fn call(&self, changes: bool) -> Result<()> {
        if self.fault == Fault::Full && !changes {
            return Ok(());
        }
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let fail_at = self.fail_at.load(Ordering::Relaxed);
        match self.fault {
            Fault::Full if number >= fail_at => {
                Err(Error::io("could not be written", io::ErrorKind::StorageFull.into()))
            }
            Fault::Io if number == fail_at => {
                Err(Error::io("failed", io::Error::from_raw_os_error(5)))
            }
            _ => Ok(()),
        }
    }
}

impl Storage for Faulty {
    fn len(&self) -> Result<u64> {
        self.now.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.call(true)?;
        self.now.set_len(len)
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.call(false)?;
        self.now.read_at(offset, bufs)
    }

    /// A write that fails has written a part.
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.call(true).inspect_err(|_| {
            let bytes: Vec<u8> = bufs.iter().flat_map(|b| b.to_vec()).collect();
            let _ = self.now.write_at(offset, &[IoSlice::new(&bytes[..bytes.len() / 2])]);
        })?;
        self.now.write_at(offset, bufs)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.call(true)?;
        self.now.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.call(true)?;
        self.now.write_zeroes(offset, len)
    }

    fn sync(&self) -> Result<()> {
        // A full disk still syncs.
        if self.fault == Fault::Io {
            self.call(true)?;
        }
        self.now.sync()
    }
}
