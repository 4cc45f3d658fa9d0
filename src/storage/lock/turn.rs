//! Turns at a disk: of all commands that change the tree of one disk, one does at a time.
//!
//! A change puts other files at the disk's name, so that no lock on a file keeps others out from its
//! beginning to its end. What stays is the name: a turn is one byte of the directory, whose place is the
//! name's hash, locked as [`super::lock`] locks the bytes of a file: set, then looked whether somebody
//! else has it. It goes when its holder ends, however that ends, and leaves nothing behind. A file system
//! without such locks gives everybody a turn.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::name::directory;

/// Before the first byte of a name.
const FIRST: u64 = 1 << 40;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(5);

thread_local! {
    /// The disks at which this thread has its turn: a change is made of others.
    static OWN: RefCell<Vec<Place>> = const { RefCell::new(Vec::new()) };
}

/// A directory, by device and inode number, and a byte of it.
type Place = (u64, u64, i64);

/// The right to change the tree of a disk, given back when dropped. It belongs to a thread.
#[derive(Debug)]
pub struct Turn {
    /// Holds the lock; `None` within another turn of the same thread.
    lock: Option<(File, Place)>,
}

impl Turn {
    /// Waits, as long as [`super::Manners`] say, for those who have it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where somebody has it still.
    pub fn take(disk: &Path) -> Result<Turn> {
        let dir = directory(disk);
        let failed = |e| Error::io("could not be opened", e).at_path(dir);
        // Opened anew for each turn: two threads of a process keep each other out, too.
        let file = File::open(dir).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        let byte = byte_of(disk);
        let place = (meta.dev(), meta.ino(), byte);
        if OWN.with_borrow(|own| own.contains(&place)) {
            return Ok(Turn { lock: None });
        }
        // Who has just let go of it has it a moment longer where another of its threads is starting a
        // program.
        let until = Instant::now() + super::manners().wait.max(super::PATIENCE);
        while !super::take_byte(&file, byte)? {
            if Instant::now() >= until {
                let message = "another command is at work on its snapshots";
                return Err(Error::new(ErrorKind::Busy, message).at_path(disk));
            }
            // Not the same for all: two that saw each other come both went back.
            thread::sleep(PAUSE + Duration::from_micros(u64::from(std::process::id() % 31) * 300));
        }
        OWN.with_borrow_mut(|own| own.push(place));
        Ok(Turn { lock: Some((file, place)) })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some((_, place)) = &self.lock {
            OWN.with_borrow_mut(|own| own.retain(|other| other != place));
        }
    }
}

/// The byte of the directory that stands for a name in it.
fn byte_of(disk: &Path) -> i64 {
    let name = disk.file_name().unwrap_or_default();
    // FNV-1a: all versions of this program agree on it. Two names that share a byte only wait.
    let hash = name.as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (FIRST + (hash & (FIRST - 1))) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_one_threads_and_may_be_taken_within_itself() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let first = Turn::take(&disk).unwrap();
        let within = Turn::take(&disk).unwrap();
        let elsewhere = |disk: &Path| {
            thread::scope(|scope| scope.spawn(|| Turn::take(disk).map(drop)).join().unwrap())
        };
        assert_eq!(elsewhere(&disk).unwrap_err().kind(), ErrorKind::Busy);
        elsewhere(&dir.path().join("other")).unwrap();
        drop(within);
        assert_eq!(elsewhere(&disk).unwrap_err().kind(), ErrorKind::Busy);
        drop(first);
        elsewhere(&disk).unwrap();
        // ... and a turn elsewhere has left nothing here.
        drop(Turn::take(&disk).unwrap());
    }
}
