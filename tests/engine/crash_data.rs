//! The power goes while an image has its data in another file: each of the two files may have any
//! part of what it was told since its last sync, whatever the other has.

use std::sync::Arc;

use vdisk::internals::addr::Unit;
use vdisk::internals::image::Backing;
use vdisk::internals::qcow2::{self, CreateOptions, DataFile};
use vdisk::internals::storage::MemoryStorage;

use crate::crash::{Start, Story, disk, play, verify};
use crate::dice::{Dice, rounds};
use crate::model::{Model, pattern};
use crate::recorder::{Event, Recorder, crash, replay};

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
fn left(
    whole: &[u8],
    log: &[(usize, Event)],
    number: usize,
    dice: &mut Dice,
    all: bool,
) -> Vec<u8> {
    let own: Vec<Event> = log.iter().filter(|e| e.0 == number).map(|e| e.1.clone()).collect();
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
    log: &[(usize, Event)],
    story: &Story,
    dice: &mut Dice,
) {
    for events in (0..=log.len()).filter(|n| n % 3 == 0 || *n == log.len()) {
        // Nothing of what is pending, or all of it, or any part: in one of the files, or in both.
        let (head_whole, data_whole) = (dice.once_in(3), dice.once_in(3));
        let head = left(&start.head, &log[..events], 0, dice, head_whole);
        let data = left(data, &log[..events], 1, dice, data_whole);
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
    rounds(6, |dice| {
        let (mut start, data) = random_start(dice);
        let head = Arc::new(Recorder::new(start.head.clone()));
        start.data = Some(Arc::new(head.beside(data.clone())));
        let chain = disk(head.clone(), &start, false).unwrap();
        let story = play(&chain, &|| head.events(), &start, dice, false);
        drop(chain);
        let log = head.log_of_all();
        crash_somewhere(&start, &data, &log, &story, dice);
    });
}
