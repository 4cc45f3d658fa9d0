//! Storages that remember, and storages that fail.

use std::collections::HashSet;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vdisk::internals::storage::{MemoryStorage, Storage};
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

/// Changes in the order in which they were made, each with the number of its file.
type Log = Arc<Mutex<Vec<(usize, Event)>>>;

/// Memory that keeps a log of all changes; several may keep one together.
#[derive(Default)]
pub struct Recorder {
    now: MemoryStorage,
    log: Log,
    file: usize,
}

impl Recorder {
    pub fn new(bytes: Vec<u8>) -> Recorder {
        Recorder { now: MemoryStorage::new(bytes), ..Recorder::default() }
    }

    /// Another file, whose changes come into the same log.
    pub fn beside(&self, bytes: Vec<u8>) -> Recorder {
        let now = MemoryStorage::new(bytes);
        Recorder { now, log: self.log.clone(), file: self.file + 1 }
    }

    /// The changes of all files, each with its file's number, from 0.
    pub fn log_of_all(&self) -> Vec<(usize, Event)> {
        self.log.lock().unwrap().clone()
    }

    /// The changes of this file, where it has the log for itself.
    pub fn log(&self) -> Vec<Event> {
        self.log_of_all().into_iter().map(|(_, event)| event).collect()
    }

    /// All bytes as they are now.
    pub fn bytes(&self) -> Vec<u8> {
        self.now.to_vec()
    }

    pub fn events(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    /// The change and its entry in the log are one step.
    fn note(&self, event: Event, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut log = self.log.lock().unwrap();
        change()?;
        log.push((self.file, event));
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

    fn is_fixed(&self) -> bool {
        self.now.is_fixed()
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

/// Shows what crashes may leave of a file that begins as `start`: after each event of the log all
/// that was done, and what was pending mixed up in two ways. With it, the number of events.
pub fn crash_points(
    start: &[u8],
    log: &[Event],
    dice: &mut Dice,
    mut see: impl FnMut(Vec<u8>, usize),
) {
    let mut settled = start.to_vec();
    let mut since = 0;
    for events in 0..=log.len() {
        let pending = &log[since..events];
        if let Some(Event::Sync) = pending.last() {
            pending.iter().for_each(|event| replay(&mut settled, event));
            since = events;
        }
        let pending = &log[since..events];
        let mut whole = settled.clone();
        pending.iter().for_each(|event| replay(&mut whole, event));
        see(whole, events);
        for _ in 0..if pending.is_empty() { 0 } else { 2 } {
            let mut file = settled.clone();
            crash(&mut file, pending, dice);
            see(file, events);
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
    /// The `n`th sync fails once.
    Sync,
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
        if self.fault == Fault::Sync || self.fault == Fault::Full && !changes {
            return Ok(());
        }
        self.count()
    }

    fn count(&self) -> Result<()> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let fail_at = self.fail_at.load(Ordering::Relaxed);
        match self.fault {
            Fault::Full if number >= fail_at => {
                Err(Error::io("could not be written", io::ErrorKind::StorageFull.into()))
            }
            Fault::Io | Fault::Sync if number == fail_at => {
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

    fn is_fixed(&self) -> bool {
        self.now.is_fixed()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.call(false)?;
        self.now.read_at(offset, bufs)
    }

    /// A write that fails has written a part: whole sectors of the medium.
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.call(true).inspect_err(|_| {
            let bytes: Vec<u8> = bufs.iter().flat_map(|b| b.to_vec()).collect();
            let end = (offset + bytes.len() as u64 / 2) / 512 * 512;
            let part = end.saturating_sub(offset) as usize;
            let _ = self.now.write_at(offset, &[IoSlice::new(&bytes[..part])]);
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
        if self.fault != Fault::Full {
            self.count()?;
        }
        self.now.sync()
    }
}
