//! System calls that neither crate has: the one place for `unsafe` of a container.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;

pub(super) use crate::beside::copy;
pub(super) use libc::{seccomp_notif as Notification, sock_filter as Instruction};

/// What mount_setattr(2) sets on a mount.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Attributes {
    /// `MOUNT_ATTR_*` to set; none is taken away.
    pub(super) set: u64,
    /// On all mounts below, too.
    pub(super) recursive: bool,
}

/// Sets attributes on the mount whose root this descriptor is, and makes it private.
pub(super) fn set_attributes(mount: BorrowedFd<'_>, attributes: Attributes) -> io::Result<()> {
    let change = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    let recursive = if attributes.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path ends in NUL; the kernel reads one `mount_attr` of the length given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts a filter on the system calls of this thread and of all that it starts. With `listen`, a
/// descriptor is returned at which the calls appear that the filter hands over.
pub(super) fn load_filter(filter: &[Instruction], listen: bool) -> io::Result<Option<OwnedFd>> {
    let len = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    let flags = if listen { libc::SECCOMP_FILTER_FLAG_NEW_LISTENER } else { 0 };
    // SAFETY: the kernel reads `len` instructions from the slice and writes nothing.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    match (i32::try_from(result), listen) {
        (Ok(fd @ 0..), true) => {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
        }
        (Ok(0), false) => Ok(None),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for a call that a filter has handed over; `None` when nobody is left who could make one.
pub(super) fn next_call(listener: BorrowedFd<'_>) -> io::Result<Option<Notification>> {
    // SAFETY: all bytes zero is a value of this type, and the one that the kernel asks for.
    let mut call: Notification = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `seccomp_notif` to a live local.
    let result =
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
    if result == 0 {
        return Ok(Some(call));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Who made it is gone, or all are.
        Some(libc::ENOENT | libc::EINTR) => Ok(None),
        _ => Err(error),
    }
}

/// What a call that was handed over comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is done.
    Done,
    /// It fails with this error number.
    Failed(i32),
    /// The kernel shall do it as if there were no filter.
    Kernel,
}

/// Answers a call. One whose caller is gone needs no answer.
pub(super) fn answer(listener: BorrowedFd<'_>, call: &Notification, answer: Answer) {
    let (error, flags) = match answer {
        Answer::Done => (0, 0),
        Answer::Failed(number) => (-number, 0),
        Answer::Kernel => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
    };
    let mut reply = libc::seccomp_notif_resp { id: call.id, val: 0, error, flags };
    // SAFETY: the kernel reads one `seccomp_notif_resp` from a live local.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut reply) };
}

/// Whether the caller of a call still waits for its answer: until then its number is its own.
pub(super) fn waits(listener: BorrowedFd<'_>, call: &Notification) -> bool {
    let id = call.id;
    // SAFETY: the kernel reads one number from a live local.
    let result = unsafe {
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id)
    };
    result == 0
}

/// Puts this process into a session keyring of its own (keyctl(2)), where the kernel has keyrings.
pub(super) fn new_keyring() {
    const JOIN_SESSION_KEYRING: i32 = 1;
    let nameless: *const u8 = std::ptr::null();
    // SAFETY: the kernel reads no memory of ours: there is no name.
    unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, nameless) };
}

/// What whoever started this program has left open under this number, by agreement. It goes to no
/// program that this one starts.
pub(super) fn inherited(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads no memory of ours; it refuses a number of nothing that is open.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it is open, and was so before this program began: nothing here owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal, by number, to the process that a pidfd stands for.
pub(super) fn send_signal(process: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    let no_details: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the kernel reads no memory of ours: there are no details.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), number, no_details, 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
