//! The same calls on the kernel's ext4 and on a disk's files in user space: every answer, and the
//! trees that are left, agree.
//!
//! `VDISK_TWIN_ROUNDS` sets how many rounds are run, `VDISK_SEED` with which seed the first begins.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timespec,
    Timestamps, Uid, XattrFlags, chownat, fallocate, lgetxattr, linkat, llistxattr, lremovexattr,
    lsetxattr, makedev, mkdirat, mknodat, openat, renameat_with, seek, symlinkat, unlinkat,
    utimensat,
};

use crate::host::{Work, with_own_mounts};
use crate::require::{Need, have};

/// Numbers that look random, from a seed.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn path(&mut self) -> PathBuf {
        let mut path = PathBuf::new();
        for _ in 0..=self.below(3) {
            let name = self.below(5);
            let mut bytes = vec![b'a' + name as u8];
            match name {
                3 => bytes.push(0xff),
                4 => bytes.resize(255, b'y'),
                _ => {}
            }
            path.push(std::ffi::OsStr::from_bytes(&bytes));
        }
        path
    }
}

/// One of the two mounts, and files that are open on it.
struct Side {
    root: PathBuf,
    open: Vec<Option<File>>,
    /// Whether files are preallocated.
    preallocates: bool,
}

const SLOTS: u64 = 6;
const LONGEST: u64 = 200_000;

fn said<T>(result: Result<T, rustix::io::Errno>, text: impl FnOnce(T) -> String) -> String {
    match result {
        Ok(value) => text(value),
        Err(error) => format!("{error:?}"),
    }
}

fn said_io<T>(result: io::Result<T>, text: impl FnOnce(T) -> String) -> String {
    match result {
        Ok(value) => text(value),
        Err(error) => format!("errno {:?}", error.raw_os_error()),
    }
}

fn done(_: ()) -> String {
    "done".into()
}

/// A few bytes that stand for many.
fn digest(bytes: &[u8]) -> String {
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{} bytes {sum:x}", bytes.len())
}

fn stat(meta: &fs::Metadata) -> String {
    let size = if meta.is_dir() { 0 } else { meta.size() };
    format!(
        "mode {:o} links {} owner {}:{} size {size} device {}",
        meta.mode(),
        meta.nlink(),
        meta.uid(),
        meta.gid(),
        meta.rdev()
    )
}

fn time(dice: &mut Dice) -> Timespec {
    let seconds = dice.below(1 << 33) as i64 - (1 << 31);
    Timespec { tv_sec: seconds, tv_nsec: dice.below(1_000_000_000) as i64 }
}

/// An access list of an owner, a user, a group, a mask and others.
fn access_list(dice: &mut Dice) -> Vec<u8> {
    let mut list = 2u32.to_le_bytes().to_vec();
    let named = dice.below(3) > 0;
    for (tag, id) in [(1u16, u32::MAX), (2, 1000), (4, u32::MAX), (16, u32::MAX), (32, u32::MAX)] {
        if !named && matches!(tag, 2 | 16) {
            continue;
        }
        list.extend(tag.to_le_bytes());
        list.extend((dice.below(8) as u16).to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

impl Side {
    fn new(root: PathBuf, preallocates: bool) -> Side {
        Side { root, open: (0..SLOTS).map(|_| None).collect(), preallocates }
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    /// Does what the dice say, and says what came of it.
    fn step(&mut self, dice: &mut Dice) -> String {
        match dice.below(100) {
            0..12 => self.open_file(dice),
            12..34 => self.names(dice),
            34..66 => self.contents(dice),
            66..84 => self.known(dice),
            84..94 => self.look(dice),
            _ => self.whole(dice),
        }
    }

    fn open_file(&mut self, dice: &mut Dice) -> String {
        let (slot, path) = (dice.below(SLOTS) as usize, dice.path());
        let flags = dice.pick(&[
            OFlags::CREATE | OFlags::RDWR,
            OFlags::CREATE | OFlags::RDWR,
            OFlags::CREATE | OFlags::EXCL | OFlags::RDWR,
            OFlags::CREATE | OFlags::TRUNC | OFlags::RDWR,
            OFlags::RDWR | OFlags::APPEND,
            OFlags::RDONLY,
            OFlags::TMPFILE | OFlags::RDWR,
        ]);
        let mode = Mode::from_raw_mode(dice.below(0o10000) as u32 | 0o600);
        if dice.below(4) == 0 {
            self.open[slot] = None;
            return format!("close {slot}");
        }
        // A server that another test is just starting must not get it.
        let opened = openat(CWD, self.at(&path), flags | OFlags::NONBLOCK | OFlags::CLOEXEC, mode);
        let text = format!("open {path:?} {flags:?} {mode:?}: ");
        match opened {
            Ok(file) => {
                self.open[slot] = Some(File::from(file));
                text + "open"
            }
            Err(error) => text + &format!("{error:?}"),
        }
    }

    fn names(&mut self, dice: &mut Dice) -> String {
        let (one, two) = (dice.path(), dice.path());
        let (at, to) = (self.at(&one), self.at(&two));
        let mode = Mode::from_raw_mode(dice.below(0o10000) as u32 | 0o700);
        let (text, result) = match dice.below(11) {
            0..3 => ("mkdir", mkdirat(CWD, &at, mode)),
            3 => ("rmdir", unlinkat(CWD, &at, AtFlags::REMOVEDIR)),
            4 => ("unlink", unlinkat(CWD, &at, AtFlags::empty())),
            5..7 => {
                let flags = dice.pick(&[
                    RenameFlags::empty(),
                    RenameFlags::empty(),
                    RenameFlags::NOREPLACE,
                    RenameFlags::EXCHANGE,
                ]);
                ("rename", renameat_with(CWD, &at, CWD, &to, flags))
            }
            7 => ("link", linkat(CWD, &at, CWD, &to, AtFlags::empty())),
            8 => {
                let target = "t".repeat(dice.pick(&[1, 59, 60, 2000]));
                ("symlink", symlinkat(target, CWD, &at))
            }
            9 => {
                let kind =
                    dice.pick(&[FileType::Fifo, FileType::CharacterDevice, FileType::Socket]);
                let device = makedev(dice.pick(&[1, 300]), dice.pick(&[3, 70000]));
                ("mknod", mknodat(CWD, &at, kind, mode, device))
            }
            _ => {
                let slot = dice.below(SLOTS) as usize;
                let Some(file) = &self.open[slot] else { return "no file".into() };
                let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
                ("link of an open file", linkat(CWD, link, CWD, &at, AtFlags::SYMLINK_FOLLOW))
            }
        };
        format!("{text} {one:?} {two:?}: {}", said(result, done))
    }

    fn contents(&mut self, dice: &mut Dice) -> String {
        let slot = dice.below(SLOTS) as usize;
        let (offset, len) = match dice.below(3) {
            0 => (dice.below(40) * 4096, (dice.below(8) + 1) * 4096),
            1 => (dice.below(LONGEST), dice.below(300) + 1),
            _ => (dice.below(LONGEST), dice.below(60_000) + 1),
        };
        let (what, seed) = (dice.below(11), dice.below(1 << 20));
        let other = dice.below(SLOTS) as usize;
        let keep = dice.below(2) == 0;
        let Some(file) = &self.open[slot] else { return "no file".into() };
        let text = format!("{what} on {slot} at {offset} for {len}: ");
        text + &match what {
            0..4 => {
                let bytes: Vec<u8> = (0..len).map(|n| (n * 7 + seed) as u8 | 1).collect();
                said_io(file.write_at(&bytes, offset), |n| n.to_string())
            }
            4..6 => {
                let mut bytes = vec![0; len as usize];
                let read = file.read_at(&mut bytes, offset);
                said_io(read, |n| digest(&bytes[..n]))
            }
            6 => said_io(file.set_len(offset), done),
            7..9 => {
                let keep = if keep { FallocateFlags::KEEP_SIZE } else { FallocateFlags::empty() };
                let mode = match if self.preallocates { seed % 3 } else { 1 } {
                    0 => keep,
                    1 => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    _ => FallocateFlags::ZERO_RANGE | keep,
                };
                said(fallocate(file, mode, offset, len), |()| format!("{mode:?}"))
            }
            9 => {
                let Some(to) = &self.open[other] else { return "no file".into() };
                let (mut from, mut at) = (offset / 2, offset);
                let copied = rustix::fs::copy_file_range(
                    file,
                    Some(&mut from),
                    to,
                    Some(&mut at),
                    len as usize,
                );
                said(copied, |n| n.to_string())
            }
            _ => {
                let from = if keep { SeekFrom::Data(offset) } else { SeekFrom::Hole(offset) };
                // What was preallocated is data to the kernel while it happens to have its pages:
                // exact answers are compared when both are mounted anew.
                let _ = seek(file, from);
                String::new()
            }
        }
    }

    fn known(&mut self, dice: &mut Dice) -> String {
        let (path, what) = (dice.path(), dice.below(9));
        let at = self.at(&path);
        let name = dice.pick(&["user.a", "user.b", "trusted.c", "security.d"]);
        let value = vec![dice.below(256) as u8; dice.pick(&[0, 5, 90, 400, 3000])];
        let flags = dice.pick(&[XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE]);
        let mode = dice.below(0o10000) as u32;
        let (uid, gid) = (dice.pick(&[0, 1000, 70000]), dice.pick(&[0, 5, 1 << 31]));
        let times = Timestamps { last_access: time(dice), last_modification: time(dice) };
        let (list, kind) = (access_list(dice), dice.pick(&["access", "default"]));
        let text = format!("{what} {path:?} {name} {mode:o}: ");
        text + &match what {
            0 => said(
                rustix::fs::chmodat(CWD, &at, Mode::from_raw_mode(mode), AtFlags::empty()),
                done,
            ),
            1 => {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                said(chownat(CWD, &at, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW), done)
            }
            2 => {
                let set = utimensat(CWD, &at, &times, AtFlags::SYMLINK_NOFOLLOW);
                let now = at.symlink_metadata().ok();
                let now = now.map(|m| (m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec()));
                said(set, |()| format!("{now:?}"))
            }
            3..5 => said(lsetxattr(&at, name, &value, flags), done),
            5 => said(lremovexattr(&at, name), done),
            6 => {
                let name = format!("system.posix_acl_{kind}");
                said(lsetxattr(&at, name.as_str(), &list, XattrFlags::empty()), done)
            }
            7 => said(lremovexattr(&at, format!("system.posix_acl_{kind}").as_str()), done),
            _ => {
                // A pipe that nobody reads is not waited for.
                let flags = OFlags::WRONLY | OFlags::NONBLOCK;
                let opened = openat(CWD, &at, flags | OFlags::CLOEXEC, Mode::empty());
                said(opened, |file| said_io(File::from(file).set_len(mode.into()), done))
            }
        }
    }

    fn look(&mut self, dice: &mut Dice) -> String {
        let (path, slot) = (dice.path(), dice.below(SLOTS) as usize);
        let at = self.at(&path);
        match dice.below(4) {
            0 => format!("stat {path:?}: {}", said_io(at.symlink_metadata(), |m| stat(&m))),
            1 => {
                let file = self.open[slot].as_ref();
                let known = file.map(|file| said_io(file.metadata(), |m| stat(&m)));
                format!("stat {slot}: {known:?}")
            }
            2 => format!("list {path:?}: {}", said_io(names(&at), |names| format!("{names:?}"))),
            _ => format!("attributes {path:?}: {}", attributes(&at)),
        }
    }

    fn whole(&mut self, dice: &mut Dice) -> String {
        let slot = dice.below(SLOTS) as usize;
        if let Some(file) = &self.open[slot] {
            return format!("sync {slot}: {}", said_io(file.sync_all(), done));
        }
        "no file".into()
    }
}

fn names(at: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(at)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let letter = match () {
            () if kind.is_dir() => 'd',
            () if kind.is_symlink() => 'l',
            () if kind.is_file() => 'f',
            () if kind.is_fifo() => 'p',
            () => '?',
        };
        if entry.file_name() != "lost+found" {
            names.push(format!("{letter} {:?}", entry.file_name()));
        }
    }
    names.sort();
    Ok(names)
}

fn attributes(at: &Path) -> String {
    let mut list = vec![0; 65536];
    let Ok(len) = llistxattr(at, &mut list) else { return "none".into() };
    let mut found = BTreeMap::new();
    for name in list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 65536];
        let text = said(lgetxattr(at, name, &mut value), |len| digest(&value[..len]));
        found.insert(String::from_utf8_lossy(name).into_owned(), text);
    }
    format!("{found:?}")
}

/// Where a file has data.
fn holes(file: &File, size: u64) -> String {
    let (mut at, mut text) = (0, String::new());
    while at < size {
        let Ok(start) = seek(file, SeekFrom::Data(at)) else { break };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size);
        let _ = write!(text, "{start}-{end} ");
        at = end.max(start + 1);
    }
    text
}

/// All that is below a directory, with what it holds.
fn tree(root: &Path, with_holes: bool) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_path_buf()];
    // Of a file with several names, which they are.
    let mut groups: BTreeMap<u64, PathBuf> = BTreeMap::new();
    while let Some(path) = left.pop() {
        let meta = path.symlink_metadata().unwrap();
        let name = path.strip_prefix(root).unwrap().to_path_buf();
        let mut text = format!("{} {}", stat(&meta), attributes(&path));
        if meta.is_dir() {
            let mut below: Vec<_> =
                fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
            below.retain(|path| path != &root.join("lost+found"));
            below.sort();
            left.extend(below);
        } else if meta.is_symlink() {
            let _ = write!(text, " -> {:?}", fs::read_link(&path).unwrap());
        } else if meta.is_file() {
            let file = File::open(&path).unwrap();
            if with_holes {
                text += &holes(&file, meta.size());
            }
            let _ = write!(text, " {}", digest(&fs::read(&path).unwrap()));
        }
        if meta.nlink() > 1 && !meta.is_dir() {
            let first = groups.entry(meta.ino()).or_insert_with(|| name.clone());
            let _ = write!(text, " one file with {first:?}");
        }
        found.insert(name, text);
    }
    found
}

/// When both sides have just been mounted, know no more than their disks, and no file was
/// preallocated: even the holes are the same.
const EXACTLY: &str = "mounted anew, to the last hole";

#[track_caller]
fn same_trees(kernel: &Path, ours: &Path, what: &str) {
    let anew = what == EXACTLY;
    let (kernel, ours) = (tree(kernel, anew), tree(ours, anew));
    for (path, text) in &kernel {
        assert_eq!(Some(text), ours.get(path), "{what}: {path:?} (left: the kernel's)");
    }
    assert_eq!(kernel.len(), ours.len(), "{what}: {ours:?}");
}

/// Two equal disks, mounted at `kernel` by the kernel and at `ours` in user space.
pub struct Twins {
    pub work: Work,
}

impl Twins {
    pub fn new(options: &str) -> Twins {
        let work = Work::new();
        File::create(work.path("plain.raw")).unwrap().set_len(96 << 20).unwrap();
        let words = format!("-q -F {options} plain.raw");
        work.run("mke2fs", words.split_whitespace()).succeeds();
        for side in ["kernel", "ours"] {
            work.vdisk(&format!("convert plain.raw {side}.q")).succeeds();
            fs::create_dir(work.path(side)).unwrap();
        }
        let twins = Twins { work };
        twins.mount();
        twins
    }

    pub fn mount(&self) {
        self.work.vdisk("mount kernel.q kernel").succeeds();
        self.work.vdisk("mount --user-space ours.q ours").succeeds();
    }

    pub fn umount(&self) {
        for side in ["kernel", "ours"] {
            self.work.vdisk(&format!("umount {side}")).succeeds();
        }
    }

    /// Fails unless e2fsck finds nothing to say of ours.
    pub fn is_clean(&self) {
        let flat = self.work.path("flat.raw");
        let _ = fs::remove_file(&flat);
        self.work.vdisk("convert --format raw ours.q flat.raw").succeeds();
        self.work.run("e2fsck", ["-f", "-n", "flat.raw"]).succeeds();
    }

    fn side(&self, name: &str, below: &str, preallocates: bool) -> Side {
        let root = self.work.path(name).join(below);
        fs::create_dir_all(&root).unwrap();
        Side::new(root, preallocates)
    }
}

impl Drop for Twins {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for side in ["kernel", "ours"] {
                let _ = self.work.run("umount", ["-l", side]);
            }
        }
    }
}

/// Runs `steps` steps on both sides; fails at the first answer that differs.
fn walk(twins: &Twins, below: &str, seed: u64, steps: u64) {
    let side = |name| twins.side(name, below, seed & 1 == 0);
    let (mut kernel, mut ours) = (side("kernel"), side("ours"));
    let mut dice = Dice(seed);
    let mut told = Vec::new();
    for step in 0..steps {
        let mut again = dice.clone();
        let (expected, got) = (kernel.step(&mut dice), ours.step(&mut again));
        told.push(expected.clone());
        if expected != got {
            let before = told.iter().rev().take(40).rev().cloned().collect::<Vec<_>>().join("\n");
            panic!(
                "VDISK_SEED={seed:#x}, step {step}:\n{before}\nthe kernel: {expected}\nours:       {got}"
            );
        }
        // What one of two equal calls does not need, the other does not need either.
        dice.0 = dice.0.max(again.0);
    }
}

pub fn first_seed() -> u64 {
    let text = std::env::var("VDISK_SEED").unwrap_or_default();
    let hex = text.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    hex.or(text.parse().ok()).unwrap_or(20_261_129)
}

#[test]
fn the_kernel_and_user_space_answer_alike_and_leave_the_same_trees() {
    if !(have(Need::Fuse) && have(Need::Root)) {
        return;
    }
    let rounds: Option<u64> = std::env::var("VDISK_TWIN_ROUNDS").ok().and_then(|n| n.parse().ok());
    let until = Instant::now() + Duration::from_secs(15);
    let mut round = 0;
    while rounds.map_or(round == 0 || Instant::now() < until, |rounds| round < rounds) {
        let seed = first_seed().wrapping_add(round * 0x1_0001);
        eprintln!("VDISK_SEED={seed:#x}");
        // The kernel writes pages: blocks are as long.
        let options = ["-t ext4 -b 4096", "-t ext3 -b 4096", "-t ext4 -b 4096 -O ^metadata_csum"];
        let options = options[round as usize % options.len()];
        with_own_mounts(|| agree(seed, options));
        round += 1;
    }
}

fn agree(seed: u64, options: &str) {
    let twins = Twins::new(options);
    walk(&twins, "", seed, 1500);
    let (kernel, ours) = (twins.work.path("kernel"), twins.work.path("ours"));
    for side in [&kernel, &ours] {
        rustix::fs::syncfs(File::open(side).unwrap()).unwrap();
    }
    same_trees(&kernel, &ours, "in use");
    twins.umount();
    twins.is_clean();
    twins.mount();
    // What was preallocated and then written, the kernel fills up with zeroes as it likes.
    same_trees(&kernel, &ours, if seed & 1 == 0 { "mounted anew" } else { EXACTLY });
    twins.umount();
}

#[test]
fn threads_do_not_disturb_each_other() {
    if !(have(Need::Fuse) && have(Need::Root)) {
        return;
    }
    with_own_mounts(|| {
        let twins = Twins::new("-t ext4 -b 4096");
        let seed = first_seed();
        std::thread::scope(|scope| {
            let twins = &twins;
            let run =
                |n: u64| move || walk(twins, &format!("thread{n}"), seed.wrapping_add(n), 400);
            let threads: Vec<_> = (0..4).map(|n| scope.spawn(run(n))).collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        let (kernel, ours) = (twins.work.path("kernel"), twins.work.path("ours"));
        same_trees(&kernel, &ours, "in use");
        twins.umount();
        twins.is_clean();
    });
}
