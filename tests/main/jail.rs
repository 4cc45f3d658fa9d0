//! The jail around work on disks: calls are made in place of each process and each of its threads, as code
//! that took it over would make them, and are refused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::signal::Signal;

use crate::boot::{Booted, can_boot};
use crate::boot_kernel::kernel;
use crate::host::{VDISK, Work};
use crate::images::{layout, same_files};
use crate::mount::soon;
use crate::puppet::{Ending, Puppet, Word, threads};
use crate::registry_server::Server;
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

/// Requires what the kernel says of every thread: it gains no rights, and its calls are filtered.
pub fn assert_bounded(process: u32) {
    for (name, thread) in threads(process) {
        let status = fs::read_to_string(format!("/proc/{process}/task/{thread}/status")).unwrap();
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
fn commands_that_read_or_write_disks_are_jailed_when_they_do() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.vdisk("create disks/plain.qcow2 8M").succeeds();
    for words in [
        "read disks/clone.qcow2 0 4096",
        "write disks/clone.qcow2 4096",
        "map disks/clone.qcow2",
        "check disks/clone.qcow2",
        "check disks/plain.qcow2 --repair all",
        "compare disks/clone.qcow2 bases/base.raw",
        "convert disks/clone.qcow2 out/flat.qcow2",
        "convert disks/clone.qcow2 out/flat.raw --format raw",
    ] {
        let words: Vec<_> = words.split(' ').chain(["--jail", "require"]).collect();
        let ending = Ending::of(VDISK, &words, work.dir(), None);
        assert_bounded(ending.process());
        let through = let_through(&prey, |number, words| ending.call(number, words));
        assert!(through.is_empty(), "{words:?}: {through:?}");
    }
    // It follows names wherever they lead, and writes nowhere.
    let ending = Ending::of(VDISK, &["info", "disks/clone.qcow2", "--chain"], work.dir(), None);
    let through = let_through(&prey, |number, words| ending.call(number, words));
    assert!(matches!(through[..], [("read a file", 0..)]), "{through:?}");
}

#[test]
fn commands_that_change_disks_at_rest_are_jailed_when_they_do() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.vdisk("create disks/plain.qcow2 8M").succeeds();
    work.vdisk("create disks/lone.qcow2 8M").succeeds();
    work.vdisk("clone bases/base.raw disks/other.qcow2").succeeds();
    work.run("mke2fs", ["-q", "-t", "ext4", "disks/files.raw", "16M"]).succeeds();
    work.put("in", "some bytes");
    work.put("kernel", kernel(1));
    work.vdisk("cp in disks/files.raw:/in").succeeds();
    fs::create_dir(work.path("upper")).unwrap();
    work.vdisk("clone disks/files.raw disks/files.qcow2").succeeds();
    for words in [
        "snapshot create disks/clone.qcow2 one",
        "snapshot list disks/clone.qcow2",
        "snapshot rename disks/clone.qcow2 one uno",
        "snapshot diff disks/clone.qcow2 uno",
        "snapshot revert disks/clone.qcow2 uno --yes",
        "snapshot create disks/clone.qcow2 two",
        "snapshot merge disks/clone.qcow2 two --yes",
        "snapshot delete disks/clone.qcow2 uno --yes",
        "snapshot undo disks/clone.qcow2 --yes",
        "snapshot forget disks/clone.qcow2 --yes",
        "clone disks/lone.qcow2 out/more.qcow2",
        "clone disks/clone.qcow2 out/whole.qcow2 --full",
        "rebase disks/clone.qcow2 --flatten",
        "rebase disks/other.qcow2 --backing disks/plain.qcow2 --backing-format qcow2",
        "resize disks/clone.qcow2 +1M",
        "compact disks/clone.qcow2",
        "compact disks/clone.qcow2 --dry-run",
        "apply upper disks/files.qcow2",
        "cp in disks/files.qcow2:/also",
        "rm disks/files.qcow2:/also",
        "export disks/files.qcow2 oci:out/layout:some",
        "export disks/files.qcow2 out/files.tar",
        "rm disks/clone.qcow2 --yes",
        "create disks/made.qcow2 8M --data-file made.data",
        "create disks/made.raw 8M --format raw",
        "kernel add some kernel --store out/store",
        "kernel list --store out/store",
        "kernel rm some --store out/store",
    ] {
        let words: Vec<_> = words.split(' ').chain(["--jail", "require"]).collect();
        let through = through_at_the_end(&work, &prey, &words);
        assert!(through.is_empty(), "{words:?}: {through:?}");
    }
    // What it is written into is in reach.
    let words = ["commit", "out/more.qcow2", "--jail", "require"];
    assert!(through_at_the_end(&work, &prey, &words).is_empty());
    // Who stands on whom is looked for everywhere, and nothing is written.
    let through = through_at_the_end(&work, &prey, &["tree", "disks", "--jail", "require"]);
    assert!(matches!(through[..], [("read a file", 0..)]), "{through:?}");
}

#[test]
fn commands_that_speak_with_registries_are_jailed_when_they_do() {
    if !have(Need::Registry) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    layout(&work);
    let server = Server::open(&work);
    let host = &server.host;
    work.vdisk("import oci:lay:b app --store s").succeeds();
    work.vdisk("clone app disks/app.qcow2 --store s").succeeds();
    // What is sent as a disk is made ready in the directory for temporary files, in which this test is.
    let plain = "--tls-verify=false";
    work.vdisk(&format!("push disks/clone.qcow2 {host}/a/disk --as disk {plain}")).succeeds();
    for (words, suffered) in [
        // What they have to do, and nothing else: it opens a way out, and none on this host.
        (format!("push disks/app.qcow2 {host}/some/app --store s"), &["a socket to the world"][..]),
        // What came is unpacked when nobody is spoken with any more.
        (format!("pull {host}/some/app --store t"), &[]),
        (format!("pull {host}/a/disk --to out"), &["a socket to the world"]),
    ] {
        let words: Vec<_> = words.split(' ').chain([plain, "--jail", "require"]).collect();
        let through = through_at_the_end(&work, &prey, &words);
        let names: Vec<_> = through.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, suffered, "{words:?}: {through:?}");
    }
    work.vdisk("compare disks/clone.qcow2 out/clone.qcow2").succeeds();
    work.vdisk(&format!("clone {host}/some/app e.qcow2 --store t")).succeeds();
    same_files(&work, "e.qcow2", "lay:b");
}

/// What is not refused at the end of a command that is in a jail and does what it is to do.
fn through_at_the_end(work: &Work, prey: &Prey, words: &[&str]) -> Vec<(&'static str, i64)> {
    let ending = Ending::of(VDISK, words, work.dir(), None);
    assert_bounded(ending.process());
    let through = let_through(prey, |number, words| ending.call(number, words));
    let status = ending.status;
    assert_eq!(status, 0, "{words:?}: {}", ending.err());
    through
}

#[test]
fn a_copy_out_of_a_disk_is_jailed_and_makes_what_it_finds() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    for dir in ["tree", "tree/deep"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    work.put("tree/deep/program", "runs as its owner");
    fs::set_permissions(work.path("tree/deep/program"), fs::Permissions::from_mode(0o4755))
        .unwrap();
    std::os::unix::fs::symlink("deep/program", work.path("tree/link")).unwrap();
    work.run("mke2fs", ["-q", "-t", "ext4", "-d", "tree", "disks/files.raw", "16M"]).succeeds();
    let words = ["cp", "--archive", "disks/files.raw:/.", "out", "--jail", "require"];
    let through = through_at_the_end(&work, &prey, &words);
    assert!(through.is_empty(), "{through:?}");
    let mode = fs::metadata(work.path("out/link")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o4755);
}

#[test]
fn commands_of_the_drop_in_are_jailed_and_say_nothing_of_it() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.vdisk("qemu-img create -q -f qcow2 disks/plain.qcow2 8M").succeeds();
    work.vdisk("qemu-img create -q -f qcow2 -b plain.qcow2 -F qcow2 disks/delta.qcow2").succeeds();
    for words in [
        "info disks/plain.qcow2",
        "map disks/plain.qcow2",
        "check disks/plain.qcow2",
        "measure -O qcow2 disks/plain.qcow2",
        "compare disks/plain.qcow2 disks/delta.qcow2",
        "convert -O qcow2 disks/delta.qcow2 out/flat.qcow2",
        "convert -O raw --image-opts driver=qcow2,file.filename=disks/delta.qcow2 out/flat.raw",
        "dd if=disks/delta.qcow2 of=out/dd.raw",
        "create -q -f qcow2 -b ../disks/plain.qcow2 -F qcow2 out/more.qcow2",
        // Which word is a file, only who reads the options knows.
        "create -qf qcow2 out/clustered.qcow2 8M",
        "create -q -f qcow2 -o data_file=sockets/a.data out/apart.qcow2 8M",
        "convert -UO qcow2 -odata_file=sockets/b.data disks/delta.qcow2 out/copied.qcow2",
        "convert -nO qcow2 disks/plain.qcow2 out/flat.qcow2",
        "dd -nO qcow2 if=disks/plain.qcow2 of=out/flat.qcow2",
        "snapshot -c one disks/delta.qcow2",
        "amend -f qcow2 -o lazy_refcounts=on disks/delta.qcow2",
        "bitmap --add disks/delta.qcow2 marks",
        "resize disks/delta.qcow2 16M",
        "commit -q out/more.qcow2",
        "rebase -u -b out/flat.qcow2 -F qcow2 disks/delta.qcow2",
    ] {
        let words: Vec<_> = ["qemu-img"].into_iter().chain(words.split(' ')).collect();
        let through = through_at_the_end(&work, &prey, &words);
        assert!(matches!(through[..], [("read a file", 0..)]), "{words:?}: {through:?}");
    }
}

#[test]
fn an_import_is_jailed_when_it_reads() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let tar = work.run("tar", ["-cf", "root.tar", "disks"]).succeeds();
    drop(tar);
    let words = ["import", "root.tar", "some", "--size", "64M", "--store", "store"];
    let ending = Ending::of(VDISK, &words, work.dir(), None);
    assert_bounded(ending.process());
    let through = let_through(&prey, |number, words| ending.call(number, words));
    assert!(through.is_empty(), "{through:?}");
    drop(ending);
    work.vdisk("clone some clone.qcow2 --store store").succeeds();
}

#[test]
fn a_command_says_what_it_wants_of_a_jail() {
    let (work, _) = scene();
    let done = work.vdisk("read disks/clone.qcow2 0 1 --jail off").succeeds();
    assert!(done.err().is_empty(), "{}", done.err());
    work.vdisk("read disks/clone.qcow2 0 1 --jail some").ends(64);
    if have(Need::Landlock) {
        let done = work.vdisk("read disks/clone.qcow2 0 1 --jail require").succeeds();
        assert_eq!((done.stdout, done.stderr.len()), (vec![0x11], 0));
    }
}

#[test]
fn on_a_kernel_without_landlock_a_command_goes_on_and_says_so_once_unless_it_is_told_not_to() {
    let (work, prey) = scene();
    let lacking = Some(libc::SYS_landlock_create_ruleset);
    let run = |mode: &str| {
        let words = ["convert", "disks/clone.qcow2", &format!("out/{mode}"), "--jail", mode];
        Ending::of(VDISK, &words, work.dir(), lacking)
    };
    let ending = run("best");
    assert_eq!(ending.status, 0);
    assert_bounded(ending.process());
    // Which files are opened is not bounded, and all else is.
    let through = let_through(&prey, |number, words| ending.call(number, words));
    let names: Vec<_> = through.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["read a file", "write the base", "make a file", "remove a file"]);
    let err = ending.err();
    assert!(err.lines().count() == 1 && err.contains("no Landlock"), "{err}");
    let ending = run("require");
    assert_eq!(ending.status, 1);
    let err = ending.err();
    assert!(err.contains("no Landlock") && !work.path("out/require").exists(), "{err}");
    let ending = run("off");
    assert_eq!((ending.status, ending.err().as_str()), (0, ""));
}

#[test]
fn a_command_that_works_in_no_jail_refuses_one_that_is_required() {
    let (work, _) = scene();
    for words in ["ps", "image list --store s"] {
        work.vdisk(&format!("{words} --jail require")).fails(&["jail"]);
        work.vdisk(words).succeeds();
    }
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
