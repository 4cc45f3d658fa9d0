//! The power goes while clusters are written compressed and bitmaps record it: nothing that was
//! flushed is lost, and a bitmap says that it was not stored, or knows of every change.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use vdisk::Result;
use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::image::{Compress as _, Image as _};
use vdisk::internals::qcow2::{self, Compression, CreateOptions, Image, OpenOptions};
use vdisk::internals::storage::MemoryStorage;

use crate::crash::{Start, Story, verify};
use crate::dice::{Dice, rounds};
use crate::internal::{WRITABLE, contents};
use crate::model::Model;
use crate::recorder::{Recorder, crash_points};

/// What one bit of the bitmaps speaks for, in bytes.
const GRANULE: u64 = 1024;

/// An image with some data, bitmaps, and what they say.
struct Known {
    start: Start,
    dirty: Vec<Range<u64>>,
}

/// A use of whole clusters.
fn step(image: &Image, at: u64, bytes: &[u8], dice: &mut Dice) -> Result<()> {
    let (place, len) = (GuestOffset(at), bytes.len() as u64);
    match dice.below(3) {
        0 => {
            let reserved = image.prepare(place, len)?;
            assert_eq!((reserved.start(), reserved.len()), (place, len));
            reserved.write(0, &[IoSlice::new(bytes)])?;
            reserved.commit()
        }
        // What does not shrink is not stored.
        _ => match image.write_compressed(place, bytes)? {
            true => Ok(()),
            false => image.zero(place, len, true).map(drop),
        },
    }
}

/// Bytes that shrink: the same few over and over.
fn cluster(len: u64, dice: &mut Dice) -> Vec<u8> {
    let (seed, period) = (dice.next(), 3 + dice.below(60));
    (0..len).map(|i| ((i % period) ^ seed) as u8 | 1).collect()
}

/// Uses the image at random; notes what is durable when, and what may stand where.
fn play(image: &Image, recorder: &Recorder, start: &Start, dice: &mut Dice) -> Story {
    let mut model = start.model.bytes.clone();
    let mut story = Story { durable: vec![(0, model.clone())], changes: Vec::new() };
    for _ in 0..8 + dice.below(16) {
        let before = recorder.events();
        let at = dice.below(model.len() as u64 / start.unit) * start.unit;
        let len = start.unit.min(model.len() as u64 - at);
        let mut bytes = cluster(len, dice);
        if dice.once_in(6) {
            bytes.fill(0);
            image.zero(GuestOffset(at), len, dice.once_in(2)).unwrap();
        } else {
            step(image, at, &bytes, dice).unwrap();
        }
        let now = contents(image)[at as usize..(at + len) as usize].to_vec();
        assert!(now == bytes || now.iter().all(|byte| *byte == 0));
        model[at as usize..(at + len) as usize].copy_from_slice(&now);
        story.changes.push((before, at, now));
        if dice.once_in(4) {
            image.flush().unwrap();
            story.durable.push((recorder.events(), model.clone()));
        }
    }
    story
}

fn known(dice: &mut Dice) -> Known {
    let bits = dice.pick(&[9, 12, 14]);
    let size = (64 << 10).max(8 << bits);
    let options = CreateOptions {
        cluster: Unit::from_bits(bits),
        refcount_bits: dice.pick(&[1, 4, 16]),
        compression: dice.pick(&[Compression::Zlib, Compression::Zstd]),
        ..CreateOptions::new(size)
    };
    let recorder = Arc::new(Recorder::new(Vec::new()));
    let mut image = qcow2::create(recorder.clone(), &options).unwrap();
    image.add_bitmap("kept", Some(GRANULE), true).unwrap();
    image.add_bitmap("idle", Some(GRANULE), false).unwrap();
    let model = Model::new(size);
    let cache = dice.pick(&[0, 1 << 20]);
    let start = Start { head: Vec::new(), base: None, data: None, model, unit: 1 << bits, cache };
    play(&image, &recorder, &start, dice);
    let bytes = contents(&image);
    drop(image);
    let head = recorder.bytes();
    let dirty = open(head.clone()).bitmap_ranges("kept").unwrap();
    Known { start: Start { head, model: Model { bytes }, ..start }, dirty }
}

fn open(file: Vec<u8>) -> Image {
    Image::open(Arc::new(MemoryStorage::new(file)), OpenOptions::default()).unwrap()
}

/// A bitmap that does not say that it is in use covers all that it covered, and all that differs.
fn verify_bitmaps(file: &[u8], known: &Known) -> bool {
    let image = open(file.to_vec());
    let found = image.bitmaps().unwrap();
    assert_eq!(found.iter().map(|b| &b.name[..]).collect::<Vec<_>>(), ["kept", "idle"]);
    assert!(!found[1].in_use, "a bitmap that records nothing stays what it is");
    assert_eq!(image.bitmap_ranges("idle").unwrap(), []);
    if found[0].in_use {
        assert!(image.bitmap_ranges("kept").is_err());
        return false;
    }
    let ranges = image.bitmap_ranges("kept").unwrap();
    let covered = |at: u64| ranges.iter().any(|range| range.contains(&at));
    for range in &known.dirty {
        assert!(range.clone().step_by(GRANULE as usize).all(covered), "{range:?} is forgotten");
    }
    let now = contents(&image);
    for (i, (old, new)) in known.start.model.bytes.iter().zip(&now).enumerate() {
        assert!(old == new || covered(i as u64), "byte {i} has changed, and no bitmap knows");
    }
    true
}

#[test]
fn a_crash_while_bitmaps_record_compressed_writes_loses_nothing_silently() {
    rounds(8, |dice| {
        let known = known(dice);
        let recorder = Arc::new(Recorder::new(known.start.head.clone()));
        let options = OpenOptions { cache: known.start.cache, ..WRITABLE };
        let image = Image::open(recorder.clone(), options).unwrap();
        let story = play(&image, &recorder, &known.start, dice);
        drop(image);
        let log = recorder.log();
        crash_points(&known.start.head, &log, dice, |file, events| {
            let stored = verify_bitmaps(&file, &known);
            assert!(stored || events < log.len(), "closed well, the bitmap is stored");
            verify(file, &known.start, &story, events);
        });
    });
}
