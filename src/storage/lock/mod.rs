//! QEMU's byte-range locks: what an opener does, and what it suffers others to do.
//!
//! One byte stands for each permission. A process that uses a permission holds a shared lock on
//! byte `USED + permission`; one that does not share it holds a shared lock on byte
//! `UNSHARED + permission`. Two openers conflict where one uses what the other does not share.
//! This is the protocol of QEMU's file driver, so vdisk and QEMU exclude each other.
//!
//! One byte more, which QEMU does not look at, says that its holder is a command and will soon be
//! gone: who finds it held waits for a turn (see [`Manners`]).

mod turn;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, Result};
pub use turn::Turn;

const USED: i64 = 100;
const UNSHARED: i64 = 200;
/// Held by those who will soon be gone.
const PASSING: i64 = 300;
/// Held exclusively by who changes what a file says of itself while others read it.
const TURN_BYTE: i64 = 301;
/// Held by those who are making clones of what the file holds.
const CLONING: i64 = 302;

/// Permissions, by their bit.
const CONSISTENT_READ: u32 = 1;
const WRITE: u32 = 1 << 1;
const RESIZE: u32 = 1 << 3;
/// Bits that a permission may have.
const PERMISSIONS: u32 = 4;

/// What an opener of a file needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads, and relies on nobody writing.
    Read,
    /// Reads whatever others write meanwhile.
    ReadShared,
    /// Writes, alone.
    Write,
}

impl Access {
    fn used(self) -> u32 {
        match self {
            Access::Read => CONSISTENT_READ,
            Access::ReadShared => 0,
            Access::Write => CONSISTENT_READ | WRITE | RESIZE,
        }
    }

    fn unshared(self) -> u32 {
        match self {
            Access::Read | Access::Write => WRITE | RESIZE,
            Access::ReadShared => 0,
        }
    }
}

/// How this process stands in line for files that others hold.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manners {
    /// Whether it is a command, which holds files for as long as its work takes; not a mount, a
    /// container, a guest or a server.
    pub passing: bool,
    /// How long it waits for commands that hold what it needs. It does not wait for others.
    pub wait: Duration,
}

static MANNERS: OnceLock<Manners> = OnceLock::new();

/// Says how this process stands in line; the first word counts. Without one it waits for nobody, and
/// nobody for it.
pub fn set_manners(manners: Manners) {
    let _ = MANNERS.set(manners);
}

pub(super) fn manners() -> Manners {
    MANNERS.get().copied().unwrap_or_default()
}

/// Locks `file` for as long as its open file description lives, after commands that hold it now but
/// no later than `wait`.
///
/// # Errors
/// [`ErrorKind::InUse`], naming the process that holds it where it can be found.
pub(super) fn acquire(file: &File, access: Access, wait: Duration) -> Result<()> {
    acquire_beside(file, None, access, wait)
}

/// Goes over from one access to another, without a moment in which a third could come between. After
/// a failure the lock is what it was.
///
/// # Errors
/// As [`acquire`].
pub(super) fn change(file: &File, from: Access, to: Access) -> Result<()> {
    acquire_beside(file, Some(from), to, manners().wait)?;
    release(file, from, Some(to));
    Ok(())
}

fn acquire_beside(file: &File, held: Option<Access>, access: Access, wait: Duration) -> Result<()> {
    let since = Instant::now();
    while !try_acquire(file, access)? {
        // Two that saw each other come both go back: else each would wait for the other.
        release(file, access, held);
        let passed = since.elapsed();
        if passed >= PATIENCE && (passed >= wait || !is_held_by_other(file, PASSING)?) {
            return Err(in_use(file, access));
        }
        thread::sleep(pause(passed));
    }
    if manners().passing {
        hold(file, PASSING)?;
    }
    Ok(())
}

/// How long to sleep between two attempts: not the same for all who wait, and longer for those who
/// have waited long.
fn pause(passed: Duration) -> Duration {
    let spread = u64::from(std::process::id() % 7) + 3;
    Duration::from_millis(spread) + (passed / 50).min(PATIENCE)
}

/// Gives up what `access` needs and `kept` does not.
fn release(file: &File, access: Access, kept: Option<Access>) {
    let (used, unshared) = kept.map_or((0, 0), |kept| (kept.used(), kept.unshared()));
    for (base, bits) in [(USED, access.used() & !used), (UNSHARED, access.unshared() & !unshared)] {
        for byte in bytes(base, bits) {
            // What stays locked only keeps others out.
            let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, byte)));
        }
    }
}

/// Takes the turn of those who change what a file says of itself while others read it. It is given
/// back with the open file description.
///
/// # Errors
/// [`ErrorKind::InUse`] where another does not give it back for [`TURN`].
pub(super) fn take_turn(file: &File) -> Result<()> {
    let until = Instant::now() + TURN;
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, TURN_BYTE))) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::EACCES | Errno::EAGAIN) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(Errno::EACCES | Errno::EAGAIN) => return Err(in_use(file, Access::Write)),
            Err(Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(()),
            Err(errno) => return Err(Error::io("could not be locked", errno.into())),
        }
    }
}

/// Says that clones of the file are being made, for as long as its open file description lives.
pub(super) fn begin_clones(file: &File) -> Result<()> {
    hold(file, CLONING).map(drop)
}

/// Waits, no longer than `wait`, until nobody else is making clones of the file.
///
/// # Errors
/// [`ErrorKind::InUse`] where somebody is still.
pub(super) fn await_clones(file: &File, wait: Duration) -> Result<()> {
    let since = Instant::now();
    while is_held_by_other(file, CLONING)? {
        let passed = since.elapsed();
        if passed >= wait {
            let message = "clones of it are just being made";
            return Err(Error::new(ErrorKind::InUse, message));
        }
        thread::sleep(pause(passed));
    }
    Ok(())
}

/// How long a turn may last.
const TURN: Duration = Duration::from_secs(10);

/// How long a conflict may last before it counts. A process that has just closed a file holds it
/// for a moment longer where another of its threads is starting a program: between fork and exec
/// the child has all open files.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

/// Whether the lock was to be had. If not, a part of it may be held.
fn try_acquire(file: &File, access: Access) -> Result<bool> {
    for (base, bits) in [(USED, access.used()), (UNSHARED, access.unshared())] {
        for byte in bytes(base, bits) {
            if !hold(file, byte)? {
                return Ok(false);
            }
        }
    }
    // Set first, then look: of two that come at once, at least one sees the other.
    for (base, bits) in [(UNSHARED, access.used()), (USED, access.unshared())] {
        for byte in bytes(base, bits) {
            if is_held_by_other(file, byte)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Locks one byte for one holder; whether that could be done.
pub(super) fn take_byte(file: &File, byte: i64) -> Result<bool> {
    if !hold(file, byte)? {
        return Ok(false);
    }
    if !is_held_by_other(file, byte)? {
        return Ok(true);
    }
    // What stays locked only keeps others out.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, byte)));
    Ok(false)
}

/// Whether somebody else writes to the file.
pub(super) fn is_written(file: &File) -> Result<bool> {
    let mut bytes = bytes(USED, WRITE);
    bytes.try_fold(false, |held, byte| Ok(held || is_held_by_other(file, byte)?))
}

fn bytes(base: i64, bits: u32) -> impl Iterator<Item = i64> {
    (0..PERMISSIONS).filter(move |b| bits >> b & 1 != 0).map(move |b| base + i64::from(b))
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Whether the byte could be locked.
fn hold(file: &File, byte: i64) -> Result<bool> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            // A program that takes exclusive locks there; QEMU itself never does.
            Err(Errno::EACCES | Errno::EAGAIN) => return Ok(false),
            // A file system without locks protects nobody; refusing to work would not either.
            Err(Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(true),
            Err(errno) => return Err(Error::io("could not be locked", errno.into())),
        }
    }
}

fn is_held_by_other(file: &File, byte: i64) -> Result<bool> {
    let mut probe = range(libc::F_WRLCK, byte);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)) {
        Ok(_) => Ok(i32::from(probe.l_type) != libc::F_UNLCK),
        Err(Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(Error::io("could not be examined for locks", errno.into())),
    }
}

/// Device and inode number of a file.
type FileKey = (u64, u64);

/// Who had which file when this process could still see it.
static NOTED: Mutex<Vec<(FileKey, Vec<Holder>)>> = Mutex::new(Vec::new());

/// Notes who has the file now, for a process that will not see others any more. Costs next to nothing where
/// nobody has.
pub fn note_holders(file: &File) {
    let any = CONSISTENT_READ | WRITE | RESIZE;
    let held = [(USED, any), (UNSHARED, any)].into_iter().any(|(base, bits)| {
        bytes(base, bits).any(|byte| is_held_by_other(file, byte).unwrap_or(false))
    });
    if held && let Ok(meta) = file.metadata() {
        let mut noted = NOTED.lock().unwrap_or_else(PoisonError::into_inner);
        noted.push(((meta.dev(), meta.ino()), holders(file)));
    }
}

/// Who was noted for the file, and lives.
fn noted(file: &File) -> Vec<Holder> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let noted = NOTED.lock().unwrap_or_else(PoisonError::into_inner);
    let of_file = noted.iter().rev().find(|(of, _)| *of == (meta.dev(), meta.ino()));
    let mut holders = of_file.map(|(_, holders)| holders.clone()).unwrap_or_default();
    holders.retain(|holder| fs::metadata(format!("/proc/{}", holder.pid)).is_ok());
    holders
}

fn in_use(file: &File, access: Access) -> Error {
    let mut holders = holders(file);
    if holders.is_empty() {
        holders = noted(file);
    }
    let who = match &holders[..] {
        [] => "another process".to_owned(),
        some => some.iter().map(Holder::to_string).collect::<Vec<_>>().join(", "),
    };
    let doing = match access {
        Access::Write => "it cannot be written now",
        Access::Read | Access::ReadShared => "it is being written",
    };
    Error::new(ErrorKind::InUse, format!("is in use by {who}: {doing}"))
}

/// A process that has locks on a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command's name.
    pub command: String,
    /// Its command line, as far as it is known.
    pub doing: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)?;
        if self.doing.is_empty() { Ok(()) } else { write!(f, ", which runs `{}`", self.doing) }
    }
}

/// The other processes with an image lock on `file`, as far as this user may see them. The kernel
/// does not say who owns such a lock, but lists it with each open file.
pub fn holders(file: &File) -> Vec<Holder> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let inode = format!(":{}", meta.ino());
    let own = std::process::id();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != own && holds(*pid, &meta, &inode))
        .map(|pid| {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Holder { pid, command: command.trim_end().to_owned(), doing: command_line(pid) }
        })
        .collect()
}

/// The command line of a process, on one line and not longer than people read.
fn command_line(pid: u32) -> String {
    const LONGEST: usize = 120;
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = bytes.split(|b| *b == 0).filter(|word| !word.is_empty());
    let words: Vec<_> = words.map(|word| String::from_utf8_lossy(word)).collect();
    let line: String =
        words.join(" ").chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

fn holds(pid: u32, meta: &fs::Metadata, inode: &str) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.into_iter().any(|fd| {
        let same =
            fs::metadata(fd.path()).is_ok_and(|m| (m.dev(), m.ino()) == (meta.dev(), meta.ino()));
        same && fs::read_to_string(format!(
            "/proc/{pid}/fdinfo/{}",
            fd.file_name().to_string_lossy()
        ))
        .is_ok_and(|info| info.lines().any(|l| is_image_lock(l, inode)))
    })
}

/// Whether a line of fdinfo says an open-file-description lock on that inode.
fn is_image_lock(line: &str, inode: &str) -> bool {
    line.starts_with("lock:") && line.contains("OFDLCK") && line.contains(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for nobody.
    const NOW: Duration = Duration::ZERO;

    #[test]
    fn a_writer_excludes_readers_and_writers_but_not_shared_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let open = || {
            File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap()
        };
        let (a, b) = (open(), open());
        acquire(&a, Access::Write, NOW).unwrap();
        assert_eq!(acquire(&b, Access::Write, NOW).unwrap_err().kind(), ErrorKind::InUse);
        drop(b);
        let b = open();
        assert_eq!(acquire(&b, Access::Read, NOW).unwrap_err().kind(), ErrorKind::InUse);
        drop(b);
        acquire(&open(), Access::ReadShared, NOW).unwrap();
        drop(a);
        let (a, b) = (open(), open());
        acquire(&a, Access::Read, NOW).unwrap();
        acquire(&b, Access::Read, NOW).unwrap();
    }

    #[test]
    fn a_lock_changes_to_what_others_suffer_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let open = || {
            File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap()
        };
        let (a, b) = (open(), open());
        acquire(&a, Access::Write, NOW).unwrap();
        change(&a, Access::Write, Access::Read).unwrap();
        acquire(&b, Access::Read, NOW).unwrap();
        let refused = change(&a, Access::Read, Access::Write).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        // The failure has left nothing that would keep readers out.
        acquire(&open(), Access::Read, NOW).unwrap();
        drop(b);
        change(&a, Access::Read, Access::Write).unwrap();
        assert_eq!(acquire(&open(), Access::Read, NOW).unwrap_err().kind(), ErrorKind::InUse);
    }
}
