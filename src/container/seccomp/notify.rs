//! Owners that the kernel knows nothing of.
//!
//! Where a user namespace has one user, the kernel refuses to give a file to any other, before any
//! file system is asked. So calls that do are handed over to the host process (seccomp_unotify(2)),
//! which finds the file that is meant and has it noted whose it is. What is no file of the root's
//! file system is left to the kernel.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chroot, fchdir};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::super::sys::{self, Answer, Instruction, Notification};
use super::super::wire::{self, Message};
use super::{ARCH, ARCH_I386, ARCH_X86_64, IF_EQUAL, NUMBER, give, load, unless_equal};

/// Where it is noted whose a file is.
pub trait Owners: Send + Sync {
    /// Gives the file with this inode number to others; who is not given stays.
    ///
    /// # Errors
    /// What the caller in the container is told.
    fn give(&self, inode: u64, user: Option<u32>, group: Option<u32>) -> io::Result<()>;
}

/// How a call says which file it means.
#[derive(Clone, Copy)]
enum Names {
    Open,
    Path {
        follow: bool,
    },
    /// fchownat(2)
    At,
}

/// The calls: for 64-bit and 32-bit programs.
const CALLS: [(u32, u32, Names); 8] = [
    (ARCH_X86_64, 92, Names::Path { follow: true }),
    (ARCH_X86_64, 93, Names::Open),
    (ARCH_X86_64, 94, Names::Path { follow: false }),
    (ARCH_X86_64, 260, Names::At),
    (ARCH_I386, 212, Names::Path { follow: true }),
    (ARCH_I386, 207, Names::Open),
    (ARCH_I386, 198, Names::Path { follow: false }),
    (ARCH_I386, 298, Names::At),
];
const CAP_CHOWN: u32 = 0;

fn filter() -> Vec<Instruction> {
    let mut program = vec![load(ARCH)];
    for arch in [ARCH_X86_64, ARCH_I386] {
        let mut body = vec![load(NUMBER)];
        for (_, number, _) in CALLS.iter().filter(|call| call.0 == arch) {
            body.push(Instruction { code: IF_EQUAL, jt: 0, jf: 1, k: *number });
            body.push(give(libc::SECCOMP_RET_USER_NOTIF));
        }
        body.push(give(libc::SECCOMP_RET_ALLOW));
        program.extend(unless_equal(arch, body));
    }
    program.push(give(libc::SECCOMP_RET_ALLOW));
    program
}

/// The word by which the host process hears of [`hand_over`].
pub(in super::super) const LISTENER: &str = "listener";

/// From now on this process's calls are the host process's to do.
pub(in super::super) fn hand_over(host: &UnixStream) -> io::Result<()> {
    let listener = sys::load_filter(&filter(), true)?;
    let listener = listener.ok_or_else(|| io::Error::other("no listener"))?;
    wire::send(host, &Message::default().with(LISTENER, ""))?;
    wire::send_open(host, listener.as_fd())
}

/// A file to be given to others.
struct Gift {
    inode: u64,
    user: Option<u32>,
    group: Option<u32>,
    done: Sender<io::Result<()>>,
}

/// Answers calls until the container has ended. `device` is the number of the root's file system.
pub(in super::super) fn serve(
    listener: OwnedFd,
    device: u64,
    owners: Arc<dyn Owners>,
) -> io::Result<()> {
    let (gifts, given) = mpsc::channel::<Gift>();
    std::thread::Builder::new().name("owners".into()).spawn(move || {
        for gift in given {
            let _ = gift.done.send(owners.give(gift.inode, gift.user, gift.group));
        }
    })?;
    // It waits for file systems that this process may serve. Killed meanwhile, it must not keep them
    // alive: it has a file table of its own, with nothing of theirs in it.
    std::thread::Builder::new().name("chown".into()).spawn(move || {
        let worked = Finder::new(listener.as_fd(), device, gifts).and_then(|finder| finder.work());
        // There is nobody to tell: the callers learn it from the kernel, which answers for a
        // listener that is gone.
        let _ = worked;
    })?;
    Ok(())
}

/// The thread that finds which file is meant.
struct Finder<'a> {
    listener: BorrowedFd<'a>,
    proc: OwnedFd,
    /// The root's file system.
    device: u64,
    gifts: Sender<Gift>,
}

impl<'a> Finder<'a> {
    fn new(listener: BorrowedFd<'a>, device: u64, gifts: Sender<Gift>) -> io::Result<Finder<'a>> {
        unshare(CloneFlags::CLONE_FILES | CloneFlags::CLONE_FS)?;
        let keep = listener.as_raw_fd();
        crate::beside::close_others(&[keep])?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = openat(CWD, "/proc", flags, Mode::empty())?;
        Ok(Finder { listener, proc, device, gifts })
    }

    fn work(&self) -> io::Result<()> {
        loop {
            use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
            let mut fds = [PollFd::new(self.listener, PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => {}
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [listener] = &fds;
            if listener.revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)) {
                return Ok(());
            }
            if let Some(call) = sys::next_call(self.listener)? {
                sys::answer(self.listener, &call, self.answer(&call));
            }
        }
    }

    fn answer(&self, call: &Notification) -> Answer {
        match self.give(call) {
            Ok(Some(())) => Answer::Done,
            Ok(None) => Answer::Kernel,
            Err(error) => Answer::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }

    /// Does what the call asks for; nothing where that is the kernel's.
    fn give(&self, call: &Notification) -> io::Result<Option<()>> {
        let data = &call.data;
        let number = data.nr.cast_unsigned();
        let known = CALLS.iter().find(|(arch, nr, _)| (*arch, *nr) == (data.arch, number));
        let Some((.., names)) = known else { return Ok(None) };
        let first = if let Names::At = names { 2 } else { 1 };
        let id = |at: usize| data.args.get(at).map(|id| *id as u32).filter(|id| *id != u32::MAX);
        let (user, group) = (id(first), id(first + 1));
        // Root is who the kernel does know.
        let root = |id: Option<u32>| id.is_none_or(|id| id == 0);
        if (root(user) && root(group)) || !self.may(call)? {
            return Ok(None);
        }
        let file = self.find(call, *names)?;
        if !sys::waits(self.listener, call) {
            return Ok(None);
        }
        let meta = file.metadata()?;
        if meta.dev() != self.device {
            return Ok(None);
        }
        let (done, ended) = mpsc::channel();
        let gone = || io::Error::from_raw_os_error(libc::EIO);
        let gift = Gift { inode: meta.ino(), user, group, done };
        self.gifts.send(gift).map_err(|_| gone())?;
        ended.recv().map_err(|_| gone())?.map(Some)
    }

    /// Something of the caller's in /proc.
    fn open(&self, call: &Notification, name: &str, flags: OFlags) -> io::Result<File> {
        let path = format!("{}/{name}", call.pid);
        Ok(openat(&self.proc, path, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }

    /// Whether the caller may give files away.
    fn may(&self, call: &Notification) -> io::Result<bool> {
        let status = io::read_to_string(self.open(call, "status", OFlags::RDONLY)?)?;
        let word = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let bits = word.and_then(|word| u64::from_str_radix(word.trim(), 16).ok());
        Ok(bits.is_some_and(|bits| bits >> CAP_CHOWN & 1 != 0))
    }

    fn find(&self, call: &Notification, names: Names) -> io::Result<File> {
        let argument = |at: usize| call.data.args.get(at).copied().unwrap_or_default();
        let fd = |at: usize| {
            let number = argument(at) as u32 as i32;
            if number < 0 {
                return Err(io::Error::from_raw_os_error(libc::EBADF));
            }
            self.open(call, &format!("fd/{number}"), OFlags::PATH)
        };
        let (path, from, follow) = match names {
            Names::Open => return fd(0),
            Names::Path { follow } => (argument(0), None, follow),
            Names::At => {
                let flags = argument(4) as i32;
                let path = self.path(call, argument(1))?;
                let here = argument(0) as u32 as i32 == libc::AT_FDCWD;
                if path.as_os_str().is_empty() && flags & libc::AT_EMPTY_PATH != 0 && !here {
                    return fd(0);
                }
                let absolute = path.is_absolute() || here;
                let from = if absolute { None } else { Some(fd(0)?) };
                (argument(1), from, flags & libc::AT_SYMLINK_NOFOLLOW == 0)
            }
        };
        let path = self.path(call, path)?;
        // From the caller's root and directory, as the kernel would walk.
        let directory = OFlags::PATH | OFlags::DIRECTORY;
        fchdir(self.open(call, "root", directory)?)?;
        chroot(".")?;
        match from {
            Some(from) => fchdir(from)?,
            None => fchdir(self.open(call, "cwd", directory)?)?,
        }
        let mut flags = OFlags::PATH | OFlags::CLOEXEC;
        if !follow {
            flags |= OFlags::NOFOLLOW;
        }
        Ok(openat(CWD, &path, flags, Mode::empty())?.into())
    }

    /// A path in the caller's memory.
    fn path(&self, call: &Notification, mut at: u64) -> io::Result<PathBuf> {
        const PAGE: u64 = 4096;
        let memory = self.open(call, "mem", OFlags::RDONLY)?;
        let mut path = Vec::new();
        while path.len() < libc::PATH_MAX as usize {
            // What follows the path may be nobody's.
            let mut bytes = vec![0; (PAGE - at % PAGE) as usize];
            let fault = |_| io::Error::from_raw_os_error(libc::EFAULT);
            let read = memory.read_at(&mut bytes, at).map_err(fault)?;
            let bytes = bytes.get(..read).unwrap_or_default();
            if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
                path.extend_from_slice(bytes.get(..end).unwrap_or_default());
                return Ok(OsString::from_vec(path).into());
            }
            if read == 0 {
                return Err(io::Error::from_raw_os_error(libc::EFAULT));
            }
            path.extend_from_slice(bytes);
            at += read as u64;
        }
        Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG))
    }
}
