//! `vdisk mount` and `vdisk umount`: file systems in disks and partitions, and what is left when
//! things go wrong.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Work;
use crate::require::{Need, have};

pub const MIB: u64 = 1 << 20;

/// Whether this machine can mount the file system in a disk.
fn can_mount() -> bool {
    have(Need::Fuse) && have(Need::Root) && have(Need::Qemu)
}

/// Writes to the beginning of a disk that is mounted as a file, whose size is the disk's.
#[track_caller]
pub fn overwrite(file: &Path, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

/// Requires that something comes true within some seconds.
#[track_caller]
pub fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} does not come true");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A raw file of so many bytes, all holes.
fn blank(work: &Work, name: &str, size: u64) {
    File::create(work.path(name)).unwrap().set_len(size).unwrap();
}

/// A test's directory with `disk.qcow2`, a 64 MiB ext4 file system that QEMU has written, and an
/// empty directory `at`.
fn ext4_disk() -> Work {
    let work = Work::new();
    blank(&work, "plain.raw", 64 * MIB);
    work.run("mke2fs", ["-q", "-t", "ext4", "plain.raw"]).succeeds();
    work.qemu_img("convert -f raw -O qcow2 plain.raw disk.qcow2").succeeds();
    fs::remove_file(work.path("plain.raw")).unwrap();
    fs::create_dir(work.path("at")).unwrap();
    work
}

/// Requires that QEMU and e2fsck find nothing wrong with `disk.qcow2`.
#[track_caller]
fn is_sound(work: &Work) {
    work.qemu_img("check disk.qcow2").succeeds();
    work.qemu_img("convert -O raw disk.qcow2 flat.raw").succeeds();
    work.run("e2fsck", ["-f", "-n", "flat.raw"]).succeeds();
    fs::remove_file(work.path("flat.raw")).unwrap();
}

/// Whether a process is one that a server has beside it: a copy, with the same command line.
pub fn is_beside(process: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    name.starts_with("vdisk-")
}

/// The process that serves the mount at a directory; those beside it have names of their own.
pub fn server(at: &Path) -> Option<Pid> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let at = at.to_str().unwrap();
    let found = numbers.find(|pid| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|b| *b == 0).collect();
        let verbs: [&[u8]; 2] = [b"mount-daemon", b"overlay-daemon"];
        words.get(1).is_some_and(|verb| verbs.contains(verb))
            && words.contains(&at.as_bytes())
            && !is_beside(*pid)
    });
    found.map(Pid::from_raw)
}

/// Waits until the process that serves a mount has ended.
#[track_caller]
pub fn is_left_alone(at: &Path) {
    soon("the end of the serving process", || server(at).is_none());
}

pub fn is_mounted(at: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == at.to_str())
}

/// Bytes that no compression and no run of zeroes explains away.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn what_is_written_to_a_mounted_disk_is_there_when_it_is_mounted_again() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    let file = noise(1, 5 << 20);
    work.vdisk("mount disk.qcow2 at").succeeds();
    fs::write(work.path("at/file"), &file).unwrap();
    fs::create_dir(work.path("at/dir")).unwrap();
    fs::write(work.path("at/dir/small"), "a few bytes").unwrap();
    work.vdisk("umount at").succeeds();
    assert!(!is_mounted(&work.path("at")));
    assert_eq!(server(&work.path("at")), None, "umount returned before the disk was free");
    is_sound(&work);

    work.vdisk("mount disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/file"), file);
    assert_eq!(work.bytes("at/dir/small"), b"a few bytes");
    fs::remove_file(work.path("at/file")).unwrap();
    work.vdisk("umount at").succeeds();
    is_sound(&work);
}

#[test]
fn a_read_only_mount_refuses_writes_and_changes_no_byte_of_the_disk() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    let before = work.bytes("disk.qcow2");
    work.vdisk("mount --read-only disk.qcow2 at").succeeds();
    let error = fs::write(work.path("at/file"), "no").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    work.vdisk("umount at").succeeds();
    assert!(work.bytes("disk.qcow2") == before, "the disk was written to");
}

#[test]
fn a_mount_that_plain_umount_takes_away_ends_by_itself() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    for raw in ["", "--raw"] {
        work.vdisk(&format!("mount {raw} disk.qcow2 at")).succeeds();
        assert!(server(&work.path("at")).is_some());
        work.run("umount", ["at"]).succeeds();
        is_left_alone(&work.path("at"));
    }
    is_sound(&work);
}

#[test]
fn a_mount_in_use_is_not_taken_away_and_its_user_is_named() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    work.vdisk("mount disk.qcow2 at").succeeds();
    let mut open = File::create(work.path("at/file")).unwrap();
    open.write_all(b"first").unwrap();
    let pid = format!("pid {}", std::process::id());
    work.vdisk("umount at").fails(&["in use", &pid]);
    open.write_all(b" and second").unwrap();
    drop(open);
    work.vdisk("umount at").succeeds();
    work.vdisk("mount disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/file"), b"first and second");
    work.vdisk("umount at").succeeds();
}

#[test]
fn a_mounted_disk_cannot_be_mounted_twice() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    fs::create_dir(work.path("other")).unwrap();
    work.vdisk("mount disk.qcow2 at").succeeds();
    work.vdisk("mount disk.qcow2 other").fails(&["disk.qcow2"]);
    work.vdisk("mount disk.qcow2 at").fails(&["at", "already"]);
    work.vdisk("umount at").succeeds();
    assert!(!is_mounted(&work.path("other")));
}

#[test]
fn a_server_that_is_killed_leaves_a_mount_that_fails_and_can_be_taken_away() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    let at = work.path("at");
    for raw in ["", "--raw"] {
        work.vdisk(&format!("mount {raw} disk.qcow2 at")).succeeds();
        if raw.is_empty() {
            // Synced before the kill: this much must survive it.
            let mut file = File::create(work.path("at/kept")).unwrap();
            file.write_all(b"durable").unwrap();
            file.sync_all().unwrap();
        }
        kill(server(&at).unwrap(), Signal::SIGKILL).unwrap();
        is_left_alone(&at);
        // In a process of its own: should it hang, the test does not.
        let probe =
            work.run("dd", ["if=/dev/zero", "of=at/more", "bs=1M", "count=8", "conv=fsync"]);
        assert_ne!(probe.code, Some(0), "a write to nowhere succeeded");
        // Longer than the kernel knows the disk's attributes without asking.
        thread::sleep(Duration::from_millis(1500));
        work.vdisk("umount at").fails(&["at", "gone"]);
        assert!(!is_mounted(&at));
    }
    work.qemu_img("check -r leaks disk.qcow2");
    work.vdisk("mount disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/kept"), b"durable");
    work.vdisk("umount at").succeeds();
}

#[test]
fn a_file_system_that_its_server_left_at_rest_is_let_go_on_and_taken_away() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    let at = work.path("at");
    work.vdisk("mount disk.qcow2 at").succeeds();
    fs::write(work.path("at/kept"), "durable").unwrap();
    let device = fs::metadata(&at).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let backing = format!("/sys/dev/block/{major}:{minor}/loop/backing_file");
    assert!(Path::new(&backing).exists());
    // As a server does for a snapshot, and is killed before it is taken.
    work.run("fsfreeze", ["--freeze", "at"]).succeeds();
    kill(server(&at).unwrap(), Signal::SIGKILL).unwrap();
    is_left_alone(&at);
    work.vdisk("umount at").fails(&["at", "gone"]);
    assert!(!is_mounted(&at));
    soon("the loop device to be free", || !Path::new(&backing).exists());
    work.qemu_img("check -r leaks disk.qcow2");
    work.vdisk("mount disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/kept"), b"durable");
    work.vdisk("umount at").succeeds();
}

#[test]
fn a_server_that_is_asked_to_end_unmounts_first_and_stays_while_the_mount_is_in_use() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    let at = work.path("at");
    work.vdisk("mount disk.qcow2 at").succeeds();
    let mut open = File::create(work.path("at/file")).unwrap();
    let pid = server(&at).unwrap();
    kill(pid, Signal::SIGTERM).unwrap();
    thread::sleep(Duration::from_millis(300));
    open.write_all(b"still served").unwrap();
    open.sync_all().unwrap();
    drop(open);
    kill(pid, Signal::SIGTERM).unwrap();
    is_left_alone(&at);
    assert!(!is_mounted(&at));
    is_sound(&work);
}

#[test]
fn a_mount_command_that_is_interrupted_leaves_a_mount_or_nothing() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    let at = work.path("at");
    for delay in 0..16 {
        let mut command = work.vdisk_start("mount disk.qcow2 at");
        thread::sleep(Duration::from_millis(delay));
        if !command.has_ended() {
            command.signal(Signal::SIGINT);
        }
        command.wait();
        // A process that finds its caller gone unmounts again.
        soon("an end of the start", || is_mounted(&at) == server(&at).is_some());
        if is_mounted(&at) {
            // May meet the process that takes the mount away itself.
            work.vdisk("umount at");
        }
        is_left_alone(&at);
        assert!(!is_mounted(&at), "after {delay} ms");
    }
    soon("a free disk", || work.qemu_img("check disk.qcow2").code == Some(0));
    is_sound(&work);
}

#[test]
fn what_vdisk_has_not_mounted_it_does_not_unmount() {
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("umount at").fails(&["at", "nothing is mounted"]);
    work.vdisk("umount missing").fails(&["missing"]);
    if have(Need::Root) {
        work.run("mount", ["-t", "tmpfs", "none", "at"]).succeeds();
        work.vdisk("umount at").fails(&["at", "tmpfs"]);
        assert!(is_mounted(&work.path("at")));
    }
}

/// A disk of 96 MiB with these `sgdisk` or `sfdisk` partitions, each filled by a command that
/// makes a file system in the file named last.
fn partitioned(work: &Work, parts: &[(u64, u64, &[&str])]) {
    let disk = File::options().write(true).open(work.path("plain.raw")).unwrap();
    for (first, sectors, command) in parts {
        blank(work, "part.raw", sectors * 512);
        work.run(command[0], command[1..].iter().chain(&["part.raw"])).succeeds();
        disk.write_all_at(&work.bytes("part.raw"), first * 512).unwrap();
    }
    drop(disk);
    work.qemu_img("convert -f raw -O qcow2 plain.raw disk.qcow2").succeeds();
    fs::create_dir(work.path("at")).unwrap();
}

const EXT4: &[&str] = &["mke2fs", "-q", "-t", "ext4"];
const EXT2: &[&str] = &["mke2fs", "-q", "-t", "ext2"];

#[test]
fn a_gpt_disk_says_which_partitions_it_has_and_mounts_the_one_that_is_named() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    blank(&work, "plain.raw", 96 * MIB);
    work.run("sgdisk", ["-n", "1:2048:+16M", "-n", "3:65536:+32M", "-n", "4:0:+8M", "plain.raw"])
        .succeeds();
    partitioned(&work, &[(2048, 32768, EXT2), (65536, 65536, EXT4)]);

    work.vdisk("mount disk.qcow2 at").fails(&[
        "--partition",
        "1: ext2 16 MiB",
        "3: ext4 32 MiB",
        "4: unknown 8 MiB",
    ]);
    work.vdisk("mount --partition 2 disk.qcow2 at").fails(&["no partition 2"]);
    work.vdisk("mount --partition 4 disk.qcow2 at").fails(&["partition 4", "no file system"]);
    for number in ["1", "3"] {
        work.vdisk(&format!("mount --partition {number} disk.qcow2 at")).succeeds();
        fs::write(work.path("at/number"), number).unwrap();
        work.vdisk("umount at").succeeds();
    }
    work.vdisk("mount --read-only --partition 1 disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/number"), b"1");
    work.vdisk("umount at").succeeds();

    // Neither file system has grown out of its partition into the table or its neighbour.
    work.qemu_img("convert -O raw disk.qcow2 flat.raw").succeeds();
    work.run("sgdisk", ["-v", "flat.raw"]).succeeds();
    let flat = work.bytes("flat.raw");
    for (first, sectors) in [(2048, 32768), (65536, 65536)] {
        work.put("part.raw", &flat[first * 512..][..sectors * 512]);
        work.run("e2fsck", ["-f", "-n", "part.raw"]).succeeds();
    }
}

#[test]
fn an_mbr_disk_mounts_its_primary_and_its_logical_partitions() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    blank(&work, "plain.raw", 96 * MIB);
    let layout = "label: dos\nstart=2048,size=32768,type=83\nstart=40960,type=5\n\
                  start=43008,size=32768,type=83\nstart=79872,size=32768,type=83\n";
    work.command("sfdisk", ["-q", "plain.raw"])
        .finish(Some(layout.into()), Duration::from_secs(20))
        .succeeds();
    partitioned(&work, &[(2048, 32768, EXT4), (43008, 32768, EXT2), (79872, 32768, EXT4)]);

    work.vdisk("mount disk.qcow2 at").fails(&["1: ext4 16 MiB", "5: ext2 16 MiB", "6: ext4"]);
    for number in ["1", "5", "6"] {
        work.vdisk(&format!("mount --partition {number} disk.qcow2 at")).succeeds();
        fs::write(work.path("at/number"), number).unwrap();
        work.vdisk("umount at").succeeds();
    }
    work.vdisk("mount --partition 5 disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/number"), b"5");
    work.vdisk("umount at").succeeds();
}

#[test]
fn a_disk_without_a_file_system_says_what_it_holds() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    blank(&work, "plain.raw", 16 * MIB);
    work.qemu_img("convert -f raw -O qcow2 plain.raw empty.qcow2").succeeds();
    work.vdisk("mount empty.qcow2 at").fails(&["no file system"]);
    work.vdisk("mount --partition 1 empty.qcow2 at").fails(&["no partition table"]);
    let file = File::options().write(true).open(work.path("plain.raw")).unwrap();
    file.write_all_at(b"LUKS\xba\xbe\0\x01", 0).unwrap();
    work.qemu_img("convert -f raw -O qcow2 plain.raw locked.qcow2").succeeds();
    work.vdisk("mount locked.qcow2 at").fails(&["LUKS"]);
    work.vdisk("mount missing.qcow2 at").fails(&["missing.qcow2"]);
    work.vdisk("mount locked.qcow2 nowhere").fails(&["nowhere"]);
    work.vdisk("mount locked.qcow2 plain.raw").fails(&["plain.raw", "directory"]);
    assert!(!is_mounted(&work.path("at")));
}

#[test]
fn a_damaged_file_system_is_refused_and_nothing_stays_mounted() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    blank(&work, "plain.raw", 16 * MIB);
    work.run("mke2fs", ["-q", "-t", "ext4", "plain.raw"]).succeeds();
    let file = File::options().write(true).open(work.path("plain.raw")).unwrap();
    file.write_all_at(&[0xff; 64], 1024 + 96).unwrap();
    work.qemu_img("convert -f raw -O qcow2 plain.raw disk.qcow2").succeeds();
    work.vdisk("mount disk.qcow2 at").fails(&["ext", "refused"]);
    assert!(!is_mounted(&work.path("at")));
    is_left_alone(&work.path("at"));
    // The disk is free: its lock went with the server.
    work.qemu_io("disk.qcow2", &["write -P 7 0 64k"]).succeeds();
}

#[test]
fn mounts_of_many_disks_at_once_do_not_meet() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    let names: Vec<PathBuf> = (0..6).map(|n| work.path(format!("m{n}"))).collect();
    for name in &names {
        fs::create_dir(name).unwrap();
        fs::copy(work.path("disk.qcow2"), name.with_extension("qcow2")).unwrap();
    }
    thread::scope(|scope| {
        for name in &names {
            let work = &work;
            scope.spawn(move || {
                let (disk, at) = (name.with_extension("qcow2"), name.as_path());
                let seed = u64::from(name.to_str().unwrap().bytes().last().unwrap());
                let file = noise(seed, 3 << 20);
                work.vdisk_args([Path::new("mount"), &disk, at]).succeeds();
                fs::write(at.join("file"), &file).unwrap();
                work.vdisk_args([Path::new("umount"), at]).succeeds();
                work.vdisk_args([Path::new("mount"), &disk, at]).succeeds();
                assert!(fs::read(at.join("file")).unwrap() == file);
                work.vdisk_args([Path::new("umount"), at]).succeeds();
            });
        }
    });
}

#[test]
fn a_full_host_is_an_error_to_the_writer_and_to_umount_and_the_disk_stays_sound() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    fs::create_dir(work.path("host")).unwrap();
    work.run("mount", ["-t", "tmpfs", "-o", "size=12M", "none", "host"]).succeeds();
    fs::copy(work.path("disk.qcow2"), work.path("host/disk.qcow2")).unwrap();
    work.vdisk("mount host/disk.qcow2 at").succeeds();
    let write = work.run("dd", ["if=/dev/urandom", "of=at/big", "bs=1M", "count=40", "conv=fsync"]);
    assert_ne!(write.code, Some(0), "40 MiB went into 12");
    // Whatever umount says, it ends, and a second call or a plain umount clears what is left.
    let first = work.vdisk("umount at");
    assert!(matches!(first.code, Some(0 | 1)), "{}", first.text());
    if is_mounted(&work.path("at")) {
        work.run("umount", ["at"]).succeeds();
    }
    is_left_alone(&work.path("at"));
    let check = work.qemu_img("check host/disk.qcow2");
    assert!(matches!(check.code, Some(0 | 3)), "{}", check.text());
}

#[test]
fn a_snapshots_files_can_be_mounted_to_look_at_them() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    for name in ["before", "after"] {
        work.vdisk("mount disk.qcow2 at").succeeds();
        fs::write(work.path("at").join(name), name).unwrap();
        work.vdisk("umount at").succeeds();
        work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
    }
    work.vdisk("mount --snapshot before disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/before"), b"before");
    assert!(!work.path("at/after").exists());
    assert!(fs::write(work.path("at/more"), "").is_err());
    work.vdisk("umount at").succeeds();
    work.vdisk("mount --snapshot missing disk.qcow2 at").fails(&["missing", "before", "after"]);
    work.vdisk("mount --ephemeral --snapshot before disk.qcow2 at").succeeds();
    fs::remove_file(work.path("at/before")).unwrap();
    work.vdisk("umount at").succeeds();
    work.vdisk("mount disk.qcow2 at").succeeds();
    assert_eq!(work.bytes("at/before"), b"before");
    assert_eq!(work.bytes("at/after"), b"after");
    work.vdisk("umount at").succeeds();
    is_sound(&work);
}

/// A container's mount namespace begins as a copy of the host's, with every disk mounted there:
/// `vdisk umount` once waited until all containers had ended.
#[test]
fn a_container_does_not_keep_other_disks_from_being_unmounted() {
    if !can_mount() {
        return;
    }
    let work = ext4_disk();
    fs::create_dir_all(work.path("files/bin")).unwrap();
    fs::copy("/bin/busybox", work.path("files/bin/busybox")).unwrap();
    blank(&work, "root.raw", 32 * MIB);
    work.run("mke2fs", ["-q", "-t", "ext4", "-d", "files", "root.raw"]).succeeds();
    work.qemu_img("convert -f raw -O qcow2 root.raw root.qcow2").succeeds();
    work.vdisk("mount disk.qcow2 at").succeeds();
    let program = format!("/bin/busybox sleep 59.{}", std::process::id());
    let container = work.vdisk_start(&format!("run root.qcow2 -- {program}"));
    let words = program.replace(' ', "\0") + "\0";
    soon("the container's start", || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
            .any(|line| line == words.as_bytes())
    });
    let begun = Instant::now();
    work.vdisk("umount at").succeeds();
    assert!(begun.elapsed() < Duration::from_secs(30), "it waited for the container");
    is_sound(&work);
    container.signal(Signal::SIGTERM);
    container.wait();
}
