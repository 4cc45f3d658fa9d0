//! The jail around the servers of mounts, and of the roots of containers: calls are made in place of each, and
//! what is mounted goes on.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::container::{able, eventually, keeper_and_server, running, work};
use crate::host::{Running, VDISK, Work};
use crate::jail::{
    Prey, SIZE, assert_bounded, assert_jailed, assert_jailed_as, let_through, scene,
};
use crate::mount::{is_left_alone, is_mounted, server, soon};
use crate::puppet::{Ending, threads};
use crate::require::{Need, have, skipped};
use crate::someone::{Ids, USER, Who, give, sh, start, start_program};

#[test]
fn the_server_of_a_disk_as_a_file_is_jailed_and_unmounts_when_it_is_asked() {
    if !have(Need::Fuse) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("mount --raw disks/clone.qcow2 at --jail require").succeeds();
    let server = server(&work.path("at")).unwrap();
    let process = u32::try_from(server.as_raw()).unwrap();
    assert_jailed(process, &["vdisk", "fuse", "ending", "control"], &prey);
    work.vdisk("snapshot create disks/clone.qcow2 one").succeeds();
    assert_eq!(fs::read(work.path("at/snapshots/one.raw")).unwrap(), vec![0x11; SIZE]);
    if nix::unistd::geteuid().is_root() {
        nix::sys::signal::kill(server, Signal::SIGTERM).unwrap();
    } else {
        work.vdisk("umount at").succeeds();
    }
    is_left_alone(&work.path("at"));
    assert!(!is_mounted(&work.path("at")));
}

#[test]
fn the_server_of_an_ordinary_users_mount_is_jailed_and_serves_on() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (elsewhere, prey) = scene();
    fs::set_permissions(elsewhere.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let work = Work::new();
    work.run("mke2fs", ["-q", "-t", "ext4", "-E", "root_owner=54321:54321", "raw", "16M"])
        .succeeds();
    work.vdisk("convert raw disk.q").succeeds();
    fs::create_dir(work.path("at")).unwrap();
    give(&work);
    std::os::unix::fs::chown(work.path("at"), Some(USER), Some(USER)).unwrap();
    let script = "./vdisk mount disk.q at --jail require && touch up && read go && \
                  echo hello > at/file && chmod 4755 at/file && ./vdisk snapshot create disk.q one && \
                  ./vdisk umount at && ./vdisk cat disk.q:file --snapshot one";
    let mut running = start_program(&work, Who::Someone(Ids::One), "", ["sh", "-c", script]);
    soon("a mount", || work.path("up").exists());
    let process = u32::try_from(server(&work.path("at")).unwrap().as_raw()).unwrap();
    let kinds = ["vdisk", "fuse", "fuse-worker", "ending", "control"];
    assert_jailed(process, &kinds, &prey);
    running.type_in(b"go\n");
    assert_eq!(running.wait().succeeds().out(), "hello\n");
}

/// A disk with ext4 in it on a base in another directory, mounted at `at` by the kernel's own driver.
fn by_kernel(work: &Work) {
    work.run("mke2fs", ["-q", "-t", "ext4", "bases/files.raw", "16M"]).succeeds();
    work.vdisk("clone bases/files.raw disks/files.qcow2").succeeds();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("mount disks/files.qcow2 at --jail require").succeeds();
}

#[test]
fn the_server_of_a_mount_by_the_kernels_driver_is_jailed_and_the_mount_goes_on() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let prey = Prey { base: work.path("bases/files.raw"), ..prey };
    by_kernel(&work);
    let at = work.path("at");
    let process = u32::try_from(server(&at).unwrap().as_raw()).unwrap();
    assert_jailed(process, &["vdisk", "fuse", "ending", "control"], &prey);
    fs::write(at.join("file"), "before").unwrap();
    work.vdisk("snapshot create disks/files.qcow2 one --freeze").succeeds();
    fs::write(at.join("file"), "after").unwrap();
    let holder = work.vdisk("info disks/files.qcow2").succeeds().out();
    assert!(holder.contains(&format!("mounted at {}", at.display())), "{holder}");
    let device = fs::metadata(&at).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let sectors = || fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).unwrap();
    let before: u64 = sectors().trim().parse().unwrap();
    work.vdisk("resize disks/files.qcow2 +1M").succeeds();
    assert_eq!(sectors().trim().parse::<u64>().unwrap(), before + 2048);
    work.vdisk("umount at").succeeds();
    is_left_alone(&at);
    let seen = |snapshot: &str| {
        work.vdisk(&format!("cat disks/files.qcow2:file{snapshot}")).succeeds().out()
    };
    assert_eq!((seen(" --snapshot one"), seen("")), ("before".into(), "after".into()));
    work.vdisk("mount disks/files.qcow2 at --jail require").succeeds();
    work.vdisk("snapshot merge disks/files.qcow2 one").succeeds();
    nix::sys::signal::kill(server(&at).unwrap(), Signal::SIGTERM).unwrap();
    is_left_alone(&at);
    assert!(!is_mounted(&at) && outer(&at).is_none());
    work.vdisk("check disks/files.qcow2").succeeds();
}

/// The process beside the server of the mount at a directory, which mounts and unmounts.
fn outer(at: &Path) -> Option<Pid> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let found = numbers.find(|process| {
        let read = |file: &str| fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
        let words = read("cmdline");
        read("comm") == b"vdisk-outside\n"
            && words.split(|byte| *byte == 0).any(|word| word == at.as_os_str().as_bytes())
    });
    found.map(Pid::from_raw)
}

#[test]
fn a_mount_outlives_the_process_outside_and_can_still_be_taken_away() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, _) = scene();
    by_kernel(&work);
    let at = work.path("at");
    fs::write(at.join("file"), "before").unwrap();
    // As it does for a snapshot, and is killed before it can let the file system go on.
    work.run("fsfreeze", ["--freeze", "at"]).succeeds();
    nix::sys::signal::kill(outer(&at).unwrap(), Signal::SIGKILL).unwrap();
    soon("the end of the process outside", || outer(&at).is_none());
    work.vdisk("snapshot create disks/files.qcow2 one --freeze").fails(&["gone"]);
    // What needs nothing outside goes on.
    work.vdisk("snapshot create disks/files.qcow2 two").succeeds();
    assert!(server(&at).is_some() && is_mounted(&at));
    work.vdisk("umount at").succeeds();
    is_left_alone(&at);
    assert!(!is_mounted(&at));
    assert_eq!(work.vdisk("cat disks/files.qcow2:file").succeeds().out(), "before");
    work.vdisk("check disks/files.qcow2").succeeds();
}

#[test]
fn a_server_that_is_killed_leaves_no_process_outside_and_all_that_was_synced() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, _) = scene();
    by_kernel(&work);
    let at = work.path("at");
    work.run("sh", ["-ec", "echo kept > at/file && sync at/file"]).succeeds();
    nix::sys::signal::kill(server(&at).unwrap(), Signal::SIGKILL).unwrap();
    is_left_alone(&at);
    soon("the end of the process outside", || outer(&at).is_none());
    work.vdisk("umount at").fails(&["at", "gone"]);
    assert!(!is_mounted(&at));
    work.vdisk("mount disks/files.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/file"), b"kept\n");
    work.vdisk("umount at").succeeds();
}

/// Requires that all threads of a mount's server are jailed, among them such, but for one thing that they
/// are suffered to do.
fn assert_jailed_but(at: &Path, kinds: &[&str], prey: &Prey, but: &str) {
    let process = u32::try_from(server(at).unwrap().as_raw()).unwrap();
    assert_jailed_as(process, kinds, prey, &[but]);
}

#[test]
fn the_server_of_a_superusers_mount_in_user_space_is_jailed_and_knows_its_users() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.run("mke2fs", ["-q", "-t", "ext4", "disks/files.raw", "16M"]).succeeds();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("mount disks/files.raw at --user-space --jail require").succeeds();
    let at = work.path("at");
    let process = u32::try_from(server(&at).unwrap().as_raw()).unwrap();
    assert_jailed(process, &["vdisk", "fuse", "ending", "control"], &prey);
    keeps_what_an_administrator_may_keep(&work);
    work.vdisk("umount at").succeeds();
    is_left_alone(&at);
}

/// A disk whose file system cannot be read ends its server, which is in its jail by then: what it has read of the
/// superblock and of the journal, it has read within.
#[test]
fn superblock_and_journal_are_read_in_the_jail() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    for dir in ["at", "upper", "work"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    let words = ["-q", "-t", "ext4", "-O", "^metadata_csum", "disks/files.raw", "16M"];
    work.run("mke2fs", words).succeeds();
    let whole = work.bytes("disks/files.raw");
    // Its magic number.
    let mut bytes = whole.clone();
    bytes[1024 + 0x38..][..2].fill(0);
    work.put("disks/superblock.raw", bytes);
    // A journal that is to be replayed, and has lost its own.
    let mut bytes = whole;
    bytes[1024 + 0x60] |= 4;
    let journal = bytes.windows(4).position(|word| word == [0xc0, 0x3b, 0x39, 0x98]).unwrap();
    bytes[journal..][..4].fill(0);
    work.put("disks/journal.raw", bytes);
    let path = |name: &str| work.path(name).to_str().unwrap().to_owned();
    let (superblock, journal, at) =
        (path("disks/superblock.raw"), path("disks/journal.raw"), path("at"));
    let (upper, aside) = (path("upper"), path("work"));
    let laid = ["overlay-daemon", "--lower", &superblock, "--upper", &upper, "--work", &aside, &at];
    // An overlay gives files their modes by name.
    let by_name: &[&str] = &["lend its rights to all"];
    for (words, suffered, why) in [
        (&["mount-daemon", "--user-space", &superblock, &at][..], &[][..], "no file system"),
        (&["mount-daemon", "--user-space", &journal, &at], &[], "journal's superblock is damaged"),
        (&laid, by_name, "no file system"),
    ] {
        let words = [words, &["--jail", "require"]].concat();
        let ending = Ending::of(VDISK, &words, work.dir(), None);
        assert_bounded(ending.process());
        let mut through = let_through(&prey, |number, words| ending.call(number, words));
        through.retain(|(what, _)| !suffered.contains(what));
        assert!(through.is_empty(), "{words:?}: {through:?}");
        assert_eq!(ending.status, 1);
        let err = ending.err();
        assert!(err.contains(why), "{words:?}: {err}");
        assert!(!is_mounted(&work.path("at")));
    }
}

#[test]
fn the_jailed_server_of_a_mount_follows_who_asks_to_his_processor() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) || !can_follow() {
        return;
    }
    let (work, _) = scene();
    work.run("mke2fs", ["-q", "-t", "ext4", "disks/files.raw", "16M"]).succeeds();
    for dir in ["at", "lower", "upper"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    let at = work.path("at");
    for words in ["mount disks/files.raw at --user-space", "mount lower at --overlay upper"] {
        work.vdisk(&format!("{words} --jail require")).succeeds();
        let process = u32::try_from(server(&at).unwrap().as_raw()).unwrap();
        // Nobody looks at this but the thread that asks: what follows it stays as it is meanwhile.
        eventually("a thread follows", || {
            for _ in 0..64 {
                fs::create_dir(at.join("dir")).unwrap();
                fs::remove_dir(at.join("dir")).unwrap();
            }
            threads(process).iter().any(|(_, thread)| is_bound(process, *thread))
        });
        assert!(
            !is_bound(process, i32::try_from(process).unwrap()),
            "it is for threads that answer"
        );
        work.vdisk("umount at").succeeds();
        is_left_alone(&at);
    }
}

/// A process that is just being another program cannot be looked at, and closes files meanwhile: whose times are
/// still to be told, which is answered by who may want to know where it runs.
#[test]
fn a_program_that_is_started_by_who_has_files_of_a_mount_open_starts() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = Work::new();
    work.run("mke2fs", ["-q", "-t", "ext4", "files.raw", "16M"]).succeeds();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("mount files.raw at --user-space").succeeds();
    let at = work.path("at");
    let (told, heard) = std::sync::mpsc::channel();
    let here = at.clone();
    let starts = std::thread::spawn(move || {
        for round in 0..20 {
            let name = |n: usize| here.join(format!("{round}-{n}"));
            let mut open: Vec<_> = (0..16).map(|n| fs::File::create(name(n)).unwrap()).collect();
            open.iter_mut().for_each(|file| file.write_all(b"some bytes").unwrap());
            assert!(Command::new("true").status().unwrap().success());
        }
        told.send(()).unwrap();
    });
    let done = heard.recv_timeout(Duration::from_secs(300));
    if done.is_err() {
        // Who waits for an answer that does not come is let go on.
        let force = nix::mount::MntFlags::MNT_FORCE;
        let _ = nix::mount::umount2(&at, force);
    }
    let ended = starts.join();
    assert!(done.is_ok() && ended.is_ok(), "no program is started");
    work.vdisk("umount at").succeeds();
    is_left_alone(&at);
}

/// Whether there are several processors, and a process of this user's may give way to all others and come back.
fn can_follow() -> bool {
    let several = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
    let back = ["--idle", "0", "chrt", "--other", "0", "true"];
    let comes_back = Command::new("chrt").args(back).status().is_ok_and(|status| status.success());
    if !(several && comes_back) {
        skipped("has one processor only, or may not come back");
    }
    several && comes_back
}

/// Whether a thread may run on one processor only.
fn is_bound(process: u32, thread: i32) -> bool {
    // It may have ended.
    let status = fs::read_to_string(format!("/proc/{process}/task/{thread}/status"));
    let status = status.unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.is_some_and(|list| list.trim().parse::<u32>().is_ok())
}

/// A superuser writes to a program that runs as its owner, and it goes on being one; his attributes are his.
fn keeps_what_an_administrator_may_keep(work: &Work) {
    work.put("at/program", "one");
    fs::set_permissions(work.path("at/program"), fs::Permissions::from_mode(0o4755)).unwrap();
    work.run("sh", ["-c", "echo two >> at/program"]).succeeds();
    let mode = fs::metadata(work.path("at/program")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o4755);
    work.run("setfattr", ["-n", "trusted.mine", "-v", "1", "at/program"]).succeeds();
    let listed = work.run("getfattr", ["-m", "-", "at/program"]).succeeds();
    assert!(listed.out().contains("trusted.mine"), "{}", listed.out());
}

#[test]
fn the_server_of_an_overlay_is_jailed_and_goes_on_with_all_kinds_of_files() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    for dir in ["lower", "lower/deep", "upper", "at"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    work.put("lower/deep/file", "lower");
    work.run("mke2fs", ["-q", "-t", "ext4", "-d", "lower", "disks/files.raw", "32M"]).succeeds();
    let at = work.path("at");
    for lower in ["disks/files.raw", "lower"] {
        work.vdisk(&format!("mount {lower} at --overlay upper --jail require")).succeeds();
        // A mode that a file is given by its name is one of any file: an overlay gives files theirs.
        assert_jailed_but(&at, &["vdisk", "ending", "control"], &prey, "lend its rights to all");
        fs::set_permissions(&prey.secret, fs::Permissions::from_mode(0o600)).unwrap();
        keeps_what_an_administrator_may_keep(&work);
        let script = "cd at && ln -s program link && ln program more && mknod null c 1 3 && \
                      mkfifo fifo && mkdir dir && mv dir other && mv program other/ && \
                      rm link more null fifo && rm -r other && sync .";
        work.run("sh", ["-ec", script]).succeeds();
        work.run("sh", ["-ec", "echo up >> at/deep/file && mv at/deep at/far"]).succeeds();
        assert_eq!(fs::read(work.path("at/far/file")).unwrap(), b"lowerup\n");
        work.run("sh", ["-ec", "mv at/far at/deep && rm -r at/deep"]).succeeds();
        work.vdisk("umount at").succeeds();
        is_left_alone(&at);
        work.run("rm", ["-r", "upper", "upper.work"]).succeeds();
        fs::create_dir(work.path("upper")).unwrap();
    }
}

/// A file that the kernel reads in the server's place it opens with the server's rights: where these did not
/// reach to programs, every program that was written to the superuser's overlay failed to start with EIO.
#[test]
fn programs_run_from_all_layers_of_a_jailed_overlay() {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Landlock) {
        return;
    }
    let (work, _) = scene();
    for dir in ["lower", "upper", "at"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    let sh = |script: &str| work.run("sh", ["-ec", script]).succeeds();
    sh("cp /bin/true lower/below && cp lower/below lower/changed");
    work.run("mke2fs", ["-q", "-t", "ext4", "-d", "lower", "disks/files.raw", "32M"]).succeeds();
    symlink(VDISK, work.path("vdisk-overlay")).unwrap();
    let at = work.path("at");
    for lower in ["lower", "disks/files.raw"] {
        let mount = format!("mount {lower} at --overlay upper --jail require");
        work.vdisk(&mount).succeeds();
        sh("at/below && cp at/below at/new && at/new && : >> at/changed && at/changed");
        work.vdisk("umount at").succeeds();
        is_left_alone(&at);
        work.vdisk(&mount).succeeds();
        sh("at/below && at/new && at/changed");
        work.vdisk("umount at").succeeds();
        is_left_alone(&at);
        let layers = format!("lowerdir={0}/upper:{0}/{lower}", work.dir().display());
        work.run("./vdisk-overlay", ["-o", &layers, "at"]).succeeds();
        sh("at/below && at/new && at/changed");
        work.vdisk("umount at").succeeds();
        is_left_alone(&at);
        sh("rm -r upper upper.work && mkdir upper");
    }
}

/// Starts a container that sleeps so long, which no other test does, and has left a file in /tmp and run a
/// program that it wrote.
fn contained(work: &Work, who: Who, options: &str, seconds: &str) -> Running {
    let program = "cp /bin/busybox /tmp/busybox && /tmp/busybox true";
    let script = format!("{program} && echo up > /tmp/up; exec sleep {seconds}");
    let words = ["run", "--jail", "require"].into_iter().chain(options.split_whitespace());
    let words = words.chain(["web.qcow2", "--", "sh", "-c", &script]);
    let mut vdisk = start(work, who, words);
    let runs = || !running(&["sleep", seconds]).is_empty();
    eventually("the container runs", || vdisk.has_ended() || runs());
    assert!(!vdisk.has_ended(), "{who:?} {options}: {}", vdisk.wait().text());
    vdisk
}

/// What an attacker is after, in another directory than the disk's.
pub fn prey_elsewhere() -> (Work, Prey) {
    let work = Work::new();
    for name in ["secret", "base"] {
        work.put(name, "a key");
    }
    give(&work);
    let prey = Prey {
        secret: work.path("secret"),
        base: work.path("base"),
        program: work.path("program"),
    };
    (work, prey)
}

#[test]
fn the_server_of_a_containers_root_is_jailed_and_the_container_goes_on() {
    if !able() || !have(Need::Uidmap) || !have(Need::Landlock) {
        return;
    }
    let (_elsewhere, prey) = prey_elsewhere();
    let (lent, one) = (Who::Someone(Ids::Lent), Who::Someone(Ids::One));
    let of_disk = ["vdisk", "fuse", "control"];
    let own = ["vdisk", "fuse", "control", "owners"];
    let laid = ["vdisk", "fuse"];
    for (who, options, kinds, seconds) in [
        (Who::Root, "", &of_disk[..], "7711"),
        (Who::Root, "--user-space", &of_disk, "7712"),
        (Who::Root, "--overlay upper", &laid, "7713"),
        (lent, "", &of_disk, "7714"),
        (lent, "--overlay upper", &laid, "7715"),
        (one, "", &own, "7716"),
    ] {
        let work = work();
        give(&work);
        fs::create_dir(work.path("upper")).unwrap();
        if who != Who::Root {
            std::os::unix::fs::chown(work.path("upper"), Some(USER), Some(USER)).unwrap();
        }
        let vdisk = contained(&work, who, options, seconds);
        let (_, server) = keeper_and_server(vdisk.pid());
        // An overlay gives files their modes by name.
        let overlay = options.contains("overlay");
        let suffered: &[&str] = if overlay { &["lend its rights to all"] } else { &[] };
        assert_jailed_as(server, kinds, &prey, suffered);
        fs::set_permissions(&prey.secret, fs::Permissions::from_mode(0o644)).unwrap();
        if !overlay {
            let snapshot = ["snapshot", "create", "web.qcow2", "one", "--freeze"];
            start(&work, who, snapshot).wait().succeeds();
            start(&work, who, ["resize", "web.qcow2", "+1M"]).wait().succeeds();
            start(&work, who, ["snapshot", "merge", "web.qcow2", "one"]).wait().succeeds();
        }
        vdisk.signal(Signal::SIGTERM);
        vdisk.wait().ends(143);
        let seen = sh(&work, who, options, "cat /etc/motd /tmp/up").succeeds().out();
        assert_eq!(seen, "from the base\nup\n", "{who:?} {options}");
    }
}
