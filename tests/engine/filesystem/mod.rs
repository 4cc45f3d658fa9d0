//! The file system in a disk, written without the kernel: judged by a model, by e2fsck, and by
//! crashes at every write.

mod crash;
mod disk;
mod format;
mod hostile;
mod model;
mod random;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vdisk::Error;
use vdisk::internals::filesystem::ext4::mounted::{Allocation, Mounted, New, Options, ROOT, Seek};

use crate::dice::{Dice, rounds};
use disk::{Disk, formatted, is_clean};
use random::Pair;

/// The kinds of file systems that the tests go through.
pub const KINDS: &[&str] = &[
    "-t ext4",
    "-t ext4 -b 1024",
    "-t ext4 -b 2048 -O ^metadata_csum,uninit_bg,^64bit -I 128",
    "-t ext3 -b 1024",
    "-t ext2 -b 4096",
    "-t ext4 -O meta_bg,^resize_inode,large_dir -b 1024 -g 1024",
    "-t ext4 -O ^has_journal,^dir_index",
];

fn open(disk: &Arc<Disk>) -> Mounted {
    Mounted::open(disk.clone(), 0, u64::MAX, Options::default()).unwrap()
}

#[test]
fn random_operations_leave_the_tree_of_the_model_and_a_clean_file_system() {
    rounds(8, |dice| one_round(dice, 400));
}

fn one_round(dice: &mut Dice, steps: u64) {
    let kind = dice.pick(KINDS);
    eprintln!("{kind}");
    let disk = Arc::new(Disk::new(formatted(kind, "40M")));
    let mut fs = open(&disk);
    let extents = kind.contains("ext4");
    let mut pair = Pair::new(&fs, 300_000, extents);
    for _ in 0..steps {
        pair.step(dice);
    }
    let model = model::view(&pair.files);
    model::same(&model, &model::tree(&fs), "in use");
    fs.close().unwrap();
    is_clean(&disk.bytes(), kind);
    drop(fs);
    fs = open(&disk);
    model::same(&model, &model::tree(&fs), "opened again");
}

#[test]
fn a_directory_of_many_names_is_indexed_and_emptied() {
    for kind in ["-t ext4 -b 1024", "-t ext4", "-t ext3 -b 1024", "-t ext2 -O ^dir_index -b 4096"] {
        let disk = Arc::new(Disk::new(formatted(&format!("{kind} -N 40000"), "64M")));
        let fs = open(&disk);
        let new = New { mode: 0x4000 | 0o755, ..New::default() };
        let directory = fs.create(ROOT, b"many", &new).unwrap();
        let count = if kind.contains("^dir_index") { 2000 } else { 30000 };
        let name = |n: u64| format!("a name of some length {n:07}").into_bytes();
        let new = New { mode: 0x8000 | 0o644, ..New::default() };
        for n in 0..count {
            fs.create(directory, &name(n), &new).unwrap();
        }
        assert_eq!(fs.lookup(directory, b"not there").unwrap(), None);
        let mut dice = Dice::new(1);
        for _ in 0..1000 {
            assert!(fs.lookup(directory, &name(dice.below(count))).unwrap().is_some());
        }
        let names = fs.list(directory, 0, usize::MAX).unwrap();
        assert_eq!(names.len() as u64, count + 2);
        fs.close().unwrap();
        is_clean(&disk.bytes(), kind);
        for n in 0..count {
            fs.unlink(directory, &name(n)).unwrap();
        }
        fs.remove_directory(ROOT, b"many").unwrap();
        fs.close().unwrap();
        is_clean(&disk.bytes(), kind);
    }
}

/// All that the journal held was written to its place while everybody waited.
#[test]
fn nobody_waits_for_what_can_be_written_before_a_file_system_is_at_rest() {
    for kind in KINDS {
        let disk = Arc::new(Disk::new(formatted(kind, "40M")));
        let fs = open(&disk);
        let new = New { mode: 0x8000 | 0o644, ..New::default() };
        let fill = |name: &str| {
            for n in 0..300 {
                let file = fs.create(ROOT, format!("{name}{n}").as_bytes(), &new).unwrap();
                fs.write(file, 0, &[1; 5000]).unwrap();
            }
        };
        fill("committed");
        fs.sync().unwrap();
        fill("in memory");
        disk.record();
        let since = fs.freeze().unwrap();
        let (all, meanwhile) = (disk.events(), disk.writes_after(since));
        assert!(all > 5, "{kind}: {all}");
        assert!(meanwhile <= 1, "{kind}: {meanwhile} writes besides the superblock's");
        is_clean(&disk.bytes(), kind);
        fs.thaw();
        fill("after");
        fs.close().unwrap();
        is_clean(&disk.bytes(), kind);
    }
}

/// Waits until a thread of this process sleeps.
fn until_asleep(thread: i32) {
    let end = Instant::now() + Duration::from_secs(60);
    let stat = format!("/proc/self/task/{thread}/stat");
    let asleep = || {
        let line = std::fs::read_to_string(&stat).unwrap();
        line.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S'))
    };
    while !asleep() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn who_waited_for_a_commit_that_failed_is_told() {
    for sync in [Mounted::sync, Mounted::sync_data] {
        let disk = Arc::new(Disk::new(formatted("-t ext4", "16M")));
        let fs = open(&disk);
        fs.sync().unwrap();
        let new = New { mode: 0x8000 | 0o644, ..New::default() };
        fs.create(ROOT, b"file", &new).unwrap();
        let (entered, begun) = channel();
        let (fail, failing) = channel::<()>();
        // A host says once that something could not be written.
        let once = Mutex::new(Some((entered, failing)));
        disk.at_flush(move || {
            let Some((entered, failing)) = once.lock().unwrap().take() else { return Ok(()) };
            entered.send(()).unwrap();
            assert!(failing.recv().is_err());
            Err(Error::invalid("not written"))
        });
        std::thread::scope(|scope| {
            let first = scope.spawn(|| fs.sync());
            begun.recv().unwrap();
            let ((tell, told), fs) = (channel(), &fs);
            let second = scope.spawn(move || {
                tell.send(rustix::thread::gettid().as_raw_pid()).unwrap();
                sync(fs)
            });
            until_asleep(told.recv().unwrap());
            drop(fail);
            assert!(first.join().unwrap().is_err());
            assert!(second.join().unwrap().is_err(), "what it asked for is not durable");
        });
    }
}

#[test]
fn a_hole_past_the_end_of_a_file_takes_its_last_block_whole() {
    let disk = Arc::new(Disk::new(formatted("-t ext4 -b 4096", "16M")));
    let fs = open(&disk);
    let new = New { mode: 0x8000 | 0o644, ..New::default() };
    let file = fs.create(ROOT, b"file", &new).unwrap();
    fs.write(file, 0, &[1; 10_000]).unwrap();
    fs.allocate(file, 5000, 90_000, Allocation::Punch, true).unwrap();
    assert_eq!(fs.seek(file, 0, Seek::Hole).unwrap(), 8192);
    // And of an empty file, or past its end, there is nothing to take.
    fs.allocate(file, 50_000, 10, Allocation::Punch, true).unwrap();
    let empty = fs.create(ROOT, b"empty", &new).unwrap();
    fs.allocate(empty, 0, 10, Allocation::Punch, true).unwrap();
    let past = fs.allocate(file, u64::MAX - 10, 5, Allocation::Punch, true);
    assert_eq!(past.unwrap_err().raw_os_error(), Some(libc::EFBIG));
    fs.close().unwrap();
    is_clean(&disk.bytes(), "after the holes");
}
