//! Which system calls a container may make: what podman's default profile allows and refuses
//! (containers-common, seccomp.json), and harmless calls that are younger than it.
//!
//! Data only; [`super`] makes a filter of it. A call that stands nowhere does not exist for the
//! container (`ENOSYS`): a program that asks for what is newer than this list falls back, as on an
//! older kernel.

use nix::libc::{EINVAL, EPERM};
use rustix::thread::CapabilitySet;

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    /// It fails with this error number.
    Fail(i32),
}

/// An argument that must have a value. Only the 32 bits count that the kernel reads of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u8,
    pub(super) value: u32,
}

const fn is(argument: u8, value: u32) -> Condition {
    Condition { argument, value }
}

/// Calls, and what becomes of them where all conditions hold. The first rule that fits counts.
pub(super) struct Rule {
    /// Separated by blanks; names that an architecture does not have are passed over.
    pub(super) names: &'static str,
    pub(super) verdict: Verdict,
    pub(super) conditions: &'static [Condition],
    /// Counts only with, or without, this capability.
    pub(super) with: Option<CapabilitySet>,
    pub(super) without: Option<CapabilitySet>,
}

const fn rule(names: &'static str, verdict: Verdict) -> Rule {
    Rule { names, verdict, conditions: &[], with: None, without: None }
}

/// A call that a capability is for: without it, it says so.
const fn needs(names: &'static str, capability: CapabilitySet) -> [Rule; 2] {
    [
        Rule { with: Some(capability), ..rule(names, Verdict::Allow) },
        Rule { without: Some(capability), ..rule(names, Verdict::Fail(EPERM)) },
    ]
}

const fn when(names: &'static str, verdict: Verdict, conditions: &'static [Condition]) -> Rule {
    Rule { conditions, ..rule(names, verdict) }
}

const fn without_audit(verdict: Verdict, conditions: &'static [Condition]) -> Rule {
    Rule { without: Some(CapabilitySet::AUDIT_WRITE), ..when("socket", verdict, conditions) }
}

const NETLINK: u32 = 16;
const AUDIT: u32 = 9;

/// All rules, in order.
pub(super) fn rules() -> impl Iterator<Item = Rule> {
    let plain = [
        rule(REFUSED, Verdict::Fail(EPERM)),
        rule(ALLOWED, Verdict::Allow),
        rule(YOUNGER, Verdict::Allow),
    ];
    let capabilities = [
        needs("open_by_handle_at", CapabilitySet::DAC_READ_SEARCH),
        needs(ADMINISTRATION, CapabilitySet::SYS_ADMIN),
        needs("chroot", CapabilitySet::SYS_CHROOT),
        needs("delete_module finit_module init_module query_module", CapabilitySet::SYS_MODULE),
        needs("acct", CapabilitySet::SYS_PACCT),
        needs("kcmp process_madvise", CapabilitySet::SYS_PTRACE),
        needs("ioperm iopl", CapabilitySet::SYS_RAWIO),
        needs("clock_settime clock_settime64 settimeofday stime", CapabilitySet::SYS_TIME),
        needs("vhangup", CapabilitySet::SYS_TTY_CONFIG),
    ];
    // Linux, as 32-bit programs see it, with addresses as they were, both, and to ask.
    let personality = const {
        [
            when("personality", Verdict::Allow, const { &[is(0, 0)] }),
            when("personality", Verdict::Allow, const { &[is(0, 8)] }),
            when("personality", Verdict::Allow, const { &[is(0, 0x20000)] }),
            when("personality", Verdict::Allow, const { &[is(0, 0x20008)] }),
            when("personality", Verdict::Allow, const { &[is(0, u32::MAX)] }),
        ]
    };
    // To programs that would write to the audit log it looks as if the kernel had none.
    let socket = [
        without_audit(Verdict::Fail(EINVAL), const { &[is(0, NETLINK), is(2, AUDIT)] }),
        rule("socket", Verdict::Allow),
    ];
    plain.into_iter().chain(capabilities.into_iter().flatten()).chain(personality).chain(socket)
}

const ADMINISTRATION: &str =
    "bpf fanotify_init lookup_dcookie perf_event_open quotactl setdomainname sethostname setns";

/// They fail as if a right were missing.
const REFUSED: &str = "\
    bdflush io_pgetevents kexec_file_load kexec_load migrate_pages move_pages nfsservctl nice \
    oldfstat oldlstat oldolduname oldstat olduname pciconfig_iobase pciconfig_read \
    pciconfig_write sgetmask ssetmask swapcontext swapoff swapon sysfs uselib userfaultfd \
    ustat vm86 vm86old vmsplice";

/// They are what any program needs.
const ALLOWED: &str = "\
    _llseek _newselect accept accept4 access adjtimex alarm bind brk capget capset chdir chmod \
    chown chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime \
    clock_gettime64 clock_nanosleep clock_nanosleep_time64 clone clone3 close close_range \
    connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl \
    epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve \
    execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate \
    fanotify_mark fchdir fchmod fchmodat fchown fchown32 fchownat fcntl fcntl64 fdatasync \
    fgetxattr flistxattr flock fork fremovexattr fsconfig fsetxattr fsmount fsopen fspick \
    fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_time64 \
    futimesat get_mempolicy get_robust_list get_thread_area getcpu getcwd getdents getdents64 \
    getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer \
    getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 \
    getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid \
    gettimeofday getuid getuid32 getxattr inotify_add_watch inotify_init inotify_init1 \
    inotify_rm_watch io_cancel io_destroy io_getevents io_setup io_submit ioctl ioprio_get \
    ioprio_set ipc keyctl kill landlock_add_rule landlock_create_ruleset \
    landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listxattr llistxattr \
    lremovexattr lseek lsetxattr lstat lstat64 madvise mbind membarrier memfd_create \
    memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mount \
    mount_setattr move_mount mprotect mq_getsetattr mq_notify mq_open mq_timedreceive \
    mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap msgctl msgget \
    msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open \
    open_tree openat openat2 pause pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 \
    pivot_root pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv \
    preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 \
    pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readdir readlink \
    readlinkat readv reboot recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages \
    removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction \
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min \
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval \
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop \
    semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_mempolicy \
    set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 \
    setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 \
    setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid \
    setsockopt setuid setuid32 setxattr shmat shmctl shmdt shmget shutdown sigaction \
    sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend \
    socketcall socketpair splice stat stat64 statfs statfs64 statx symlink symlinkat sync \
    sync_file_range syncfs syscall sysinfo syslog tee tgkill time timer_create timer_delete \
    timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd \
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times \
    tkill truncate truncate64 ugetrlimit umask umount umount2 uname unlink unlinkat unshare \
    utime utimensat utimensat_time64 utimes vfork wait4 waitid waitpid write writev \
    arch_prctl modify_ldt";

/// They came after the list above, and do what those on it could do before.
pub(super) const YOUNGER: &str = "\
    cachestat fchmodat2 futex_requeue futex_wait futex_waitv futex_wake getxattrat listxattrat \
    lsm_get_self_attr lsm_list_modules map_shadow_stack mseal removexattrat setxattrat \
    uretprobe";
