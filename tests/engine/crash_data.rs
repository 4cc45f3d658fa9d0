//! The power goes while an image has its data in another file: each of the two files may have any
//! part of what it was told since its last sync, whatever the other has.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex};

use vdisk::Result;
use vdisk::addr::Unit;
use vdisk::image::Backing;
use vdisk::qcow2::{self, CreateOptions, DataFile};
use vdisk::storage::{MemoryStorage, Storage};

use crate::crash::{Start, Story, disk, play, verify};
use crate::dice::{Budget, Confess, Dice, seed};
use crate::model::{Model, pattern};
use crate::recorder::{Event, crash, replay};

/// Changes of both files in the order in which they were made; `true` is the data file.
type Log = Arc<Mutex<Vec<(bool, Event)>>>;

/// One of the two files.
struct Side {
    now: MemoryStorage,
    log: Log,
    data: bool,
}

impl Side {
    fn note(&self, event: Event, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut log = self.log.lock().unwrap();
        change()?;
        log.push((self.data, event));
        Ok(())
    }
}

impl Storage for Side {
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

/// An image with its data elsewhere, and what the data file holds.
fn random_start(dice: &mut Dice) -> (Start, Vec<u8>) {
    let bits = dice.pick(&[9, 12, 14]);
    let (size, raw) = (128 << 10, dice.once_in(3));
    let with_base = !raw && dice.once_in(2);
    let backing = Backing { name: "base".to_owned(), format: Some("raw".to_owned()) };
    let data = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster: Unit::from_bits(bits),
        extended_l2: bits >= 14 && dice.once_in(2),
        backing: with_base.then_some(backing),
        data_file: Some(DataFile { name: "data".to_owned(), raw, storage: data.clone() }),
        ..CreateOptions::new(size)
    };
    let storage = Arc::new(MemoryStorage::default());
    drop(qcow2::create(storage.clone(), &options).unwrap());
    let mut model = Model::new(size);
    let base = with_base.then(|| pattern(0, size * 2 / 3, 99));
    if let Some(base) = &base {
        model.bytes[..base.len()].copy_from_slice(base);
    }
    let cache = dice.pick(&[0, 1 << 20]);
    let head = storage.to_vec();
    (Start { head, base, data: None, model, unit: 1 << bits, cache }, data.to_vec())
}

/// What a crash leaves of one of the files.
fn left(whole: &[u8], log: &[(bool, Event)], data: bool, dice: &mut Dice, all: bool) -> Vec<u8> {
    let own: Vec<Event> = log.iter().filter(|e| e.0 == data).map(|e| e.1.clone()).collect();
    let synced = own.iter().rposition(|e| matches!(e, Event::Sync)).map_or(0, |at| at + 1);
    let mut file = whole.to_vec();
    let settled = if all { own.len() } else { synced };
    own[..settled].iter().for_each(|event| replay(&mut file, event));
    crash(&mut file, &own[settled..], dice);
    file
}

fn crash_somewhere(
    start: &Start,
    data: &[u8],
    log: &[(bool, Event)],
    story: &Story,
    dice: &mut Dice,
) {
    for events in (0..=log.len()).filter(|n| n % 3 == 0 || *n == log.len()) {
        // Nothing of what is pending, or all of it, or any part: in one of the files, or in both.
        let (head_whole, data_whole) = (dice.once_in(3), dice.once_in(3));
        let head = left(&start.head, &log[..events], false, dice, head_whole);
        let data = left(data, &log[..events], true, dice, data_whole);
        let left = Start {
            head: Vec::new(),
            base: start.base.clone(),
            data: Some(Arc::new(MemoryStorage::new(data))),
            model: Model::default(),
            ..*start
        };
        verify(head, &left, story, events);
    }
}

#[test]
fn a_crash_between_tables_and_data_loses_nothing_that_was_flushed() {
    let seed = seed();
    let budget = Budget::new(6);
    let mut done = 0;
    while budget.goes_on(done) {
        let seed = if done == 0 { seed } else { seed.wrapping_add(done) };
        let _confess = Confess(seed);
        let mut dice = Dice::new(seed);
        let (mut start, data) = random_start(&mut dice);
        let log = Log::default();
        let side = |bytes: &[u8], data| {
            let now = MemoryStorage::new(bytes.to_vec());
            Arc::new(Side { now, log: log.clone(), data })
        };
        let head = side(&start.head, false);
        start.data = Some(side(&data, true));
        let chain = disk(head, &start, false).unwrap();
        let events = || log.lock().unwrap().len();
        let story = play(&chain, &events, &start, &mut dice, false);
        drop(chain);
        let log = log.lock().unwrap().clone();
        crash_somewhere(&start, &data, &log, &story, &mut dice);
        done += 1;
    }
    eprintln!("{done} rounds, VDISK_SEED={seed:#x}");
}
