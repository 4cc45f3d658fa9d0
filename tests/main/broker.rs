//! The broker beside a server: of the directory of its disk the server reads all and writes nothing by name,
//! and the disk changes all the same. What a broker does that is told other things stands in `broker_told`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as NixPid;

use crate::boot::{Booted, can_boot};
use crate::broker_told::{CREATE, OPEN, REMOVE, Stolen, request};
use crate::host::Work;
use crate::jail::scene;
use crate::mount::{is_left_alone, server, soon};
use crate::puppet::{Puppet, Word};
use crate::require::{Need, have};
use crate::serve::Served;

const SIZE: usize = 8 << 20;
/// A name of the form that frozen layers of the disk have.
pub const FORMED: &str = "web@0123456789ab.qcow2";

/// A disk with a snapshot, and beside it what is somebody else's: a disk, what is called as a layer of the
/// first would be, and a link that is called so.
pub fn neighbours() -> Work {
    let work = Work::new();
    fs::create_dir(work.path("disks")).unwrap();
    work.put("base.raw", vec![0x11; SIZE]);
    work.vdisk("clone base.raw disks/web.qcow2").succeeds();
    work.vdisk("snapshot create disks/web.qcow2 one").succeeds();
    work.put("disks/other.qcow2", "another disk");
    work.put("disks/web@aaaaaaaaaaaa.qcow2", "another disk");
    symlink("other.qcow2", work.path("disks/web@bbbbbbbbbbbb.qcow2")).unwrap();
    work
}

/// Requires that what is somebody else's is what it was, and no more is there than the disk's.
#[track_caller]
pub fn assert_untouched(work: &Work) {
    for name in ["other.qcow2", "web@aaaaaaaaaaaa.qcow2", "web@bbbbbbbbbbbb.qcow2"] {
        assert_eq!(work.bytes(Path::new("disks").join(name)), b"another disk", "{name}");
    }
    assert!(work.path("disks/web@bbbbbbbbbbbb.qcow2").is_symlink());
    assert_eq!(fs::metadata(work.path("disks/other.qcow2")).unwrap().nlink(), 1);
    let all = fs::read_dir(work.path("disks")).unwrap();
    let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let known = |name: &String| name.starts_with("web") || name == "other.qcow2";
    assert_eq!(names.filter(|name| !known(name)).collect::<Vec<_>>(), [""; 0]);
    assert!(work.bytes("base.raw") == [0x11; SIZE]);
}

/// The broker beside a process.
pub fn broker(process: u32) -> Option<u32> {
    let is_its = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((name, rest)) = stat.rsplit_once(") ") else { return false };
        let mut words = rest.split(' ');
        let lives = words.next() != Some("Z");
        lives && name.ends_with("(vdisk-broker") && words.next() == Some(&*process.to_string())
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.find(is_its)
}

/// Whether a process has ended, also where nobody has asked how.
pub fn has_ended(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.map_or(true, |stat| stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')))
}

/// Requires that the disk of a server can be changed in all ways that its user does not see.
pub fn assert_changes(work: &Work, disk: &str) {
    for words in [
        "snapshot create DISK two",
        "snapshot create DISK three",
        "snapshot create DISK four",
        "snapshot rename DISK two zwei",
        "snapshot merge DISK three --in-batches",
        "snapshot merge DISK zwei",
        "snapshot merge DISK four",
        "resize DISK +1M",
        "compact DISK",
        "check DISK",
    ] {
        work.vdisk(&words.replace("DISK", disk)).succeeds();
    }
}

#[test]
fn a_server_that_was_taken_over_changes_no_file_in_the_directory_of_its_disk() {
    if !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    // The socket is there, too: it goes with the server, and nothing else can.
    let words = "nbd disks/web.qcow2 --socket disks/web.sock --jail require";
    let served = Served::start(&work, words);
    let puppet = Puppet::stop(served.pid(), i32::try_from(served.pid()).unwrap());
    assert_changes_nothing(&puppet, &work);
    drop(puppet);
    assert_untouched(&work);
    assert_changes(&work, "disks/web.qcow2");
    served.stop();
    assert!(!work.path("disks/web.sock").exists());
    assert_untouched(&work);
    work.vdisk("check disks/web.qcow2").succeeds();
}

/// Requires that what a process tries by name in the directory of the disk is refused, for the disk, too.
fn assert_changes_nothing(puppet: &Puppet, work: &Work) {
    let at = |name: &str| -> PathBuf { work.path("disks").join(name) };
    let (own, other, new, dir) = (at("web.qcow2"), at("other.qcow2"), at(FORMED), at("."));
    let here = Word::Is(i64::from(libc::AT_FDCWD));
    let is = |flags: i32| Word::Is(i64::from(flags));
    let link = at("web@bbbbbbbbbbbb.qcow2");
    let (at_own, at_other, at_new) = (Word::Path(&own), Word::Path(&other), Word::Path(&new));
    let mode = Word::Is(0o600);
    let attacks: Vec<(&str, i64, Vec<Word<'_>>)> = vec![
        ("write another", libc::SYS_openat, vec![here, at_other, is(libc::O_RDWR)]),
        ("write by a link", libc::SYS_openat, vec![here, Word::Path(&link), is(libc::O_WRONLY)]),
        ("cut another", libc::SYS_truncate, vec![at_other, Word::Is(0)]),
        ("empty another", libc::SYS_openat, vec![here, at_other, is(libc::O_TRUNC)]),
        ("write its own", libc::SYS_openat, vec![here, at_own, is(libc::O_RDWR)]),
        ("make", libc::SYS_openat, vec![here, at_new, is(libc::O_CREAT | libc::O_RDWR), mode]),
        (
            "make without a name",
            libc::SYS_openat,
            vec![here, Word::Path(&dir), is(libc::O_TMPFILE | libc::O_RDWR), mode],
        ),
        ("rename another", libc::SYS_rename, vec![at_other, at_new]),
        ("replace another", libc::SYS_rename, vec![at_own, at_other]),
        ("replace its own", libc::SYS_rename, vec![at_other, at_own]),
        ("link", libc::SYS_link, vec![at_other, at_new]),
        ("remove another", libc::SYS_unlink, vec![at_other]),
        ("remove its own", libc::SYS_unlink, vec![at_own]),
        ("make a link", libc::SYS_symlink, vec![at_other, at_new]),
        ("make a directory", libc::SYS_mkdir, vec![at_new, mode]),
        ("make a device", libc::SYS_mknod, vec![at_new, Word::Is(0o600 | 0o060_000), Word::Is(0)]),
    ];
    for (what, number, words) in attacks {
        let done = puppet.call(number, &words);
        let refused = [-i64::from(libc::EPERM), -i64::from(libc::EACCES)];
        assert!(refused.contains(&done), "{what}: {done}");
    }
    // Headers of what stands beside it are read.
    assert!(puppet.call(libc::SYS_openat, &[here, at_other, is(libc::O_RDONLY)]) >= 0);
}

#[test]
fn without_its_broker_a_server_serves_on_and_says_why_its_tree_stays_as_it_is() {
    if !have(Need::Landlock) || !have(Need::Qemu) {
        return;
    }
    let work = neighbours();
    let served = Served::start(&work, "nbd disks/web.qcow2 --socket sock --jail require");
    served.qemu_io(&work, &["write -P 0x22 0 64k", "flush"]).succeeds();
    let process = broker(served.pid()).unwrap();
    kill(NixPid::from_raw(i32::try_from(process).unwrap()), Signal::SIGKILL).unwrap();
    soon("the broker's end", || has_ended(process));
    let why = ["the process beside this one", "has ended", "start it anew"];
    work.vdisk("snapshot create disks/web.qcow2 two").fails(&why);
    work.vdisk("snapshot delete disks/web.qcow2 one --yes").fails(&[]);
    served.qemu_io(&work, &["read -P 0x22 0 64k", "write -P 0x33 64k 64k", "flush"]).succeeds();
    // What needs no name goes on.
    work.vdisk("resize disks/web.qcow2 +1M").succeeds();
    served.stop();
    assert_untouched(&work);
    work.vdisk("check disks/web.qcow2").succeeds();
    let list = work.vdisk("snapshot list disks/web.qcow2").succeeds().out();
    assert!(list.contains("one") && !list.contains("two"), "{list}");
    assert_eq!(work.vdisk("read disks/web.qcow2 64K 1").succeeds().stdout, [0x33]);
}

#[test]
fn a_broker_ends_with_a_server_that_is_killed_and_not_by_what_ends_it() {
    let work = neighbours();
    let served = Served::start(&work, "nbd disks/web.qcow2 --socket sock");
    let process = broker(served.pid()).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(NixPid::from_raw(i32::try_from(process).unwrap()), signal).unwrap();
    }
    work.vdisk("snapshot create disks/web.qcow2 two").succeeds();
    served.signal(Signal::SIGKILL);
    soon("the broker's end", || has_ended(process));
    // Nothing of it keeps the disk.
    work.vdisk("write disks/web.qcow2 0").succeeds();
}

#[test]
fn without_a_jail_a_server_has_no_broker() {
    let work = neighbours();
    let served = Served::start(&work, "nbd disks/web.qcow2 --socket sock --jail off");
    assert_eq!(broker(served.pid()), None);
    work.vdisk("snapshot create disks/web.qcow2 two").succeeds();
    served.stop();
}

#[test]
fn the_tree_of_a_disk_changes_under_any_name_that_it_has() {
    if !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    fs::create_dir(work.path("names")).unwrap();
    symlink("../disks/web.qcow2", work.path("names/link")).unwrap();
    let long = "x".repeat(250);
    work.vdisk(&format!("clone base.raw disks/{long}")).succeeds();
    work.vdisk(&format!("snapshot create disks/{long} zero")).succeeds();
    work.vdisk("create disks/data.qcow2 8M --data-file data.raw").succeeds();
    for disk in ["names/link", &format!("disks/{long}"), "disks/data.qcow2"] {
        let served = Served::start(&work, &format!("nbd {disk} --socket sock --jail require"));
        assert_changes(&work, disk);
        served.stop();
        work.vdisk(&format!("check {disk}")).succeeds();
    }
    // Its snapshots keep the name that it had, and so does one on another branch.
    work.vdisk("snapshot create names/link branch").succeeds();
    work.vdisk("snapshot revert names/link one --yes").succeeds();
    fs::rename(work.path("disks/web.qcow2"), work.path("disks/new")).unwrap();
    let served = Served::start(&work, "nbd disks/new --socket sock --jail require");
    work.vdisk("snapshot delete disks/new branch --yes").succeeds();
    work.vdisk("snapshot undo disks/new --yes").succeeds();
    work.vdisk("snapshot delete disks/new branch --yes").succeeds();
    work.vdisk("snapshot forget disks/new --yes").succeeds();
    assert_changes(&work, "disks/new");
    work.vdisk("snapshot merge disks/new one").succeeds();
    served.stop();
    work.vdisk("check disks/new").succeeds();
    assert_eq!(work.bytes("disks/other.qcow2"), b"another disk");
    assert_eq!(work.bytes("disks/web@aaaaaaaaaaaa.qcow2"), b"another disk");
}

#[test]
fn the_disks_of_a_guest_have_one_broker_in_all_their_directories() {
    if !can_boot() || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let own = Work::below(&work.path("disks"));
    own.vdisk("clone ../../bases/base.raw clone.qcow2").succeeds();
    own.put("other.qcow2", "another disk");
    let mut booted = Booted::waiting(&own);
    let stolen = Stolen::from(booted.pid());
    for what in [OPEN, CREATE, REMOVE] {
        stolen.refused(&request(what, b"other.qcow2", b""), &[libc::EPERM]);
    }
    drop(stolen);
    assert_changes(&own, "clone.qcow2");
    let process = broker(booted.pid()).unwrap();
    booted.signal(Signal::SIGTERM);
    assert_eq!(booted.status(), Some(0));
    soon("the broker's end", || has_ended(process));
    assert_eq!(own.bytes("other.qcow2"), b"another disk");
    assert!(!prey.program.exists());
}

#[test]
fn the_server_of_a_mount_has_a_broker_and_one_who_unmounts() {
    if !have(Need::Fuse) || !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    let at = work.path("at");
    fs::create_dir(&at).unwrap();
    work.vdisk("mount --raw disks/web.qcow2 at --jail require").succeeds();
    let process = u32::try_from(server(&at).unwrap().as_raw()).unwrap();
    let puppet = Puppet::stop(process, i32::try_from(process).unwrap());
    assert_changes_nothing(&puppet, &work);
    drop(puppet);
    File::options().write(true).open(at.join("disk.raw")).unwrap().write_all_at(b"in", 0).unwrap();
    assert_changes(&work, "disks/web.qcow2");
    work.vdisk("umount at").succeeds();
    is_left_alone(&at);
    assert_untouched(&work);
    work.vdisk("check disks/web.qcow2").succeeds();
    assert_eq!(work.vdisk("read disks/web.qcow2 0 2").succeeds().stdout, b"in");
}

#[test]
fn a_file_system_can_be_unmounted_as_soon_as_the_server_of_a_disk_on_it_has_ended() {
    if !have(Need::Root) || !have(Need::Fuse) {
        return;
    }
    let work = Work::new();
    for dir in ["host", "at"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    for _ in 0..5 {
        work.run("mount", ["-t", "tmpfs", "tmpfs", "host"]).succeeds();
        // Below what is to be unmounted, as a user is in the directory of his disks.
        let own = Work::below(&work.path("host"));
        own.vdisk("create disk.qcow2 8M").succeeds();
        let served = Served::start(&own, "nbd disk.qcow2 --socket sock");
        own.vdisk("snapshot create disk.qcow2 one").succeeds();
        served.stop();
        let disk = own.path("disk.qcow2");
        work.vdisk(&format!("mount --raw {} at", disk.display())).succeeds();
        work.vdisk("umount at").succeeds();
        work.run("umount", ["host"]).succeeds();
        drop(own);
    }
}
