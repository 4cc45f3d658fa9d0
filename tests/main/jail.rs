//! The jail around work on disks: calls are made in place of each process and each of its threads, as code
//! that took it over would make them, and are refused.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::signal::Signal;

use crate::boot::{Booted, can_boot};
use crate::host::Work;
use crate::mount::soon;
use crate::puppet::{Puppet, Word, threads};
use crate::require::{Need, have};
use crate::serve::Served;

pub const SIZE: usize = 8 << 20;

/// What an attacker is after: a file of the user's, the base of the disk, and a place for a program of his.
pub struct Prey {
    pub secret: PathBuf,
    pub base: PathBuf,
    pub program: PathBuf,
}

/// A disk in a directory of its own, on a base in another; and what is elsewhere.
pub fn scene() -> (Work, Prey) {
    let work = Work::new();
    for dir in ["bases", "disks", "elsewhere", "out", "sockets"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    work.put("bases/base.raw", vec![0x11; SIZE]);
    work.put("elsewhere/secret", "a key");
    work.vdisk("clone bases/base.raw disks/clone.qcow2").succeeds();
    let prey = Prey {
        secret: work.path("elsewhere/secret"),
        base: work.path("bases/base.raw"),
        program: work.path("elsewhere/program"),
    };
    (work, prey)
}

/// A call: what it is for, its number, what it is given.
type Attack<'a> = (&'static str, i64, Vec<Word<'a>>);

/// Calls that code would make that has taken over a process, none of which does harm where it is let through.
fn attacks(prey: &Prey) -> Vec<Attack<'_>> {
    use Word::{Is, Path as At, Stack};
    let here = Is(i64::from(libc::AT_FDCWD));
    let is = |flags: i32| Is(i64::from(flags));
    let executable = is(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    let anonymous = is(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let made = is(libc::O_CREAT | libc::O_RDWR);
    let internet = is(libc::AF_INET);
    vec![
        ("read a file", libc::SYS_openat, vec![here, At(&prey.secret), is(libc::O_RDONLY)]),
        ("write the base", libc::SYS_openat, vec![here, At(&prey.base), is(libc::O_RDWR)]),
        ("make a file", libc::SYS_openat, vec![here, At(&prey.program), made, Is(0o700)]),
        ("map code", libc::SYS_mmap, vec![Is(0), Is(4096), executable, anonymous, Is(-1)]),
        ("make a stack code", libc::SYS_mprotect, vec![Stack, Is(4096), executable]),
        ("a socket to the world", libc::SYS_socket, vec![internet, is(libc::SOCK_STREAM)]),
        ("a socket to the host", libc::SYS_socket, vec![is(libc::AF_UNIX), is(libc::SOCK_STREAM)]),
        // PTRACE_SEIZE of nobody, and what no process can be given.
        ("trace a process", libc::SYS_ptrace, vec![Is(0x4206), Is(0)]),
        (
            "write to a process",
            libc::SYS_process_vm_writev,
            vec![Is(1), Is(0), Is(0), Is(0), Is(0)],
        ),
        ("lend its rights to all", libc::SYS_chmod, vec![At(&prey.secret), Is(0o4755)]),
        // F_SETSIG.
        ("have a signal sent", libc::SYS_fcntl, vec![Is(0), Is(10), Is(9)]),
        ("signal a process", libc::SYS_kill, vec![Is(1), Is(0)]),
        // An empty one, where it could be made.
        ("run a program", libc::SYS_execve, vec![At(&prey.program)]),
        ("remove a file", libc::SYS_unlink, vec![At(&prey.secret)]),
        ("enter a namespace", libc::SYS_setns, vec![Is(-1), Is(0)]),
        ("leave a namespace", libc::SYS_unshare, vec![Is(0)]),
        ("mount", libc::SYS_mount, vec![]),
        ("load a kernel's program", libc::SYS_bpf, vec![Is(-1)]),
        ("a ring of calls", libc::SYS_io_uring_setup, vec![Is(0)]),
        ("a key", libc::SYS_keyctl, vec![Is(-1)]),
        ("type for the user", libc::SYS_ioctl, vec![Is(0), Is(0x5412)]),
    ]
}

/// Which of the attacks are not refused. To be refused is another thing than to fail.
pub fn let_through(
    prey: &Prey,
    call: impl Fn(i64, &[Word<'_>]) -> i64,
) -> Vec<(&'static str, i64)> {
    let made = attacks(prey).into_iter().map(|(what, number, words)| (what, call(number, &words)));
    let refused = [-i64::from(libc::EPERM), -i64::from(libc::EACCES)];
    made.filter(|(_, result)| !refused.contains(result)).collect()
}

/// Requires that all threads of a process are jailed, among them such.
pub fn assert_jailed(process: u32, kinds: &[&str], prey: &Prey) {
    assert_jailed_as(process, kinds, prey, &[]);
}

/// The same, where it is suffered to do some things.
pub fn assert_jailed_as(process: u32, kinds: &[&str], prey: &Prey, suffered: &[&str]) {
    // A thread has its name a moment after its start.
    let is_there = |kind: &&str| threads(process).iter().any(|(name, _)| name == kind);
    for kind in kinds {
        soon(&format!("a thread {kind}"), || is_there(kind));
    }
    assert_bounded(process);
    for (name, thread) in threads(process) {
        let puppet = Puppet::stop(process, thread);
        let mut through = let_through(prey, |number, words| puppet.call(number, words));
        through.retain(|(what, _)| !suffered.contains(what));
        assert!(through.is_empty(), "{name}: {through:?}");
    }
    assert!(!prey.program.exists());
}

/// The process that works on disks for a command that is in no jail, once it is started.
pub fn inside(command: u32, verb: &str) -> u32 {
    let is_it = |process: &u32| {
        let read = |file| fs::read_to_string(format!("/proc/{process}/{file}")).unwrap_or_default();
        read("status").contains(&format!("\nPPid:\t{command}\n"))
            && read("cmdline").split('\0').any(|word| word == verb)
    };
    let find = || {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let mut numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.find(is_it)
    };
    soon("a process that works on disks", || find().is_some());
    find().unwrap()
}

/// Requires what the kernel says of every thread: it gains no rights, and its calls are filtered.
pub fn assert_bounded(process: u32) {
    for (name, thread) in threads(process) {
        // One that has started the others may have ended since.
        let status = fs::read_to_string(format!("/proc/{process}/task/{thread}/status"));
        let Ok(status) = status else {
            assert!(!threads(process).iter().any(|(_, other)| *other == thread), "{name}");
            continue;
        };
        let says = |line: &str| status.lines().any(|l| l.split_whitespace().eq(line.split(' ')));
        assert!(says("NoNewPrivs: 1") && says("Seccomp: 2"), "{name}: {status}");
    }
}

/// Requires that threads of these kinds cannot open even what the process can.
pub fn assert_narrow(process: u32, kinds: &[&str], open: &Path) {
    let of_kind = |name: &str| kinds.contains(&name);
    let narrow = threads(process).into_iter().filter(|(name, _)| of_kind(name));
    for (name, thread) in narrow {
        // It comes after the process's two.
        soon("a filter of its own", || filters(process, thread) > 2);
        let puppet = Puppet::stop(process, thread);
        let words = [Word::Is(i64::from(libc::AT_FDCWD)), Word::Path(open), Word::Is(0)];
        assert_eq!(puppet.call(libc::SYS_openat, &words), -i64::from(libc::EPERM), "{name}");
    }
}

/// How many filters a thread's calls go through.
fn filters(process: u32, thread: i32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{process}/task/{thread}/status")).unwrap();
    let count = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
    count.unwrap().trim().parse().unwrap()
}

/// What a thread may open, it opens: the same calls are let through where there is reason to.
pub fn opens(process: u32, path: &Path, flags: i32) -> bool {
    let puppet = Puppet::stop(process, i32::try_from(process).unwrap());
    let here = Word::Is(i64::from(libc::AT_FDCWD));
    puppet.call(libc::SYS_openat, &[here, Word::Path(path), Word::Is(flags.into())]) >= 0
}

#[test]
fn a_server_of_nbd_is_jailed_and_serves_on() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let served = Served::start(&work, "nbd disks/clone.qcow2 --socket sockets/sock --jail require");
    let client = UnixStream::connect(work.path("sockets/sock")).unwrap();
    assert_jailed(served.pid(), &["vdisk", "nbd-accept", "nbd", "control"], &prey);
    let disk = work.path("disks/clone.qcow2");
    assert_narrow(served.pid(), &["nbd-accept", "nbd"], &disk);
    assert!(opens(served.pid(), &disk, libc::O_RDONLY) && opens(served.pid(), &prey.base, 0));
    assert!(!opens(served.pid(), &disk, libc::O_RDWR), "its broker does, when its tree changes");
    drop(client);
    work.vdisk("snapshot create disks/clone.qcow2 one").succeeds();
    work.vdisk("resize disks/clone.qcow2 +1M").succeeds();
    work.vdisk("snapshot merge disks/clone.qcow2 one").succeeds();
    served.stop();
    assert!(!work.path("sockets/sock").exists());
}

#[test]
fn without_a_jail_the_attacks_go_through() {
    let (work, prey) = scene();
    let served = Served::start(&work, "nbd disks/clone.qcow2 --socket sockets/sock --jail off");
    let puppet = Puppet::stop(served.pid(), i32::try_from(served.pid()).unwrap());
    let through = let_through(&prey, |number, words| puppet.call(number, words));
    drop(puppet);
    let done: Vec<_> = through.iter().filter(|(_, result)| *result >= 0).map(|(n, _)| *n).collect();
    for what in ["read a file", "write the base", "make a file", "remove a file", "map code"] {
        assert!(done.contains(&what), "{what}: {through:?}");
    }
    let tried = |what| through.iter().any(|(name, _)| *name == what);
    assert!(tried("trace a process") && tried("a socket to the host"), "{through:?}");
    served.stop();
}

#[test]
fn a_server_of_vhost_user_is_jailed() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let served =
        Served::start(&work, "vhost-user disks/clone.qcow2 --socket sockets/sock --jail require");
    assert_jailed(served.pid(), &["vdisk", "vhost", "control"], &prey);
    assert_narrow(served.pid(), &["vhost"], &work.path("disks/clone.qcow2"));
    served.stop();
    assert!(!work.path("sockets/sock").exists());
}

#[test]
fn the_process_that_runs_a_guest_is_jailed_and_the_guest_goes_on() {
    if !can_boot() || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    // In a directory of its own: what stands beside it, and below that, is in reach.
    let own = Work::below(&work.path("disks"));
    own.vdisk("clone ../../bases/base.raw clone.qcow2").succeeds();
    let mut booted = Booted::waiting(&own);
    let kinds = ["vdisk", "vcpu-0", "virtio-blk-0", "control", "signals"];
    assert_jailed(booted.pid(), &kinds, &prey);
    assert_narrow(booted.pid(), &["vcpu-0", "virtio-blk-0"], &own.path("clone.qcow2"));
    assert!(opens(booted.pid(), &own.path("clone.qcow2"), libc::O_RDONLY));
    assert!(!opens(booted.pid(), &own.path("clone.qcow2"), libc::O_RDWR));
    own.vdisk("snapshot create clone.qcow2 one").succeeds();
    booted.signal(Signal::SIGTERM);
    assert_eq!(booted.status(), Some(0));
}

#[test]
fn a_served_device_grows_and_the_devices_beside_it_are_out_of_reach() {
    if !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.put("file", vec![0; SIZE]);
    work.put("other", vec![0; SIZE]);
    let attach = |name: &str| {
        let done = work.run("losetup", ["-f", "--show", name]).succeeds();
        PathBuf::from(done.out().trim_end())
    };
    let (device, other) = (attach("file"), attach("other"));
    let named = device.display();
    work.vdisk(&format!("create {named} 4M --yes")).succeeds();
    let words = format!("nbd {named} --socket sockets/sock --jail require");
    let served = Served::start(&work, &words);
    assert_jailed(served.pid(), &["vdisk", "nbd-accept", "control"], &prey);
    work.vdisk(&format!("resize {named} +1M")).succeeds();
    work.vdisk(&format!("compact {named}")).succeeds();
    work.vdisk(&format!("check {named}")).succeeds();
    assert!(
        opens(served.pid(), &device, libc::O_RDWR) && !opens(served.pid(), &other, libc::O_RDONLY)
    );
    served.stop();
}
