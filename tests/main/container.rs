//! `vdisk run`: what a program in a container sees, what it can do, how its end is told, and that
//! nothing of it is left on the host, whoever dies first.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::host::{Done, PATIENCE, Running, VDISK, Work};
use crate::require::{Need, have};

const BASE: &str = "base.raw";

/// Whether this machine can run containers.
pub fn able() -> bool {
    have(Need::Root) && have(Need::Fuse) && have(Need::Qemu)
}

/// A directory with a base disk, whose ext4 file system holds busybox, and `web.qcow2`, its clone.
pub fn work() -> Work {
    let work = Work::new();
    let root = work.path("root");
    for dir in ["bin", "etc", "root", "tmp"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is needed");
    for name in
        ["sh", "cat", "dd", "hostname", "id", "ip", "mknod", "mount", "sleep", "stty", "tty"]
    {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nann:x:7:8::/tmp:/bin/sh\n")
        .unwrap();
    work.put("root/etc/motd", "from the base\n");
    ext4(&work, BASE);
    work.qemu_img("create -q -f qcow2 -b base.raw -F raw web.qcow2").succeeds();
    work
}

/// Makes a file system of the directory `root`.
fn ext4(work: &Work, name: &str) {
    work.run("mke2fs", ["-q", "-F", "-t", "ext4", "-d", "root", name, "48M"]).succeeds();
}

/// Runs a shell script on `web.qcow2`.
fn sh(work: &Work, options: &str, script: &str) -> Done {
    let words = ["run"].into_iter().chain(options.split_whitespace());
    work.vdisk_args(words.chain(["web.qcow2", "--", "sh", "-c", script]))
}

/// Polls until `done`; the limit is generous, because an end can wait for a disk.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The processes whose command line is exactly this.
pub fn running(words: &[&str]) -> Vec<u32> {
    let wanted: String = words.iter().flat_map(|word| [word, "\0"]).collect();
    let fits = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == wanted.as_bytes())
    };
    processes().into_iter().filter(fits).collect()
}

/// The processes that a container's host process has started, and that live: the keeper, and the one that
/// serves the root, a copy of the host process.
pub fn keeper_and_server(host: u32) -> (u32, u32) {
    let of_host = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains(&format!("\nPPid:\t{host}\n"))
    };
    let line = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let children: Vec<u32> = processes().into_iter().filter(of_host).collect();
    let (copies, others): (Vec<u32>, Vec<u32>) =
        children.iter().partition(|pid| line(**pid) == line(host));
    assert!(copies.len() == 1 && others.len() == 1, "{children:?}");
    (others[0], copies[0])
}

/// A container under way, and all that the host could keep of it.
struct Container {
    vdisk: Running,
    program: u32,
    keeper: u32,
    server: u32,
    loop_device: String,
}

impl Container {
    /// Starts `sleep`, with `seconds` that no other test uses, after a script.
    fn start(work: &Work, options: &str, script: &str, seconds: &str) -> Container {
        let script = format!("{script} exec sleep {seconds}");
        let words = ["run"].into_iter().chain(options.split_whitespace());
        let words = words.chain(["web.qcow2", "--", "sh", "-c", &script]);
        let mut vdisk = work.command(VDISK, words);
        let mut program = None;
        eventually("the program starts", || {
            assert!(!vdisk.has_ended(), "vdisk run has ended");
            program = running(&["sleep", seconds]).first().copied();
            program.is_some()
        });
        let (keeper, server) = keeper_and_server(vdisk.pid());
        let mounts = fs::read_to_string(format!("/proc/{keeper}/mountinfo")).unwrap();
        // The host has mounts of its own on such devices.
        let hosts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let devices = mounts.split_whitespace().filter(|word| word.starts_with("/dev/loop"));
        let own = |device: &&str| !hosts.split_whitespace().any(|word| word == *device);
        let device =
            devices.into_iter().find(own).expect("a loop device").trim_start_matches("/dev/");
        Container {
            program: program.unwrap(),
            keeper,
            server,
            loop_device: device.to_owned(),
            vdisk,
        }
    }

    /// Waits for the end of `vdisk` and requires that nothing is left.
    fn ends_clean(self) -> Done {
        let pid = self.vdisk.pid();
        let done = self.vdisk.wait();
        for (what, process) in
            [("program", self.program), ("keeper", self.keeper), ("server", self.server)]
        {
            let directory = PathBuf::from(format!("/proc/{process}"));
            eventually(&format!("the {what} ends"), || !directory.exists());
        }
        let backing = PathBuf::from(format!("/sys/block/{}/loop", self.loop_device));
        eventually("the loop device is free", || !backing.exists());
        let group = format!("vdisk-{pid}-0");
        let groups = || find_dirs(Path::new("/sys/fs/cgroup"), &group, 8);
        eventually("the control groups go", || groups().is_empty());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains("/run/vdisk"), "{mounts}");
        done
    }
}

pub fn find_dirs(below: &Path, name: &str, depth: u32) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        if entry.file_name() == name {
            found.push(entry.path());
        }
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(find_dirs(&entry.path(), name, depth - 1));
        }
    }
    found
}

#[test]
fn the_programs_exit_status_is_returned() {
    if !able() {
        return;
    }
    let work = work();
    sh(&work, "", "exit 0").ends(0);
    sh(&work, "", "exit 7").ends(7);
    let missing = work.vdisk("run web.qcow2 -- frobnicate").ends(127);
    missing.says(&["frobnicate"]);
    work.vdisk("run web.qcow2 -- /etc/motd").ends(126).says(&["/etc/motd"]);
    work.vdisk("run web.qcow2").fails_to_run(&["a command is needed"]);
    work.vdisk("run --workdir /nowhere web.qcow2 -- sh -c true").fails_to_run(&["/nowhere"]);
    work.vdisk("run missing.qcow2 -- sh").fails_to_run(&["missing.qcow2"]);
}

#[test]
fn the_standard_streams_are_the_programs() {
    if !able() {
        return;
    }
    let work = work();
    let done = work.vdisk_fed("run web.qcow2 -- cat", b"through and through").succeeds();
    assert_eq!(done.stdout, b"through and through");
    let done = sh(&work, "", "echo out; echo err >&2").succeeds();
    assert_eq!((done.out().as_str(), done.err().as_str()), ("out\n", "err\n"));
}

#[test]
fn a_program_is_alone_in_its_container() {
    if !able() {
        return;
    }
    let work = work();
    let done = sh(
        &work,
        "--hostname box",
        "echo pid $$; echo host $(hostname); ip -o addr | busybox grep -c 127.0.0.1",
    )
    .succeeds();
    let out = done.out();
    assert!(out == "pid 1\nhost box\n1\n", "{out}");
    let links = sh(&work, "", "ip -o link").succeeds().out();
    assert!(
        links.lines().count() == 1 && links.contains("lo:") && links.contains(",UP"),
        "{links}"
    );

    let namespaces = sh(
        &work,
        "",
        "for n in mnt pid uts ipc net cgroup; do busybox readlink /proc/self/ns/$n; done",
    );
    for inside in namespaces.succeeds().out().lines() {
        let kind = inside.split(':').next().unwrap();
        let host = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(Path::new(inside), host);
    }
    let container = Container::start(&work, "", "", "7101");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!("/dev/{} ", container.loop_device)), "{mounts}");
    container.vdisk.signal(Signal::SIGTERM);
    container.ends_clean().ends(143);
}

#[test]
fn proc_dev_and_sys_are_a_containers() {
    if !able() {
        return;
    }
    let work = work();
    let look = "set -e
        for name in null zero full random urandom tty ptmx; do test -c /dev/$name; done
        test -e /dev/fd/0 -a -L /dev/stdin -a -L /dev/stdout -a -L /dev/stderr -a -c /dev/ptmx
        echo x > /dev/shm/x
        test -d /dev/mqueue -a -d /sys/kernel
        test ! -e /dev/loop0 -a ! -e /dev/kmsg -a ! -e /dev/mem
        test -z \"$(busybox ls /sys/firmware)\"
        ! echo x > /proc/sys/kernel/hostname
        ! echo x > /sys/kernel/mm/x
        ! echo x > /proc/sysrq-trigger
        ! mknod /tmp/disk b 7 0
        ! mount -t tmpfs none /tmp
        busybox mount";
    let done = sh(&work, "", look).succeeds();
    let mounts = done.out();
    for (point, kind, flags) in [
        ("/", "ext4", "nodev"),
        ("/proc", "proc", "nosuid,nodev,noexec"),
        ("/dev", "tmpfs", "nosuid"),
        ("/dev/pts", "devpts", "nosuid,noexec"),
        ("/dev/shm", "tmpfs", "nosuid,nodev,noexec"),
        ("/dev/mqueue", "mqueue", "nosuid,nodev,noexec"),
        ("/sys", "sysfs", "ro,nosuid,nodev,noexec"),
        ("/proc/sys", "proc", "ro,nosuid,nodev,noexec"),
    ] {
        let line = mounts.lines().find(|l| l.contains(&format!(" on {point} type {kind} ")));
        assert!(line.is_some_and(|line| line.contains(flags)), "{point}: {mounts}");
    }
}

#[test]
fn the_environment_is_the_containers_own() {
    if !able() {
        return;
    }
    let work = work();
    let options = "--env A=1 --env B=x=y --env EMPTY= --workdir /tmp --hostname box";
    let out = sh(&work, options, "pwd; busybox env").succeeds().out();
    let mut lines: Vec<_> =
        out.lines().filter(|l| !l.starts_with("SHLVL") && !l.starts_with("PWD")).collect();
    lines.sort_unstable();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let wanted = [
        "/tmp",
        "A=1",
        "B=x=y",
        "EMPTY=",
        "HOME=/root",
        "HOSTNAME=box",
        path,
        "TERM=xterm",
        "container=vdisk",
    ];
    assert_eq!(lines, wanted);
    let user = sh(&work, "--user ann", "id -u; id -g; echo $HOME; ! echo x > /etc/x").succeeds();
    assert_eq!(user.out(), "7\n8\n/tmp\n");
}

#[test]
fn localhost_has_a_name_unless_the_disk_says_otherwise() {
    if !able() {
        return;
    }
    let work = work();
    let hosts = sh(&work, "--hostname box", "cat /etc/hosts").succeeds().out();
    assert!(hosts.contains("127.0.0.1 localhost box\n"), "{hosts}");
    sh(&work, "", "busybox umount /etc/hosts").ends(1);
    work.put("root/etc/hosts", "10.0.0.1 mine\n");
    ext4(&work, "own.raw");
    let own = work.vdisk("run --ephemeral own.raw -- cat /etc/hosts").succeeds();
    assert_eq!(own.out(), "10.0.0.1 mine\n");
}

#[test]
fn only_the_capabilities_of_podman_are_left() {
    if !able() {
        return;
    }
    let work = work();
    let out = sh(&work, "", "busybox grep ^Cap /proc/self/status").succeeds().out();
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(out.contains(&format!("{set}:\t00000000800405fb\n")), "{out}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert!(out.contains(&format!("{set}:\t0000000000000000\n")), "{out}");
    }
    let user = sh(&work, "--user ann", "busybox grep CapEff /proc/self/status").succeeds();
    assert!(user.out().contains("0000000000000000"), "{}", user.out());
}

#[test]
fn no_descriptor_of_the_host_leaks_inside() {
    if !able() {
        return;
    }
    let work = work();
    // A shell that leaves a directory of the host open, and starts vdisk.
    let script =
        format!("exec 7</; exec {VDISK} run web.qcow2 -- sh -c 'busybox ls /proc/1/fd; exit'");
    let out = work.run("sh", ["-c", &script]).succeeds().out();
    assert_eq!(out, "0\n1\n2\n");
}

#[test]
fn the_binary_that_enters_cannot_be_overwritten_from_inside() {
    if !able() {
        return;
    }
    let work = work();
    let container = Container::start(&work, "", "", "7111");
    // CVE-2019-5736: whoever gets hold of /proc/PID/exe of a process on its way inside, by
    // becoming that binary or by tracing it, could write to the host's file once the process is
    // gone. Not through a read-only mount.
    let binary = format!("/proc/{}/exe", container.keeper);
    let may_write = nix::unistd::access(binary.as_str(), nix::unistd::AccessFlags::W_OK);
    assert_eq!(may_write, Err(nix::errno::Errno::EROFS));
    container.vdisk.signal(Signal::SIGTERM);
    container.ends_clean().ends(143);
}

#[test]
fn links_in_the_image_do_not_move_the_mounts() {
    if !able() {
        return;
    }
    let work = work();
    symlink("/etc", work.path("root/proc")).unwrap();
    ext4(&work, "link.raw");
    work.vdisk("run --ephemeral link.raw -- sh -c true").fails_to_run(&["/proc", "directory"]);
    fs::remove_file(work.path("root/proc")).unwrap();
    symlink("../../../../../../tmp", work.path("root/dev")).unwrap();
    ext4(&work, "link.raw");
    work.vdisk("run --ephemeral link.raw -- sh -c true").fails_to_run(&["/dev", "directory"]);
}

#[test]
fn what_a_program_writes_is_in_the_delta_and_the_base_stays() {
    if !able() {
        return;
    }
    let work = work();
    let base = work.bytes(BASE);
    sh(&work, "", "echo mine > /etc/motd; busybox rm /etc/passwd").succeeds();
    let again = sh(&work, "", "cat /etc/motd; busybox ls /etc").succeeds();
    assert_eq!(again.out(), "mine\nhosts\nmotd\n");
    assert!(work.bytes(BASE) == base, "the base has changed");
    work.qemu_img("check web.qcow2").succeeds();
}

#[test]
fn an_ephemeral_run_leaves_the_disk_as_it_was() {
    if !able() {
        return;
    }
    let work = work();
    sh(&work, "", "true").succeeds();
    let (before, files) = (work.bytes("web.qcow2"), work.files());
    let script = "echo gone > /etc/motd; busybox sync; cat /etc/motd";
    assert_eq!(sh(&work, "--ephemeral", script).succeeds().out(), "gone\n");
    assert!(work.bytes("web.qcow2") == before, "the disk has changed");
    assert_eq!(work.files(), files);
    assert_eq!(sh(&work, "", "cat /etc/motd").succeeds().out(), "from the base\n");
}

#[test]
fn a_killed_program_leaves_nothing() {
    if !able() {
        return;
    }
    let work = work();
    let container = Container::start(&work, "--memory 64M", "sleep 7299 &", "7201");
    let program = nix::unistd::Pid::from_raw(container.program.cast_signed());
    nix::sys::signal::kill(program, Signal::SIGKILL).unwrap();
    container.ends_clean().ends(137);
    assert!(running(&["sleep", "7299"]).is_empty());
}

#[test]
fn a_signal_to_vdisk_ends_the_program_and_leaves_nothing() {
    if !able() {
        return;
    }
    let work = work();
    for (signal, seconds, code) in [
        (Signal::SIGTERM, "7301", 143),
        (Signal::SIGINT, "7302", 130),
        (Signal::SIGHUP, "7303", 129),
    ] {
        let container =
            Container::start(&work, "--memory 64M --pids 50", "echo $$ > /etc/was;", seconds);
        container.vdisk.signal(signal);
        container.ends_clean().ends(code);
    }
    assert_eq!(sh(&work, "", "cat /etc/was").succeeds().out(), "1\n");
}

#[test]
fn a_disk_in_a_container_takes_a_snapshot_and_grows() {
    if !able() {
        return;
    }
    let work = work();
    let container = Container::start(&work, "", "echo before > /root/when;", "7411");
    work.vdisk("snapshot create web.qcow2 before --freeze").succeeds();
    let info = work.vdisk("info web.qcow2").succeeds().out();
    assert!(info.contains("held as: the root of a container"), "{info}");
    work.vdisk("resize web.qcow2 +16M").succeeds();
    work.vdisk("snapshot revert web.qcow2 before --yes").fails(&["is in use"]);
    work.run("kill", ["-9", &container.program.to_string()]).succeeds();
    container.ends_clean();
    work.vdisk("snapshot revert web.qcow2 before --yes").succeeds();
    assert_eq!(sh(&work, "", "cat /root/when").succeeds().out(), "before\n");
    work.qemu_img("check web.qcow2").succeeds();
}

#[test]
fn a_signal_at_any_moment_of_the_start_ends_it() {
    if !able() {
        return;
    }
    let work = work();
    for delay in (0..200).step_by(10) {
        let words = ["run", "--memory", "64M", "web.qcow2", "--", "sleep", "7311"];
        let vdisk = work.command(VDISK, words);
        let pid = vdisk.pid();
        thread::sleep(Duration::from_millis(delay));
        vdisk.signal(Signal::SIGTERM);
        let done = vdisk.wait();
        // Before vdisk holds signals back, it dies of them like any program.
        assert!(done.code == Some(143) || done.signal == Some(15), "{delay} ms: {}", done.text());
        assert!(running(&["sleep", "7311"]).is_empty(), "after {delay} ms");
        let group = format!("vdisk-{pid}-0");
        assert!(find_dirs(Path::new("/sys/fs/cgroup"), &group, 8).is_empty(), "{group} is left");
    }
}

#[test]
fn a_program_can_handle_the_signals_that_vdisk_gets() {
    if !able() {
        return;
    }
    let work = work();
    let script = "trap 'echo caught; exit 5' TERM; trap '' HUP; sleep 7401 & wait";
    let vdisk = work.command(VDISK, ["run", "web.qcow2", "--", "sh", "-c", script]);
    eventually("the program starts", || !running(&["sleep", "7401"]).is_empty());
    vdisk.signal(Signal::SIGHUP);
    vdisk.signal(Signal::SIGTERM);
    let done = vdisk.wait().ends(5);
    assert_eq!(done.out(), "caught\n");
    eventually("its child ends", || running(&["sleep", "7401"]).is_empty());
}

#[test]
fn when_vdisk_is_killed_nothing_is_left_and_synced_files_are_there() {
    if !able() {
        return;
    }
    let work = work();
    let script = "echo kept > /etc/kept; busybox sync;";
    let container = Container::start(&work, "--memory 64M --pids 50", script, "7501");
    container.vdisk.signal(Signal::SIGKILL);
    assert_eq!(container.ends_clean().signal, Some(9));
    assert_eq!(sh(&work, "", "cat /etc/kept").succeeds().out(), "kept\n");
}

#[test]
fn when_the_keeper_is_killed_no_process_and_no_control_group_is_left() {
    if !able() {
        return;
    }
    let work = work();
    // setsid and another parent: all that a process can do to get away.
    let script = "busybox setsid sleep 7699 &";
    let container = Container::start(&work, "--memory 64M --pids 50", script, "7601");
    let keeper = nix::unistd::Pid::from_raw(container.keeper.cast_signed());
    nix::sys::signal::kill(keeper, Signal::SIGKILL).unwrap();
    container.ends_clean().fails_to_run(&["keeper"]);
    assert!(running(&["sleep", "7699"]).is_empty());
}

#[test]
fn memory_is_limited() {
    if !able() {
        return;
    }
    let work = work();
    let take = "dd if=/dev/zero of=/dev/null bs=96M count=1 2>/dev/null";
    sh(&work, "--memory 256M", take).succeeds();
    sh(&work, "--memory 24M", &format!("exec {take}")).ends(137);
}

#[test]
fn processes_are_limited() {
    if !able() {
        return;
    }
    let work = work();
    let script = "for i in 1 2 3 4 5 6 7 8; do sleep 2 & done; wait";
    sh(&work, "", script).succeeds();
    sh(&work, "--pids 5", script).ends(2).says(&["fork"]);
}

#[test]
fn processor_time_is_limited() {
    if !able() {
        return;
    }
    let work = work();
    let container = Container::start(&work, "--cpus 0.5", "", "7801");
    let group = format!("vdisk-{}-0", container.vdisk.pid());
    let groups = find_dirs(Path::new("/sys/fs/cgroup"), &group, 8);
    let quotas = groups.iter().filter_map(|dir| {
        let read = |file: &str| fs::read_to_string(dir.join(file)).ok();
        read("cpu.max").or_else(|| read("cpu.cfs_quota_us"))
    });
    let quotas: Vec<_> = quotas.collect();
    assert!(quotas.iter().any(|quota| quota.starts_with("50000")), "{groups:?}: {quotas:?}");
    container.vdisk.signal(Signal::SIGTERM);
    container.ends_clean().ends(143);
}

#[test]
fn a_disk_that_is_in_use_is_refused() {
    if !able() {
        return;
    }
    let work = work();
    let container = Container::start(&work, "", "", "7802");
    sh(&work, "", "true").fails_to_run(&["web.qcow2", "use"]);
    container.vdisk.signal(Signal::SIGTERM);
    container.ends_clean().ends(143);
}

#[test]
fn a_disk_without_a_file_system_is_refused() {
    if !able() {
        return;
    }
    let work = Work::new();
    work.vdisk("create empty.qcow2 16M").succeeds();
    work.vdisk("run empty.qcow2 -- sh").fails_to_run(&["empty.qcow2", "file system"]);
}
