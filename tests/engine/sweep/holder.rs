//! A process that holds a disk, writes to it as a guest does, and changes its tree meanwhile: what a
//! kill, a power cut or a failing call leaves of that.
//!
//! The holder is this test program itself, started again: it does one change through the library and
//! the guest's writes in between, always in the same order, on one thread. After each flush it says
//! on its standard error how many writes are durable; the tracer notes when.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::change;
use vdisk::internals::change::DeleteWishes;
use vdisk::internals::change::live::Live;
use vdisk::internals::change::merge::{Progress, Wishes};
use vdisk::internals::change::plan::Keeping;
use vdisk::internals::open::OpenOptions;

use super::tracer::Event;
use crate::model::pattern;

/// The disk that is held.
pub const DISK: &str = "disk.qcow2";
/// How the holder is told what to do: `merge b`.
pub const CHANGE: &str = "VDISK_SWEEP_CHANGE";
/// What it says before the number of durable writes.
pub const SAID: &str = "durable ";
/// Writes of the guest: some before the change, some while it is under way, some after it.
const BEFORE: usize = 3;
const MEANWHILE: usize = 6;
const AFTER: usize = 3;

/// The guest's write number `number`: where, and what.
fn write(number: usize, size: u64) -> (u64, Vec<u8>) {
    let number = number as u64;
    let at = number * 23_456 % (size - 9000) / 512 * 512;
    (at, pattern(at, 1500 + number * 611 % 7000, number + 100))
}

/// The command line of a holder that does `change`.
pub fn command(change: &str) -> Vec<String> {
    let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    let name = "sweep::holder::a_holder_that_the_sweep_starts";
    let words = [&format!("{CHANGE}={change}"), &own, "--exact", name, "--ignored", "--nocapture"];
    words.map(str::to_owned).into()
}

/// The user of the disk.
struct Guest {
    disk: Arc<Chain>,
    /// Bytes of the disk that it uses.
    size: u64,
    done: usize,
    /// Whether all that it did succeeded: else nothing more is called durable.
    sound: bool,
}

impl Guest {
    fn write(&mut self) {
        let (at, bytes) = write(self.done, self.size);
        self.done += 1;
        self.sound &= self.disk.write_at(at, &[IoSlice::new(&bytes)]).is_ok();
    }

    fn flush(&mut self) {
        self.sound &= self.disk.flush().is_ok();
        if self.sound {
            // In one call, whatever becomes of it.
            let said = format!("{SAID}{}\n", self.done);
            let _ = nix::unistd::write(std::io::stderr(), said.as_bytes());
        }
    }
}

fn change(live: &Live, words: &[&str], told: &mut Progress<'_>) -> vdisk::Result<()> {
    let in_batches = words.contains(&"batches");
    let keeping = if words.contains(&"kept") { Keeping::default() } else { Keeping::NOTHING };
    match words {
        ["create", name] => live.snapshot(name, "", None).map(drop),
        ["merge", name, ..] => {
            let wishes = Wishes { keeping, in_batches, in_use: true, ..Wishes::default() };
            live.merge(name, wishes, None, None, told)
        }
        ["delete", name, ..] => {
            live.delete(name, DeleteWishes { keeping, ..Default::default() }, None, told)
        }
        ["undo"] => live.undo(None, None, told),
        ["forget"] => live.forget(false, None, told),
        ["rename", old, new] => live.rename(old, new),
        ["resize", size] => live.resize(size.parse().unwrap()),
        _ => panic!("{words:?}"),
    }
}

#[test]
#[ignore = "the sweep starts it"]
fn a_holder_that_the_sweep_starts() {
    let Ok(what) = std::env::var(CHANGE) else { return };
    let words: Vec<&str> = what.split(' ').collect();
    let path = std::env::current_dir().unwrap().join(DISK);
    let opened = change::open(&path, &OpenOptions::writable());
    let Ok(disk) = opened.map(Arc::new) else { std::process::exit(1) };
    let mut guest = Guest { disk: disk.clone(), size: disk.size(), done: 0, sound: true };
    (0..BEFORE).for_each(|_| guest.write());
    guest.flush();
    let live = Live::new(disk.clone(), &path).unwrap();
    if !guest.sound {
        // What a snapshot would show now is not what all others show.
        std::process::exit(1);
    }
    let done = change(&live, &words, &mut |_, _| {
        if guest.done < BEFORE + MEANWHILE {
            guest.write();
            if guest.done % 2 == 1 {
                guest.flush();
            }
        }
        true
    });
    (0..AFTER).for_each(|_| guest.write());
    guest.flush();
    let good = done.inspect_err(|e| eprintln!("{e}")).is_ok() && guest.sound;
    drop((live, guest, disk));
    std::process::exit(if good { 0 } else { 1 });
}

/// How many writes the holder called durable by the end of `log`.
pub fn durable(log: &[Event]) -> usize {
    let said = log.iter().filter_map(|event| match event {
        Event::Said { number } => Some(*number),
        _ => None,
    });
    said.max().unwrap_or(0)
}

/// All bytes of the held disk in `dir`.
pub fn read(dir: &Path) -> vdisk::Result<Vec<u8>> {
    let disk = change::open(&dir.join(DISK), &OpenOptions::default())?;
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut [IoSliceMut::new(&mut bytes)])?;
    Ok(bytes)
}

/// Whether `seen` is what the disk, which held `before`, may show when so many writes were durable:
/// each byte is that, or of a later write. A disk that was shorter than its base may have grown: the
/// base does not show then.
pub fn may_show(before: &[u8], durable: usize, seen: &[u8]) -> Result<(), String> {
    let all = BEFORE + MEANWHILE + AFTER;
    let size = before.len() as u64;
    let mut now = before.to_vec();
    for number in 0..durable {
        let (at, bytes) = write(number, size);
        now[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    let mut right: Vec<bool> = now.iter().zip(seen).map(|(a, b)| a == b).collect();
    for number in durable..all {
        let (at, bytes) = write(number, size);
        for (offset, byte) in (at as usize..).zip(&bytes) {
            right[offset] |= seen[offset] == *byte;
        }
    }
    match right.iter().position(|right| !right) {
        _ if seen.len() != before.len() && seen.len() as u64 != super::scene::SIZE => {
            Err(format!("{} bytes long", seen.len()))
        }
        _ if seen.iter().skip(before.len()).any(|byte| *byte != 0) => {
            Err("the base shows past the old end".to_owned())
        }
        None => Ok(()),
        Some(at) => Err(format!(
            "byte {at} is {:#x}, not {:#x}, with {durable} durable writes",
            seen[at], now[at]
        )),
    }
}
