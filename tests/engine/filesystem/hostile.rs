//! File systems as an attacker, or a broken disk, would make them: answers or errors, never a
//! panic, a hang or memory without bounds.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vdisk::internals::filesystem::ext4::mounted::{
    Allocation, Change, Mounted, Need, New, Onto, Options, Place, ROOT, Seek,
};

use super::disk::{Disk, Event, formatted};
use super::random::Pair;
use super::{KINDS, open};
use crate::dice::{Dice, rounds};

/// A file system with files in it, and one that was in use when the power went.
fn bases(kind: &str, dice: &mut Dice) -> [Vec<u8>; 2] {
    let start = formatted(&format!("{kind} -N 512"), "8M");
    let disk = Arc::new(Disk::new(start.clone()));
    let fs = open(&disk);
    disk.record();
    let mut pair = Pair::new(&fs, 30_000, kind.contains("ext4"));
    (0..120).for_each(|_| pair.step(dice));
    fs.sync().unwrap();
    let mut used = start;
    for event in disk.log() {
        if let Event::Write(offset, bytes) = event {
            used[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
        }
    }
    fs.close().unwrap();
    drop(fs);
    [disk.bytes(), used]
}

/// Does everything with what is there, whatever comes of it.
fn use_all(fs: &Mounted, dice: &mut Dice) {
    let mut left = vec![ROOT];
    let mut seen = 0;
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Some(number) = left.pop() {
        seen += 1;
        assert!(Instant::now() < deadline, "it goes on for ever");
        if seen > 300 {
            break;
        }
        let mut bytes = vec![0; 5000];
        let _ = fs.read(number, dice.below(40_000), &mut bytes);
        let _ = fs.seek(number, dice.below(40_000), Seek::Hole);
        let _ = fs.read_link(number);
        for name in fs.attribute_names(number).unwrap_or_default() {
            let _ = fs.attribute(number, &name);
        }
        if let Ok(names) = fs.list(number, 0, 200) {
            for name in names {
                let _ = fs.lookup(number, &name.name);
                if !matches!(name.name.as_slice(), b"." | b"..") {
                    left.push(name.inode);
                }
                if dice.once_in(6) && number != ROOT {
                    let _ = fs.rename(
                        Place::new(number, &name.name),
                        Place::new(ROOT, b"moved"),
                        Onto::Replace,
                    );
                }
                if dice.once_in(6) {
                    let _ = fs.unlink(number, &name.name);
                    let _ = fs.remove_directory(number, &name.name);
                }
            }
        }
        let new = New { mode: dice.pick(&[0x8000, 0x4000]) | 0o755, ..New::default() };
        let name = format!("a new name {seen} {}", "z".repeat(dice.below(200) as usize));
        let _ = fs.create(number, name.as_bytes(), &new);
        let _ = fs.write(number, dice.below(60_000), &bytes);
        let _ = fs.allocate(number, dice.below(60_000), 9000, Allocation::Punch, true);
        let _ = fs.allocate(number, dice.below(60_000), 9000, Allocation::Reserve, true);
        let _ = fs.set_attribute(number, b"user.x", Some(&bytes[..300]), Need::Either);
        let size = Some(dice.below(50_000));
        let _ = fs.set_attributes(number, &Change { size, ..Change::default() });
        if dice.once_in(10) {
            let _ = fs.sync();
        }
    }
    let _ = fs.close();
}

#[test]
fn damaged_file_systems_are_answered_with_errors() {
    rounds(10, |dice| {
        let kind = dice.pick(KINDS);
        for base in bases(kind, dice) {
            let blocks: Vec<usize> =
                (0..base.len() / 512).filter(|n| base[n * 512..][..512] != [0; 512]).collect();
            for _ in 0..12 {
                let mut bytes = base.clone();
                for _ in 0..=dice.below(24) {
                    let at = match dice.below(6) {
                        0 => 1024 + dice.below(400) as usize,
                        _ => dice.pick(&blocks) * 512 + dice.below(512) as usize,
                    };
                    let value = dice.pick(&[0, 1, 0x7f, 0x80, 0xff, 0x42]);
                    bytes[at] = value;
                }
                let read_only = dice.once_in(3);
                let mut own = Dice::new(dice.next());
                let run = || {
                    let disk = Arc::new(Disk::new(bytes));
                    if let Ok(fs) = Mounted::open(
                        disk,
                        0,
                        u64::MAX,
                        Options { read_only, ..Options::default() },
                    ) {
                        use_all(&fs, &mut own);
                    }
                };
                assert!(catch_unwind(AssertUnwindSafe(run)).is_ok(), "{kind}");
            }
        }
    });
}
