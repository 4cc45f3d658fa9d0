//! Power cuts at every write and between every two barriers: what was synced is there, `e2fsck -p`
//! accepts what is left by itself, and so do we.

use std::fs;
use std::sync::Arc;

use vdisk::internals::filesystem::ext4::mounted::{
    Allocation, Change, Mounted, New, Options, ROOT,
};

use super::disk::{Disk, Event, e2fsck, formatted, is_clean};
use super::model::{View, same, tree, view};
use super::open;
use super::random::Pair;
use crate::dice::{Dice, rounds};

/// A moment between two operations.
struct Moment {
    /// How much had been written.
    events: usize,
    view: View,
    /// Whether everything was durable.
    synced: bool,
}

/// The disk at a power cut after `events` changes: what was flushed is there, of the rest each
/// write or not, or half of it.
fn cut(start: &[u8], log: &[Event], events: usize, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = start.to_vec();
    let done = log[..events].iter().rposition(|event| matches!(event, Event::Flush));
    let durable = done.map_or(0, |at| at + 1);
    let how = dice.below(3);
    for (at, event) in log[..events].iter().enumerate() {
        let Event::Write(offset, data) = event else { continue };
        let keeps = at < durable
            || match how {
                0 => true,
                1 => false,
                _ => dice.once_in(2),
            };
        if !keeps {
            continue;
        }
        let mut len = data.len();
        if at >= durable && how == 2 && dice.once_in(3) {
            // A sector of 4 KiB is written whole or not at all: the superblock, with its checksum,
            // relies on that with the kernel too.
            let end = (offset + dice.below(len as u64 + 1)) / 4096 * 4096;
            len = end.saturating_sub(*offset) as usize;
        }
        let offset = *offset as usize;
        bytes[offset..offset + len].copy_from_slice(&data[..len]);
    }
    bytes
}

/// Fails unless e2fsck mends the disk by itself; returns what is then there.
fn mended(bytes: &[u8], what: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, bytes).unwrap();
    let (code, said) = e2fsck(&path, "-p");
    // What it mends is the journal and the files without a name, nothing else.
    let odd = said.lines().find(|line| {
        ![
            "recovering journal",
            "clean",
            "Clearing orphaned",
            "Truncating orphaned",
            "files (",
            "optimizing",
        ]
        .iter()
        .any(|usual| line.contains(usual))
            && !line.contains("was not cleanly unmounted, check forced")
            && !line.trim().is_empty()
    });
    if !(code == 0 || code == 1) || odd.is_some() {
        let kept = std::env::temp_dir().join("vdisk-broken-image");
        fs::write(&kept, bytes).unwrap();
        panic!("{what}: e2fsck -p ends with {code} ({}):\n{said}", kept.display());
    }
    fs::read(path).unwrap()
}

fn mounted(bytes: Vec<u8>, read_only: bool) -> (Arc<Disk>, Mounted) {
    let disk = Arc::new(Disk::new(bytes));
    let fs = Mounted::open(disk.clone(), 0, u64::MAX, Options { read_only, ..Options::default() })
        .unwrap();
    (disk, fs)
}

/// What is there besides the contents of files, of which the length counts.
fn shape(view: &View) -> View {
    let mut shape = view.clone();
    for seen in shape.values_mut().filter(|seen| seen.mode & 0xf000 == 0x8000) {
        seen.bytes = (seen.bytes.len() as u64).to_le_bytes().to_vec();
    }
    shape
}

/// Fails unless the tree is that of some moment since the last sync before the cut, and what did
/// not change since then is as it was.
fn is_one_of(moments: &[Moment], events: usize, seen: &View, what: &str) {
    let first = moments.iter().rposition(|m| m.synced && m.events <= events).unwrap();
    let last = moments.iter().position(|m| m.events > events).unwrap_or(moments.len() - 1);
    let may = &moments[first..=last];
    let found = may.iter().any(|moment| shape(&moment.view) == shape(seen));
    if !found {
        same(&shape(&may[0].view), &shape(seen), &format!("{what}, of {} moments", may.len()));
    }
    for (path, old) in &may[0].view {
        if may.iter().all(|moment| moment.view.get(path) == Some(old)) {
            assert!(
                seen.get(path) == Some(old),
                "{what}: {:?} changed",
                String::from_utf8_lossy(path)
            );
        }
    }
}

/// As a database writes.
#[test]
fn bytes_over_bytes_are_durable_with_one_flush() {
    for kind in super::KINDS {
        let disk = Arc::new(Disk::new(formatted(kind, "16M")));
        let fs = open(&disk);
        let new = New { mode: 0x8000 | 0o644, ..New::default() };
        let file = fs.create(ROOT, b"file", &new).unwrap();
        fs.write(file, 0, &[1; 100_000]).unwrap();
        fs.sync_data().unwrap();
        fs.write(file, 0, &[2]).unwrap();
        fs.sync().unwrap();
        disk.record();
        fs.write(file, 5000, &[3; 10_000]).unwrap();
        let change = Change { modified: Some((5, 6)), ..Change::default() };
        fs.set_attributes(file, &change).unwrap();
        fs.sync_data().unwrap();
        let flushes = |log: &[Event]| log.iter().filter(|e| matches!(e, Event::Flush)).count();
        let log = disk.log();
        assert!(matches!(log[..], [.., Event::Flush]), "{kind}: what was written is flushed");
        assert!(log.len() <= 5 && flushes(&log) == 1, "{kind}: {} changes", log.len());
        // The times are not forgotten: without a journal they lead to nothing that has to be there first.
        let most = if kind.contains("^has_journal") || kind.contains("ext2") { 1 } else { 2 };
        let before = log.len();
        fs.sync().unwrap();
        let log = disk.log();
        assert!(log.len() > before + 1, "{kind}");
        assert_eq!(flushes(&log[before..]), most, "{kind}");
        // What leads to bytes is durable with them.
        let before = log.len();
        fs.write(file, 99_999, &[4; 2]).unwrap();
        fs.sync_data().unwrap();
        assert!(disk.log().len() > before + 2, "{kind}: the file is longer");
        if kind.contains("ext4") {
            fs.allocate(file, 200_000, 50_000, Allocation::Reserve, true).unwrap();
            fs.sync().unwrap();
            let before = disk.events();
            fs.write(file, 200_000, &[5; 50_000]).unwrap();
            fs.sync_data().unwrap();
            assert!(flushes(&disk.log()[before..]) == 2, "{kind}: was not written before");
        }
        fs.close().unwrap();
        is_clean(&disk.bytes(), kind);
    }
}

#[test]
fn a_power_cut_leaves_what_was_synced_and_a_file_system_that_mends_itself() {
    rounds(12, |dice| {
        let kinds = ["-t ext4 -b 1024", "-t ext4", "-t ext3 -b 1024"];
        let without = ["-t ext2 -b 1024", "-t ext4 -O ^has_journal"];
        let journal = !dice.once_in(4);
        let kind = if journal { dice.pick(&kinds) } else { dice.pick(&without) };
        let options = if journal { "-J size=4" } else { "" };
        let start = formatted(&format!("{kind} {options} -N 1024"), "16M");
        let disk = Arc::new(Disk::new(start.clone()));
        let fs = open(&disk);
        disk.record();
        let mut pair = Pair::new(&fs, 60_000, kind.contains("ext4"));
        let mut moments = vec![Moment { events: 0, view: view(&pair.files), synced: true }];
        for _ in 0..80 {
            pair.step(dice);
            let synced = dice.once_in(5);
            match dice.below(3) {
                _ if !synced => {}
                0 => fs.sync().unwrap(),
                1 => fs.sync_data().unwrap(),
                _ => {
                    fs.freeze().unwrap();
                    fs.thaw();
                }
            }
            moments.push(Moment { events: disk.events(), view: view(&pair.files), synced });
            // What it takes most often is bytes over bytes.
            let synced = synced && dice.once_in(2) && pair.overwrite(dice);
            if !synced {
                continue;
            }
            fs.sync_data().unwrap();
            moments.push(Moment { events: disk.events(), view: view(&pair.files), synced });
        }
        fs.close().unwrap();
        moments.push(Moment { events: disk.events(), view: view(&pair.files), synced: true });
        let log = disk.log();
        for _ in 0..20 {
            // Without a journal nothing is promised while something is written.
            let synced: Vec<usize> =
                moments.iter().filter(|m| m.synced).map(|m| m.events).collect();
            let events = match journal {
                true => dice.below(log.len() as u64 + 1) as usize,
                false => dice.pick(&synced),
            };
            let what = format!("{kind}, cut after {events} of {} changes", log.len());
            let bytes = cut(&start, &log, events, dice);
            let theirs = mended(&bytes, &what);
            is_clean(&theirs, &what);
            let (_, reader) = mounted(bytes.clone(), true);
            let (ours, writer) = mounted(bytes, false);
            let (_, other) = mounted(theirs, true);
            let seen = tree(&writer);
            same(&tree(&other), &seen, &format!("{what}: theirs and ours"));
            same(&tree(&reader), &seen, &format!("{what}: read only"));
            is_one_of(&moments, events, &seen, &what);
            writer.close().unwrap();
            is_clean(&ours.bytes(), &what);
        }
    });
}
