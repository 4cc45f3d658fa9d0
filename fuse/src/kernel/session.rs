//! A tree of files served to the kernel: the first greeting, and the threads that answer. Knows
//! nothing of what the tree is.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::io::{Errno, read, writev};

use crate::files::{Files, Keeping};
use crate::kernel::Kernel;
use crate::kernel::crew::Crew;
use crate::kernel::device::Device;
use crate::kernel::dispatch::{Answer, Dispatch, MAX_REQUEST, REPLY_ROOM};
use crate::kernel::linger::{Linger, Lookout};
use crate::kernel::near::{self, Asker, Near};
use crate::kernel::pipe::Pipe;
use crate::kernel::wire::{self, Header, Reader, Reply, init, op};

/// Requests that the kernel may have under way without a waiting caller (readahead, writeback).
const MAX_BACKGROUND: u16 = 64;
/// What a request has besides its data.
const REQUEST_HEAD: usize = 4096;

/// Answers the kernel's greeting on a device that a mount has just been given, and starts
/// `threads` threads that serve `files` until the mount is gone. The handle's thread ends last.
pub(crate) fn serve(
    device: Device,
    files: Arc<dyn Files>,
    keeping: Keeping,
    threads: usize,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let passthrough = greet(&device, keeping, files.backing_depth())?;
    let device = Arc::new(device);
    files.start(Kernel { device: device.clone(), passthrough });
    let mut channels = vec![device.clone()];
    while channels.len() < threads {
        channels.push(Arc::new(device.channel()?));
    }
    std::thread::Builder::new().name("fuse".into()).spawn(move || {
        // The kernel may wait for this server to make room in memory: its threads must neither
        // wait for such room nor be slowed by dirty pages that only they can clean. Without the
        // right to say so (CAP_SYS_RESOURCE) a server is as good as any other. The workers
        // inherit it from this thread.
        let _ = rustix::process::configure_io_flusher_behavior(true);
        let crew = Crew::new(channels.len());
        let lookout = Lookout::new();
        let (crew, lookout, files_now, near) = (&crew, &lookout, files.as_ref(), near::allowed());
        let run = |channel: &Device, number| {
            let post = Post { crew, lookout, number, near };
            let ended = worker(channel, files_now, keeping, &post);
            crew.gone(ended.is_err());
            ended
        };
        let ended = std::thread::scope(|scope| {
            let named = || std::thread::Builder::new().name("fuse-worker".into());
            let workers: Vec<_> = channels
                .iter()
                .enumerate()
                .map(|(number, channel)| named().spawn_scoped(scope, move || run(channel, number)))
                .collect();
            crew.look_after(&|| near::ready(device.as_fd()));
            let mut ended = Ok(());
            for worker in workers {
                let one = worker.map(|worker| worker.join().unwrap_or_else(|_| Err(panicked())));
                ended = ended.and(one.flatten());
            }
            ended
        });
        files.end();
        ended
    })
}

fn panicked() -> io::Error {
    io::Error::other("a FUSE thread panicked")
}

/// FUSE_INIT. Returns whether the kernel can use other files in the place of ours.
fn greet(device: &Device, keeping: Keeping, depth: u32) -> io::Result<bool> {
    let mut request = vec![0; MAX_REQUEST + REQUEST_HEAD];
    loop {
        let len = receive(device, &mut request, || ())?
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        let (head, mut body) = Reader::request(request.get(..len).unwrap_or_default())?;
        let (major, minor) = (body.u32()?, body.u32()?);
        let mut out = Reply::new(Vec::new());
        if head.opcode != wire::op::INIT || major < 7 || (major == 7 && minor < wire::OLDEST_MINOR)
        {
            let bytes = out.finish(head.unique, libc::EPROTO);
            writev(device.as_fd(), &[IoSlice::new(bytes)])?;
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        if major > 7 {
            // It will ask again with what we speak.
            out.u32(7).u32(wire::MINOR).bytes(&[0; 56]);
            writev(device.as_fd(), &[IoSlice::new(out.finish(head.unique, 0))])?;
            continue;
        }
        // What the kernel reads ahead is its own setting, which may have been raised since it asked; the
        // least of both counts.
        body.u32()?;
        let mut offered = u64::from(body.u32()?);
        if offered & init::INIT_EXT != 0 {
            offered |= u64::from(body.u32()?) << 32;
        }
        let flags = offered & wanted(keeping);
        out.u32(7).u32(wire::MINOR).u32(MAX_REQUEST as u32).u32(flags as u32);
        out.u16(MAX_BACKGROUND).u16(MAX_BACKGROUND / 4 * 3);
        out.u32(MAX_REQUEST as u32).u32(1).u16((MAX_REQUEST / 4096) as u16).u16(0);
        let passthrough = flags & init::PASSTHROUGH != 0;
        out.u32((flags >> 32) as u32).u32(if passthrough { depth } else { 0 }).bytes(&[0; 24]);
        writev(device.as_fd(), &[IoSlice::new(out.finish(head.unique, 0))])?;
        return Ok(passthrough);
    }
}

fn wanted(keeping: Keeping) -> u64 {
    // The kernel does not mix its own written pages with files that it writes elsewhere.
    let writing = if keeping.writeback { init::WRITEBACK_CACHE } else { init::PASSTHROUGH };
    writing
        | init::ASYNC_READ
        | init::ATOMIC_O_TRUNC
        | init::EXPORT_SUPPORT
        | init::BIG_WRITES
        | init::DONT_MASK
        | init::DO_READDIRPLUS
        | init::READDIRPLUS_AUTO
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::POSIX_ACL
        | init::MAX_PAGES
        | init::CACHE_SYMLINKS
        | init::NO_OPENDIR_SUPPORT
        | init::EXPLICIT_INVAL_DATA
        | init::HANDLE_KILLPRIV_V2
        | init::SETXATTR_EXT
        | init::INIT_EXT
        | init::DIRECT_IO_ALLOW_MMAP
}

/// The next request; `None` when the mount is gone. `wait` is called where there is none yet and the device is
/// not waited for.
fn receive(
    device: &Device,
    buffer: &mut [u8],
    mut wait: impl FnMut(),
) -> io::Result<Option<usize>> {
    loop {
        match read(device.as_fd(), &mut *buffer) {
            Ok(len) => return Ok(Some(len)),
            Err(Errno::AGAIN) => wait(),
            // The request was interrupted before anybody took it.
            Err(Errno::NOENT | Errno::INTR) => {}
            // The same of a request that the unmount finds just taken from the queue.
            Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Where a worker stands.
struct Post<'a> {
    crew: &'a Crew,
    lookout: &'a Lookout,
    /// Its number in the crew.
    number: usize,
    /// Whether it may follow who asks.
    near: bool,
}

/// Who made a request. A thread that is just becoming another program (execve(2)) cannot be looked at until it
/// is, and what it asks for meanwhile has to be answered first: it closes files, whose last times are told then,
/// and asks whose the program is.
fn asker(head: &Header) -> Asker {
    let shown = matches!(
        head.opcode,
        op::LOOKUP
            | op::READLINK
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::OPEN
            | op::CREATE
            | op::TMPFILE
            | op::READ
            | op::WRITE
            | op::READDIR
            | op::READDIRPLUS
            | op::FSYNC
            | op::FSYNCDIR
            | op::STATFS
            | op::SETXATTR
            | op::LISTXATTR
            | op::REMOVEXATTR
            | op::FALLOCATE
            | op::LSEEK
            | op::COPY_FILE_RANGE
    );
    Asker { thread: head.caller.pid, shown }
}

/// Answers requests until the mount is gone.
fn worker(device: &Device, files: &dyn Files, keeping: Keeping, post: &Post<'_>) -> io::Result<()> {
    files.thread()?;
    let dispatch = Dispatch { files, keeping };
    let (mut request, mut buffer) = (Vec::new(), Vec::new());
    let (mut linger, mut pipe) = (Linger::default(), Pipe::default());
    let Some(place) = post.crew.place(post.number) else { return Ok(()) };
    let mut near = Near::new(place, device.as_fd(), post.near);
    while let Some(duty) = post.crew.enter(post.number) {
        // Not before it is needed: some never are.
        request.resize(MAX_REQUEST + REQUEST_HEAD, 0);
        buffer.reserve(REPLY_ROOM);
        loop {
            if !near.settled() {
                linger.look(post.lookout, device.as_fd());
            }
            let Some(len) = receive(device, &mut request, || near.wait())? else {
                return Ok(());
            };
            linger.came();
            duty.begin();
            let (head, body) = Reader::request(request.get(..len).unwrap_or_default())?;
            near.came(asker(&head), len);
            let mut out = Reply::new(buffer);
            match dispatch.answer(&head, body, &mut out, &mut pipe) {
                Answer::Reply => {
                    let answer = out.whole();
                    near.hand_over(answer.len(), || {
                        // Whoever asked may be gone; then what he was given is the kernel's to give back.
                        let _ = writev(device.as_fd(), &[IoSlice::new(answer)]);
                    });
                }
                Answer::Piped(len) => {
                    near.hand_over(len, || pipe.send(device.as_fd(), len));
                }
                Answer::Nothing => {}
            }
            buffer = out.into_buffer();
            if !duty.done() {
                break;
            }
        }
        near.leave();
    }
    Ok(())
}
