//! QEMU's byte-range locks: what an opener does, and what it suffers others to do.
//!
//! One byte stands for each permission. A process that uses a permission holds a shared lock on
//! byte `USED + permission`; one that does not share it holds a shared lock on byte
//! `UNSHARED + permission`. Two openers conflict where one uses what the other does not share.
//! This is the protocol of QEMU's file driver, so vdisk and QEMU exclude each other.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, Result};

const USED: i64 = 100;
const UNSHARED: i64 = 200;

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

/// Locks `file` for as long as its open file description lives.
///
/// # Errors
/// [`ErrorKind::InUse`], naming the process that holds it where it can be found.
pub(super) fn acquire(file: &File, access: Access) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match try_acquire(file, access) {
            Err(e) if e.kind() == ErrorKind::InUse && Instant::now() < until => {
                thread::sleep(PATIENCE / 10);
            }
            done => return done,
        }
    }
}

/// Goes over from one access to another, without a moment in which a third could come between. After
/// a failure the lock is what it was.
///
/// # Errors
/// As [`acquire`].
pub(super) fn change(file: &File, from: Access, to: Access) -> Result<()> {
    let done = acquire(file, to);
    let (keep, drop) = if done.is_ok() { (to, from) } else { (from, to) };
    let release =
        [(USED, drop.used() & !keep.used()), (UNSHARED, drop.unshared() & !keep.unshared())];
    for (base, bits) in release {
        for byte in bytes(base, bits) {
            // What stays locked only keeps others out.
            let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, byte)));
        }
    }
    done
}

/// How long a conflict may last before it counts. A process that has just closed a file holds it
/// for a moment longer where another of its threads is starting a program: between fork and exec
/// the child has all open files.
const PATIENCE: Duration = Duration::from_millis(100);

fn try_acquire(file: &File, access: Access) -> Result<()> {
    for (base, bits) in [(USED, access.used()), (UNSHARED, access.unshared())] {
        for byte in bytes(base, bits) {
            hold(file, byte)?;
        }
    }
    // Set first, then look: of two that come at once, at least one sees the other.
    for (base, bits) in [(UNSHARED, access.used()), (USED, access.unshared())] {
        for byte in bytes(base, bits) {
            if is_held_by_other(file, byte)? {
                return Err(in_use(file, access));
            }
        }
    }
    Ok(())
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

fn hold(file: &File, byte: i64) -> Result<()> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            // A program that takes exclusive locks there; QEMU itself never does.
            Err(Errno::EACCES | Errno::EAGAIN) => return Err(in_use(file, Access::Read)),
            // A file system without locks protects nobody; refusing to work would not either.
            Err(Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(()),
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

fn in_use(file: &File, access: Access) -> Error {
    let holders = holders(file);
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
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
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
            Holder { pid, command: command.trim_end().to_owned() }
        })
        .collect()
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

    #[test]
    fn a_writer_excludes_readers_and_writers_but_not_shared_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let open = || {
            File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap()
        };
        let (a, b) = (open(), open());
        acquire(&a, Access::Write).unwrap();
        assert_eq!(acquire(&b, Access::Write).unwrap_err().kind(), ErrorKind::InUse);
        drop(b);
        let b = open();
        assert_eq!(acquire(&b, Access::Read).unwrap_err().kind(), ErrorKind::InUse);
        drop(b);
        acquire(&open(), Access::ReadShared).unwrap();
        drop(a);
        let (a, b) = (open(), open());
        acquire(&a, Access::Read).unwrap();
        acquire(&b, Access::Read).unwrap();
    }

    #[test]
    fn a_lock_changes_to_what_others_suffer_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let open = || {
            File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap()
        };
        let (a, b) = (open(), open());
        acquire(&a, Access::Write).unwrap();
        change(&a, Access::Write, Access::Read).unwrap();
        acquire(&b, Access::Read).unwrap();
        let refused = change(&a, Access::Read, Access::Write).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        // The failure has left nothing that would keep readers out.
        acquire(&open(), Access::Read).unwrap();
        drop(b);
        change(&a, Access::Read, Access::Write).unwrap();
        assert_eq!(acquire(&open(), Access::Read).unwrap_err().kind(), ErrorKind::InUse);
    }
}
