//! The one place for `unsafe` in this crate: what a process that serves its own mounts needs.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::Pid;

use crate::layer::FileHandle;

/// Closes every descriptor above 2 except these in this thread's file table, which must be its own.
pub(crate) fn close_all_but(mut kept: Vec<i32>) -> io::Result<()> {
    kept.sort_unstable();
    let mut next = 3;
    for fd in kept.into_iter().filter_map(|fd| u32::try_from(fd).ok()).filter(|fd| *fd > 2) {
        if fd > next {
            close_range(next, fd - 1)?;
        }
        next = fd + 1;
    }
    close_range(next, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: called only after the thread got a file table of its own: every owned descriptor of
    // the process stays open in the table that its owner uses.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes a descriptor that a message on a socket has brought into this process.
pub(crate) fn received(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for the receiver of the message, who hands
    // it on to here and nowhere else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// fchmodat2(2) of a name in a directory, which is not followed, or of what is open where the name
/// is empty; `EOPNOTSUPP` of a symbolic link, `ENOSYS` before Linux 6.6.
pub(crate) fn chmod_at(dir: BorrowedFd<'_>, name: &[u8], mode: u32) -> io::Result<()> {
    const FCHMODAT2: libc::c_long = 452;
    let name = CString::new(name)?;
    let empty = if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    let flags = libc::AT_SYMLINK_NOFOLLOW | empty;
    // SAFETY: the name ends in NUL, and nothing is written.
    let result = unsafe { libc::syscall(FCHMODAT2, dir.as_raw_fd(), name.as_ptr(), mode, flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// mount_setattr(2): nothing is changed any more by way of an open mount, and reading there leaves the times of
/// files as they are.
pub(crate) fn only_read(mount: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOATIME,
        attr_clr: libc::MOUNT_ATTR__ATIME,
        propagation: 0,
        userns_fd: 0,
    };
    let (fd, flags, len) = (mount.as_raw_fd(), libc::AT_EMPTY_PATH, size_of_val(&attr));
    // SAFETY: the path ends in NUL, `attr` is as long as `len` says, and the kernel only reads it.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &raw mut attr, len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes out what the page cache holds of an open file and waits for it: its bytes are with the disk
/// then, maybe in the disk's own memory, and what says where they are may not be.
pub(crate) fn write_out(file: BorrowedFd<'_>) -> io::Result<()> {
    let whole = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, whole) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether this thread is scheduled as others are (`SCHED_OTHER`).
pub(crate) fn runs_as_others() -> bool {
    // SAFETY: the call takes a number only.
    unsafe { libc::sched_getscheduler(0) == libc::SCHED_OTHER }
}

/// Has a thread, or this one, let every other go first (`SCHED_IDLE`), or run as others do again.
pub(crate) fn yield_always(thread: Option<Pid>, always: bool) -> io::Result<()> {
    let policy = if always { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
    let param = libc::sched_param { sched_priority: 0 };
    let thread = thread.map_or(0, |thread| thread.as_raw_nonzero().get());
    // SAFETY: the kernel reads one `sched_param` from the pointer, which is to a live local.
    let result = unsafe { libc::sched_setscheduler(thread, policy, &raw const param) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `struct file_handle` with room for the longest.
#[repr(C)]
struct HandleRoom {
    bytes: u32,
    kind: i32,
    handle: [u8; 128],
}

/// name_to_handle_at(2) of a name in a directory, or of what is open where the name is empty. A
/// symbolic link is not followed.
pub(crate) fn name_to_handle(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<FileHandle> {
    let name = CString::new(name)?;
    let mut room = HandleRoom { bytes: 128, kind: 0, handle: [0; 128] };
    let mut mount = 0i32;
    let flags = if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    // SAFETY: the name ends in NUL; the kernel writes at most `bytes` bytes behind the two
    // numbers of the handle, which has room for as many, and one number for the mount.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw mut room,
            &raw mut mount,
            flags,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let unknown = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    let kind = u8::try_from(room.kind).map_err(|_| unknown())?;
    let bytes = room.handle.get(..room.bytes as usize).ok_or_else(unknown)?.to_vec();
    Ok(FileHandle { kind, bytes })
}

/// `struct fsuuid2`.
#[repr(C)]
struct Uuid {
    len: u8,
    uuid: [u8; 16],
}

const FS_IOC_GETFSUUID: libc::Ioctl = 0x8011_1500;

/// The UUID of the file system that an open file is on.
pub(crate) fn file_system_uuid(fd: BorrowedFd<'_>) -> io::Result<[u8; 16]> {
    let mut uuid = Uuid { len: 0, uuid: [0; 16] };
    // SAFETY: the kernel writes one `fsuuid2` to the pointer, which is to a live local.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_GETFSUUID, &raw mut uuid) };
    match (result, uuid.len) {
        (0, 16) => Ok(uuid.uuid),
        (0, _) => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

const DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500;
const DEV_IOC_BACKING_OPEN: libc::Ioctl = 0x4010_e501;
const DEV_IOC_BACKING_CLOSE: libc::Ioctl = 0x4004_e502;

/// Makes `device`, freshly opened, one more channel of the connection of `of`.
pub(crate) fn clone_device(device: BorrowedFd<'_>, of: BorrowedFd<'_>) -> io::Result<()> {
    let number = of.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32 from the pointer, which is to a live local.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), DEV_IOC_CLONE, &raw const number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives the kernel a file that it may use in the place of one of ours, and returns its number.
pub(crate) fn open_backing(device: BorrowedFd<'_>, fd: i32) -> io::Result<u32> {
    let map = BackingMap { fd, flags: 0, padding: 0 };
    // SAFETY: the kernel reads one `fuse_backing_map` from the pointer, to a live local.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), DEV_IOC_BACKING_OPEN, &raw const map) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Takes such a number back.
pub(crate) fn close_backing(device: BorrowedFd<'_>, number: u32) -> io::Result<()> {
    // SAFETY: the kernel reads one u32 from the pointer, which is to a live local.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), DEV_IOC_BACKING_CLOSE, &raw const number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
