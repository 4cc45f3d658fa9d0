//! Which system calls are let through, and with which arguments: for a process, by its work, and for the
//! narrower kinds of threads. All others fail with `EPERM`.
//!
//! No list has a call that runs a program, makes a process, a socket or a connection, mounts, looks into other
//! processes, changes who this one is, or lets the kernel run what it is given: execve, fork, socket,
//! connect, ptrace, process_vm_writev, mount, setns, bpf, io_uring_setup, keyctl and so on.

use std::collections::BTreeMap;

use libc::*;
use rustix::thread::CapabilitySet;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Thread;
use super::rights::{FILES, NAMES as NAMES_OF_FILES};

/// What a process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// It runs a guest.
    Machine,
    /// It serves a disk over sockets.
    Server,
    /// It serves a disk to the kernel, as files.
    Files,
    /// It serves directories of the host to the kernel, one over the other.
    Overlay,
    /// It reads and writes disks, and ends.
    Command,
    /// It makes trees of files as others have them: links and devices, and programs that run as their owner.
    Trees,
    /// It opens, makes, names and removes files for another process.
    Broker,
    /// The same as [`Command`](Work::Command), and asks servers of the internet for it.
    Client,
    /// The same, and asks servers to which another process connects it.
    Connected,
    /// It looks for files in a disk that is open, and hands over what it has found.
    Search,
}

/// What is let through.
pub(super) struct Calls {
    plain: Vec<&'static [i64]>,
    ioctls: Vec<&'static [u64]>,
    /// Calls that may have files run with the rights of their owner.
    set_id: &'static [i64],
    /// Whether of the conditional ones no others are let through than a broker's.
    alone: bool,
}

impl Work {
    /// What of it the superuser may do in it.
    pub(super) fn rights(self) -> CapabilitySet {
        match self {
            // Files of all kinds are made, as they are elsewhere.
            Work::Trees => FILES | CapabilitySet::MKNOD,
            // Threads that let others go first come back.
            Work::Files => FILES | CapabilitySet::SYS_NICE,
            Work::Overlay => FILES | CapabilitySet::MKNOD | CapabilitySet::SYS_NICE,
            Work::Machine | Work::Server | Work::Command | Work::Client | Work::Connected => FILES,
            Work::Broker => NAMES_OF_FILES,
            Work::Search => CapabilitySet::empty(),
        }
    }

    pub(super) fn calls(self) -> Calls {
        let (plain, ioctls): (&[&[i64]], &[&[u64]]) = match self {
            Work::Machine => (&[BASIC, NAMES, SOCKETS], &[PLAIN, TERMINAL, GUEST]),
            Work::Server => (&[BASIC, NAMES, SOCKETS], &[PLAIN, TERMINAL]),
            Work::Files => (&[BASIC, NAMES, SOCKETS, FOLLOW], &[PLAIN, CHANNEL]),
            Work::Overlay => (
                &[BASIC, NAMES, BENEATH, SOCKETS, FOLLOW, KINDS, HANDLES, MASK],
                &[PLAIN, CHANNEL, BACKING],
            ),
            Work::Command => (&[BASIC, NAMES, BENEATH], &[PLAIN, TERMINAL]),
            Work::Trees => (&[BASIC, NAMES, BENEATH, KINDS], &[PLAIN, TERMINAL]),
            Work::Broker => (&[BROKER, BENEATH], &[]),
            Work::Search => (&[BASIC, SOCKETS, MEMORY], &[PLAIN]),
            Work::Connected => (&[BASIC, NAMES, BENEATH, SOCKETS], &[PLAIN, TERMINAL]),
            Work::Client => (&[BASIC, NAMES, BENEATH, SOCKETS, CONNECT], &[PLAIN, TERMINAL]),
        };
        let set_id: &[i64] = match self {
            Work::Trees => OPEN_MODES,
            Work::Overlay => MODES,
            _ => &[],
        };
        let alone = self == Work::Broker;
        Calls { plain: plain.to_vec(), ioctls: ioctls.to_vec(), set_id, alone }
    }
}

impl Work {
    /// Whether it connects to servers.
    pub(super) fn connects(self) -> bool {
        self == Work::Client
    }
}

impl Thread {
    pub(super) fn calls(self) -> Calls {
        let (plain, ioctls): (&[&[i64]], &[&[u64]]) = match self {
            Thread::Processor => (&[BASIC], &[PLAIN, GUEST]),
            Thread::Queue => (&[BASIC], &[PLAIN]),
            Thread::Connection => (&[BASIC, SOCKETS], &[PLAIN]),
        };
        Calls { plain: plain.to_vec(), ioctls: ioctls.to_vec(), set_id: &[], alone: false }
    }
}

/// Time, memory, threads, and bytes of what is open; what files are called can be asked, and no file opened.
#[rustfmt::skip]
const BASIC: &[i64] = &[
    SYS_brk, SYS_close, SYS_copy_file_range, SYS_clock_getres, SYS_clock_gettime,
    SYS_clock_nanosleep, SYS_dup, SYS_dup2, SYS_dup3, SYS_epoll_create1, SYS_epoll_ctl,
    SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_wait, SYS_eventfd2, SYS_exit, SYS_exit_group,
    SYS_faccessat, SYS_faccessat2, SYS_access, SYS_fadvise64, SYS_fallocate, SYS_fcntl,
    SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr, SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync,
    SYS_ftruncate, SYS_futex, SYS_futex_waitv, SYS_getcpu, SYS_getcwd, SYS_getdents64,
    SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getgroups, SYS_getpgrp, SYS_getpid, SYS_getppid,
    SYS_getrandom, SYS_getresgid, SYS_getresuid, SYS_getrlimit, SYS_getrusage, SYS_gettid,
    SYS_gettimeofday, SYS_getuid, SYS_getxattr, SYS_lgetxattr, SYS_listxattr, SYS_llistxattr,
    SYS_lseek, SYS_lstat, SYS_madvise, SYS_membarrier, SYS_mlock, SYS_mremap, SYS_munlock,
    SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_pipe2, SYS_poll, SYS_ppoll, SYS_pread64,
    SYS_preadv, SYS_preadv2, SYS_pselect6, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read,
    SYS_readlink, SYS_readlinkat, SYS_readv, SYS_recvfrom, SYS_restart_syscall, SYS_rseq,
    SYS_rt_sigaction, SYS_rt_sigpending, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_rt_sigsuspend, SYS_rt_sigtimedwait, SYS_sched_getaffinity, SYS_sched_yield, SYS_select,
    SYS_sendfile, SYS_set_robust_list, SYS_shutdown, SYS_sigaltstack, SYS_splice, SYS_stat,
    SYS_statfs, SYS_statx, SYS_sync_file_range, SYS_sysinfo, SYS_time, SYS_times, SYS_uname,
    SYS_wait4, SYS_waitid, SYS_write, SYS_writev,
    // Refused by the other filter, so that it seems not to be there.
    SYS_clone3,
];

/// Files by name, as far as Landlock lets them through, and who may use them.
#[rustfmt::skip]
const NAMES: &[i64] = &[
    SYS_chmod, SYS_chown, SYS_creat, SYS_fchmod, SYS_fchmodat, SYS_fchmodat2, SYS_fchown,
    SYS_fchownat, SYS_fremovexattr, SYS_fsetxattr, SYS_lchown, SYS_link, SYS_linkat,
    SYS_lremovexattr, SYS_lsetxattr, SYS_mkdir, SYS_mkdirat, SYS_open, SYS_openat,
    SYS_removexattr, SYS_rename, SYS_renameat, SYS_renameat2, SYS_rmdir, SYS_setxattr, SYS_sync,
    SYS_syncfs, SYS_truncate, SYS_umask, SYS_unlink, SYS_unlinkat, SYS_utimensat,
];

/// Names in directories that are open, and packets with what was opened.
#[rustfmt::skip]
const BROKER: &[i64] = &[
    SYS_brk, SYS_close, SYS_exit, SYS_exit_group, SYS_fstat, SYS_futex, SYS_linkat, SYS_madvise,
    SYS_mremap, SYS_munmap, SYS_newfstatat, SYS_openat, SYS_recvmsg, SYS_renameat, SYS_renameat2,
    SYS_restart_syscall, SYS_rt_sigreturn, SYS_sendmsg, SYS_unlinkat,
];

/// Beside those, as far as the conditions below hold: memory that is no code, what a descriptor is.
const BROKER_IF: &[i64] = &[SYS_fcntl, SYS_mmap, SYS_mprotect];

/// A file below a directory, and not by way of a link: for what an archive names.
const BENEATH: &[i64] = &[SYS_openat2];

/// Files of other kinds: links and devices.
const KINDS: &[i64] = &[SYS_mknod, SYS_mknodat, SYS_symlink, SYS_symlinkat];

/// What tells a file from all others, to be known again.
const HANDLES: &[i64] = &[SYS_name_to_handle_at];

/// A file of this process's memory.
const MEMORY: &[i64] = &[SYS_memfd_create];

/// Connections that others make to sockets which are open.
#[rustfmt::skip]
const SOCKETS: &[i64] = &[
    SYS_accept, SYS_accept4, SYS_getpeername, SYS_getsockname, SYS_getsockopt, SYS_recvmsg,
    SYS_sendmsg, SYS_setsockopt,
];

/// Connections to servers of the internet, by names that other servers know; which sockets are made stands
/// below. None to programs of this host's by a file: they do as their user says.
const CONNECT: &[i64] = &[SYS_connect, SYS_recvmmsg, SYS_sendmmsg, SYS_socket];

/// A thread with a mask for modes of its own: which flags unshare(2) takes stands below.
const MASK: &[i64] = &[SYS_unshare];

/// A thread that goes where the program is which it answers, and lets it go first: which policies
/// sched_setscheduler(2) takes stands below.
const FOLLOW: &[i64] = &[SYS_sched_getscheduler, SYS_sched_setaffinity, SYS_sched_setscheduler];

/// Of files and sockets: FIONBIO, FIONREAD, FIOCLEX, FIONCLEX, FICLONE and FICLONERANGE.
const PLAIN: &[u64] = &[0x5421, 0x541b, 0x5451, 0x5450, 0x4004_9409, 0x4020_940d];

/// Of terminals, their settings and size alone: TCGETS, TCSETS, TCSETSW, TCSETSF, the same of TCGETS2, and
/// TIOCGWINSZ. None that types for the user.
const TERMINAL: &[u64] =
    &[0x5401, 0x5402, 0x5403, 0x5404, 0x802c_542a, 0x402c_542b, 0x402c_542c, 0x402c_542d, 0x5413];

/// Of KVM: KVM_RUN, KVM_GET_REGS and KVM_IRQ_LINE.
const GUEST: &[u64] = &[0xae80, 0x8090_ae81, 0x4008_ae61];

/// Of descriptors: to make another, flags, locks, the size of a pipe, what a memory file is sealed against. None
/// that has signals sent.
const DESCRIPTORS: &[u64] =
    &[0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, F_DUPFD_CLOEXEC as u64, 1031, 1032, 1034];

/// FUSE_DEV_IOC_CLONE: one more channel to the kernel.
const CHANNEL: &[u64] = &[0x8004_e500];

/// Calls that say what the mode of a file is to be that is made or open: one that Landlock has let through.
const OPEN_MODES: &[i64] = &[SYS_creat, SYS_fchmod, SYS_open, SYS_openat];

/// The same, and those of a file by its name, which may be any.
const MODES: &[i64] =
    &[SYS_chmod, SYS_creat, SYS_fchmod, SYS_fchmodat, SYS_fchmodat2, SYS_open, SYS_openat];

/// Files that the kernel uses in the place of a server's, FUSE_DEV_IOC_BACKING_OPEN and _CLOSE; and
/// FS_IOC_GETFSUUID.
const BACKING: &[u64] = &[0x4010_e501, 0x4004_e502, 0x8011_1500];

/// What an argument must be.
type Condition = (u8, SeccompCmpOp, u64);

/// All namespaces that clone(2) can make.
const NAMESPACES: u64 = 0x7e02_0000;
const THREAD: u64 = (CLONE_VM | CLONE_THREAD | CLONE_SIGHAND) as u64;
const STREAM: u64 = SOCK_STREAM as u64;
/// The bits of a socket's type that are not flags.
const TYPE: u64 = 0xf;
/// Set-user-id and set-group-id.
const SET_ID: u64 = 0o6000;
const SET_NAME: u64 = PR_SET_NAME as u64;
/// PR_SET_IO_FLUSHER: the kernel may wait for this thread to make room.
const SET_IO_FLUSHER: u64 = 57;
/// PR_SET_VMA: how memory is called in /proc.
const SET_VMA: u64 = 0x5356_4d41;

/// Calls with conditions on what they are given: one of the lists has to hold, all of it.
fn conditional(process: u32, calls: &Calls) -> Vec<(i64, Vec<Vec<Condition>>)> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let ioctls = &calls.ioctls;
    let own = u64::from(process);
    let executable = MaskedEq(PROT_EXEC as u64);
    let is = |argument, values: &[u64]| -> Vec<Vec<Condition>> {
        values.iter().map(|value| vec![(argument, Eq, *value)]).collect()
    };
    let ioctls: Vec<u64> = ioctls.iter().flat_map(|list| list.iter().copied()).collect();
    let operations =
        [SET_NAME, PR_GET_NAME as u64, SET_VMA, PR_SET_NO_NEW_PRIVS as u64, SET_IO_FLUSHER];
    // A file that is made or changed runs with the rights of whoever runs it.
    let mode = |argument| vec![vec![(argument, MaskedEq(SET_ID), 0)]];
    vec![
        (SYS_chmod, mode(1)),
        (SYS_creat, mode(1)),
        (SYS_fchmod, mode(1)),
        (SYS_fchmodat, mode(2)),
        (SYS_fchmodat2, mode(2)),
        (SYS_open, mode(2)),
        (SYS_openat, mode(3)),
        (SYS_mmap, vec![vec![(2, executable.clone(), 0)]]),
        (SYS_mprotect, vec![vec![(2, executable, 0)]]),
        // A thread, and no process.
        (SYS_clone, vec![vec![(0, MaskedEq(THREAD | NAMESPACES), THREAD)]]),
        (SYS_ioctl, is(1, &ioctls)),
        (SYS_fcntl, is(1, DESCRIPTORS)),
        (SYS_prctl, is(0, &operations)),
        // A further filter takes away, and gives nothing.
        (SYS_seccomp, is(0, &[u64::from(SECCOMP_SET_MODE_FILTER)])),
        // Signals to this process's own threads.
        (SYS_tgkill, is(0, &[own])),
        (SYS_kill, is(0, &[own])),
        // Limits are asked for and not set.
        (SYS_prlimit64, is(2, &[0])),
        // A directory to stand in, and a mask, of its own.
        (SYS_unshare, is(0, &[CLONE_FS as u64])),
        (SYS_sched_setscheduler, is(1, &[SCHED_OTHER as u64, SCHED_IDLE as u64])),
        // To where the socket is connected. A pair of datagram sockets could send anywhere.
        (SYS_sendto, is(4, &[0])),
        (SYS_socket, sockets()),
        (SYS_socketpair, vec![vec![(0, Eq, AF_UNIX as u64), (1, MaskedEq(TYPE), STREAM)]]),
    ]
}

/// Streams and datagrams of the internet.
fn sockets() -> Vec<Vec<Condition>> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let families = [AF_INET, AF_INET6].map(|family| family as u64);
    let kinds = [STREAM, SOCK_DGRAM as u64];
    let of = |family| kinds.map(|kind| vec![(0, Eq, family), (1, MaskedEq(TYPE), kind)]);
    families.into_iter().flat_map(of).collect()
}

/// The filter that lets `calls` through, in the process of this id.
pub(super) fn program(calls: &Calls, process: u32) -> seccompiler::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for number in calls.plain.iter().flat_map(|list| list.iter()) {
        rules.insert(*number, Vec::new());
    }
    for (number, cases) in conditional(process, calls) {
        let of_a_list = calls.alone && !BROKER_IF.contains(&number)
            || [NAMES, MASK, FOLLOW, CONNECT].iter().any(|list| list.contains(&number));
        if of_a_list && !rules.contains_key(&number) || calls.set_id.contains(&number) {
            continue;
        }
        let cases = cases.into_iter().map(rule).collect::<Result<_, _>>()?;
        rules.insert(number, cases);
    }
    compile(rules, SeccompAction::Errno(EPERM as u32), SeccompAction::Allow)
}

fn rule(conditions: Vec<Condition>) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = |(argument, operation, value): Condition| {
        // Wide where the kernel reads all of it.
        let wide = matches!(argument, 4) || value == 0 && matches!(operation, SeccompCmpOp::Eq);
        let len = if wide { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
        SeccompCondition::new(argument, len, operation, value)
    };
    SeccompRule::new(conditions.into_iter().map(condition).collect::<Result<_, _>>()?)
}

/// A filter for what is to seem absent: the C library does then with clone(2), whose flags can be looked at.
pub(super) fn absent() -> seccompiler::Result<BpfProgram> {
    let rules = BTreeMap::from([(SYS_clone3, Vec::new())]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(ENOSYS as u32))
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> seccompiler::Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)?;
    Ok(BpfProgram::try_from(filter)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_list_has_what_runs_programs_or_reaches_other_processes() {
        #[rustfmt::skip]
        let never = [
            SYS_execve, SYS_execveat, SYS_fork, SYS_vfork, SYS_socket, SYS_connect, SYS_bind,
            SYS_listen, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_pidfd_getfd,
            SYS_mount, SYS_umount2, SYS_setns, SYS_unshare, SYS_bpf, SYS_io_uring_setup, SYS_keyctl,
            SYS_userfaultfd, SYS_perf_event_open, SYS_open_by_handle_at, SYS_personality,
            SYS_memfd_create, SYS_setuid, SYS_capset, SYS_chroot, SYS_pivot_root,
        ];
        for list in [BASIC, NAMES, SOCKETS, KINDS, BROKER] {
            assert!(never.iter().all(|call| !list.contains(call)));
        }
        let opens = [SYS_open, SYS_openat, SYS_openat2, SYS_creat, SYS_unlink, SYS_rename];
        assert!(opens.iter().all(|call| !BASIC.contains(call) && !SOCKETS.contains(call)));
    }

    #[test]
    fn only_a_client_makes_sockets() {
        let works = [Work::Machine, Work::Server, Work::Files, Work::Overlay, Work::Command];
        for work in works.into_iter().chain([Work::Trees, Work::Connected]) {
            assert!(!work.calls().plain.contains(&CONNECT), "{work:?}");
        }
        assert!(!CONNECT.contains(&SYS_bind) && !CONNECT.contains(&SYS_listen));
    }

    #[test]
    fn every_filter_is_one_that_the_kernel_takes() {
        let works = [Work::Machine, Work::Server, Work::Files, Work::Overlay, Work::Command];
        let works =
            works.into_iter().chain([Work::Trees, Work::Broker, Work::Client, Work::Connected]);
        let works = works.map(Work::calls);
        let threads = [Thread::Processor, Thread::Queue, Thread::Connection].map(Thread::calls);
        for calls in works.chain(threads) {
            // BPF_MAXINSNS.
            assert!((1..=4096).contains(&program(&calls, 1).unwrap().len()));
        }
        assert!(!absent().unwrap().is_empty());
    }
}
