//! The files in a disk without the kernel: mounted by whoever has the disk, and copied in and out.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use nix::sys::signal::{Signal, kill};

use crate::host::{VDISK, Work};
use crate::mount::{MIB, noise, server, soon};
use crate::require::{Need, have};
use crate::twin::json;

/// `disk.q` with an empty file system, and an empty directory `at`.
fn disk(options: &str) -> Work {
    let work = Work::new();
    File::create(work.path("plain.raw")).unwrap().set_len(64 * MIB).unwrap();
    let words = format!("-q -F {options} plain.raw");
    work.run("mke2fs", words.split_whitespace()).succeeds();
    work.vdisk("convert plain.raw disk.q").succeeds();
    fs::remove_file(work.path("plain.raw")).unwrap();
    fs::create_dir(work.path("at")).unwrap();
    work
}

/// Fails unless e2fsck finds nothing to say of the disk, or of a snapshot of it: not even a journal
/// that is to be replayed.
#[track_caller]
fn is_clean(work: &Work, disk: &str) {
    let _ = fs::remove_file(work.path("flat.raw"));
    work.vdisk(&format!("convert --format raw {disk} flat.raw")).succeeds();
    let features = work.run("dumpe2fs", ["-h", "flat.raw"]).succeeds().out();
    assert!(!features.contains("needs_recovery"), "{features}");
    work.run("e2fsck", ["-f", "-n", "flat.raw"]).succeeds();
}

fn can_mount() -> bool {
    have(Need::Fuse) && have(Need::Root)
}

#[test]
fn files_go_into_a_disk_and_come_out_as_they_were() {
    let work = disk("-t ext4");
    fs::create_dir_all(work.path("tree/below/empty")).unwrap();
    let bytes = noise(1, 300_000);
    work.put("tree/below/noise", &bytes);
    symlink("/etc/passwd", work.path("tree/link")).unwrap();
    fs::hard_link(work.path("tree/below/noise"), work.path("tree/again")).unwrap();
    let sparse = File::create(work.path("tree/sparse")).unwrap();
    sparse.set_len(20 * MIB).unwrap();
    fs::set_permissions(work.path("tree/below"), fs::Permissions::from_mode(0o2750)).unwrap();

    work.vdisk("cp tree disk.q:/").fails(&["--recursive"]);
    work.vdisk("cp -a tree disk.q:/").succeeds();
    work.put("one", "one");
    work.vdisk("cp one disk.q:tree/below/empty").succeeds();
    work.vdisk("cp one disk.q:/two").succeeds();
    assert_eq!(
        work.vdisk("cat disk.q:two disk.q:/tree/below/empty/one").succeeds().out(),
        "oneone"
    );
    is_clean(&work, "disk.q");

    let rows = json(work.vdisk("ls --json -R disk.q:tree"));
    let rows = rows["files"].as_array().unwrap();
    let row = |path: &str| rows.iter().find(|row| row["path"] == path).unwrap().clone();
    assert_eq!(row("link")["target"], "/etc/passwd");
    assert_eq!((&row("again")["links"], &row("below")["mode"]), (&2.into(), &"2750".into()));
    assert_eq!(row("again")["inode"], row("below/noise")["inode"]);
    assert!(work.vdisk("ls -l disk.q:/two").succeeds().out().starts_with("-rw-r--r--"));

    work.vdisk("cp -a disk.q:tree out").succeeds();
    assert!(fs::read(work.path("out/below/noise")).unwrap() == bytes);
    assert_eq!(fs::read_link(work.path("out/link")).unwrap(), Path::new("/etc/passwd"));
    let meta = |name: &str| fs::metadata(work.path(name)).unwrap();
    assert_eq!(meta("out/again").ino(), meta("out/below/noise").ino(), "one file with two names");
    assert_eq!(meta("out/below").mode() & 0o7777, 0o2750);
    assert_eq!(meta("out/sparse").len(), 20 * MIB);
    assert!(meta("out/sparse").blocks() < 100, "a hole came out as a hole");
    assert_eq!(meta("out/again").mtime(), meta("tree/again").mtime());

    work.vdisk("cp -r disk.q:/tree/below/. no/such").fails(&["no"]);
    fs::create_dir(work.path("into")).unwrap();
    work.vdisk("cp -r disk.q:/tree/below/. into").succeeds();
    assert!(work.path("into/noise").exists() && work.path("into/empty/one").exists());

    work.vdisk("rm disk.q:tree").fails(&["--recursive"]);
    work.vdisk("rm disk.q:not-there").fails(&["not-there"]);
    work.vdisk("rm -f disk.q:not-there").succeeds();
    work.vdisk("rm -r disk.q:tree disk.q:two").succeeds();
    assert_eq!(work.vdisk("ls disk.q:").succeeds().out(), "lost+found\n");
    is_clean(&work, "disk.q");
}

#[test]
fn nothing_in_a_disk_leads_out_of_it() {
    let work = disk("-t ext4");
    fs::create_dir(work.path("tree")).unwrap();
    symlink("/", work.path("tree/root")).unwrap();
    symlink("../../../..", work.path("tree/up")).unwrap();
    work.vdisk("cp -r tree disk.q:/").succeeds();
    work.put("secret", "the disk's own");
    work.vdisk("cp secret disk.q:/passwd").succeeds();
    // What a link says is looked for in the disk.
    for path in ["tree/root/passwd", "tree/up/passwd", "../../passwd", "tree/root/tree/up/passwd"] {
        let read = work.vdisk(&format!("cat disk.q:{path}")).succeeds();
        assert_eq!(read.out(), "the disk's own", "{path}");
    }
    work.vdisk("cat disk.q:/tree/root/etc/hostname").fails(&["there is no"]);
    // And a link that a copy finds in its way is not followed.
    fs::create_dir(work.path("elsewhere")).unwrap();
    fs::create_dir_all(work.path("out/tree")).unwrap();
    symlink(work.path("elsewhere"), work.path("out/tree/below")).unwrap();
    fs::create_dir(work.path("tree/below")).unwrap();
    work.put("tree/below/file", "x");
    work.vdisk("cp -r tree/below disk.q:/tree").succeeds();
    work.vdisk("cp -r disk.q:tree out").fails(&["below"]);
    assert_eq!(fs::read_dir(work.path("elsewhere")).unwrap().count(), 0);
}

#[test]
fn what_is_no_file_in_a_disk_is_said() {
    let work = disk("-t ext4");
    work.put("one", "one");
    work.vdisk("cp one two").fails(&["DISK:PATH"]);
    work.vdisk("cat nothing.q:/x").fails(&["DISK:PATH"]);
    work.vdisk("cp disk.q:/lost+found disk.q:/x").fails(&["copy out"]);
    work.vdisk("cp --snapshot none one disk.q:/").fails(&["only read"]);
    let mut blank = vec![0; 1 << 20];
    blank[..4].copy_from_slice(b"XFSB");
    work.put("xfs.raw", &blank);
    work.vdisk("ls xfs.raw:/").fails(&["xfs", "root can mount"]);
    work.vdisk("create empty.q 1M").succeeds();
    work.vdisk("ls empty.q:/").fails(&["no file system"]);
}

#[test]
fn what_was_synced_outlives_the_process_that_served_it() {
    if !can_mount() {
        return;
    }
    let work = disk("-t ext4");
    let at = work.path("at");
    work.vdisk("mount --user-space disk.q at").succeeds();
    let bytes = noise(2, 500_000);
    let mut synced = File::create(at.join("synced")).unwrap();
    synced.write_all(&bytes).unwrap();
    synced.sync_all().unwrap();
    // Never synced, and deleted while it is open.
    fs::write(at.join("lost"), &bytes).unwrap();
    let mut open = File::create(at.join("open")).unwrap();
    open.write_all(&bytes).unwrap();
    fs::remove_file(at.join("open")).unwrap();
    open.sync_all().unwrap();
    kill(server(&at).unwrap(), Signal::SIGKILL).unwrap();
    drop((synced, open));
    work.run("umount", ["-l", "at"]).succeeds();
    soon("the disk's freedom", || work.vdisk("ls disk.q:/").code == Some(0));
    // The kernel's driver takes it as it is, and so do we.
    assert!(work.vdisk("ls disk.q:/").succeeds().out().contains("synced"));
    work.vdisk("mount --user-space disk.q at").succeeds();
    assert!(fs::read(at.join("synced")).unwrap() == bytes);
    assert!(!at.join("open").exists());
    work.vdisk("umount at").succeeds();
    is_clean(&work, "disk.q");
    work.vdisk("mount disk.q at").succeeds();
    assert!(fs::read(at.join("synced")).unwrap() == bytes);
    work.vdisk("umount at").succeeds();
}

#[test]
fn a_snapshot_of_a_mount_in_user_space_is_a_file_system_at_rest() {
    if !can_mount() {
        return;
    }
    let work = disk("-t ext4");
    let at = work.path("at");
    work.vdisk("mount --user-space disk.q at").succeeds();
    fs::write(at.join("before"), noise(3, 100_000)).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for n in 0..300 {
                fs::write(at.join(format!("file{n}")), noise(n, 5000)).unwrap();
            }
        });
        for n in 0..5 {
            work.vdisk(&format!("snapshot create disk.q s{n}")).succeeds();
        }
        writer.join().unwrap();
    });
    work.vdisk("ls disk.q:/").fails(&["in use by", "pid"]);
    work.vdisk("umount at").succeeds();
    work.vdisk("mount --raw --read-only disk.q at").succeeds();
    for n in 0..5 {
        let features = work.run("dumpe2fs", ["-h".into(), format!("at/snapshots/s{n}.raw")]);
        let features = features.succeeds().out();
        assert!(!features.contains("needs_recovery"), "{features}");
        work.run("e2fsck", ["-fn".into(), format!("at/snapshots/s{n}.raw")]).succeeds();
    }
    work.vdisk("umount at").succeeds();
    for n in 0..5 {
        assert_eq!(work.vdisk(&format!("cat --snapshot s{n} disk.q:before")).code, Some(0));
    }
    is_clean(&work, "disk.q");
}

#[test]
fn an_ordinary_user_mounts_a_disk_and_writes_to_it() {
    if !can_mount() {
        return;
    }
    let work = disk("-t ext4 -E root_owner=1000:1000");
    fs::set_permissions(work.dir(), fs::Permissions::from_mode(0o777)).unwrap();
    work.run("chown", ["-R", "1000:1000", "disk.q", "at"]).succeeds();
    // The user's own program: the one that was built may stand where he may not look.
    fs::copy(VDISK, work.path("vdisk")).unwrap();
    // In a mount namespace of its own, /dev/fuse is as everywhere else.
    let script = r#"
        set -e
        mount -t tmpfs none /mnt
        mknod -m 666 /mnt/fuse c 10 229
        mount --bind /mnt/fuse /dev/fuse
        # The directory that the tests work in may be closed to the user.
        mkdir /mnt/work
        mkdir -m 1777 /mnt/run
        mount --bind . /mnt/work
        cd /mnt/work
        as_user() { setpriv --reuid 1000 --regid 1000 --clear-groups env HOME=/ TMPDIR=/mnt/run "$@"; }
        as_user ./vdisk mount disk.q at
        as_user sh -c 'echo hello > at/file && mkdir at/dir && ln -s file at/link'
        as_user cat at/link
        ! as_user chown 5 at/file 2> /dev/null
        ! as_user touch at/lost+found/x 2> /dev/null
        as_user ./vdisk snapshot create disk.q one
        as_user sh -c 'echo more >> at/file'
        as_user ./vdisk umount at
        as_user ./vdisk cat disk.q:file --snapshot one
        as_user ./vdisk cat disk.q:file
        as_user ./vdisk mount --read-only disk.q at
        ! as_user touch at/new 2> /dev/null
        as_user ./vdisk umount at
    "#;
    let words = ["-m", "--propagation", "private", "sh", "-c", script];
    let told = work.run("unshare", words).succeeds().out();
    assert_eq!(told, "hello\nhello\nhello\nmore\n");
    is_clean(&work, "disk.q");
}

#[test]
fn a_partition_is_mounted_and_read_in_user_space() {
    if !can_mount() {
        return;
    }
    let work = disk("-t ext4 -b 4096");
    // A table with one partition, from 1 MiB on.
    let flat = work.path("inner.raw");
    work.vdisk("convert --format raw disk.q inner.raw").succeeds();
    let inner = fs::read(&flat).unwrap();
    let mut whole = vec![0; inner.len() + (1 << 20)];
    whole[1 << 20..].copy_from_slice(&inner);
    let sectors = (inner.len() / 512) as u32;
    whole[446 + 4] = 0x83;
    whole[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
    whole[446 + 12..446 + 16].copy_from_slice(&sectors.to_le_bytes());
    whole[510..512].copy_from_slice(&[0x55, 0xaa]);
    work.put("parts.raw", &whole);
    work.vdisk("convert parts.raw parts.q").succeeds();
    work.vdisk("ls parts.q:/").fails(&["--partition", "1: ext4"]);
    work.vdisk("mount --user-space --partition 1 parts.q at").succeeds();
    fs::write(work.path("at/here"), "in a partition").unwrap();
    work.vdisk("umount at").succeeds();
    let told = work.vdisk("cat --partition 1 parts.q:here").succeeds().out();
    assert_eq!(told, "in a partition");
}

#[test]
fn a_file_system_whose_root_is_gone_is_refused_by_the_disks_name() {
    if !can_mount() {
        return;
    }
    let work = disk("-t ext4");
    work.vdisk("convert --format raw disk.q plain.raw").succeeds();
    work.run("debugfs", ["-w", "-R", "clri <2>", "plain.raw"]).succeeds();
    fs::create_dir(work.path("up")).unwrap();
    for command in ["mount --user-space plain.raw at", "mount --overlay up plain.raw at"] {
        work.vdisk(command).fails(&["plain.raw", "inode 2 is no file"]);
        assert!(fs::read_dir(work.path("at")).unwrap().next().is_none());
    }
}

#[test]
fn an_overlay_over_a_disk_leaves_the_disk_as_it_is() {
    if !can_mount() {
        return;
    }
    let work = disk("-t ext4");
    fs::create_dir(work.path("up")).unwrap();
    for (name, bytes) in [("a", "base"), ("gone", "gone")] {
        work.put("host", bytes);
        work.vdisk(&format!("cp host disk.q:/{name}")).succeeds();
    }
    work.vdisk("snapshot create disk.q s").succeeds();
    work.vdisk("rm disk.q:/gone").succeeds();
    let before = work.bytes("disk.q");
    work.vdisk("mount --overlay up disk.q --snapshot s at").succeeds();
    assert_eq!(work.bytes("at/gone"), b"gone");
    fs::write(work.path("at/a"), "changed").unwrap();
    fs::remove_file(work.path("at/gone")).unwrap();
    fs::write(work.path("at/new"), "new").unwrap();
    work.vdisk("umount at").succeeds();
    work.vdisk("mount --overlay up disk.q at").succeeds();
    let see = |name: &str| fs::read(work.path(name)).ok();
    let found = (see("at/a"), see("at/gone"), see("at/new"));
    work.vdisk("umount at").succeeds();
    assert_eq!(found, (Some(b"changed".to_vec()), None, Some(b"new".to_vec())));
    assert!(work.bytes("disk.q") == before, "the disk was written");
    assert_eq!(work.bytes("up/a"), b"changed");
    work.vdisk("check disk.q").succeeds();
}

#[test]
fn what_is_copied_within_a_mount_is_copied_by_its_server_and_reading_around_is_no_access() {
    if !can_mount() {
        return;
    }
    let work = disk("-t ext4");
    work.vdisk("mount --user-space disk.q at").succeeds();
    let at = |name: &str| work.path("at").join(name);
    let bytes = noise(2, 3_500_000);
    fs::write(at("from"), &bytes).unwrap();
    fs::write(at("to"), noise(3, 5000)).unwrap();
    fs::set_permissions(at("to"), fs::Permissions::from_mode(0o6755)).unwrap();
    let (from, to) = (File::open(at("from")).unwrap(), File::options().write(true).open(at("to")));
    let to = to.unwrap();
    let copy = |read: u64, write: u64, len: usize| {
        let (mut read, mut write) = (read, write);
        rustix::fs::copy_file_range(&from, Some(&mut read), &to, Some(&mut write), len).unwrap()
    };
    // From and to odd places, to the end and past it; what was just written comes along.
    assert_eq!(copy(1001, 3003, 1 << 30), bytes.len() - 1001);
    assert_eq!(copy(bytes.len() as u64, 0, 10), 0);
    rustix::io::pwrite(File::options().write(true).open(at("from")).unwrap(), b"new", 0).unwrap();
    assert_eq!(copy(0, 0, 3), 3);
    let mut wanted = noise(3, 5000);
    wanted.truncate(3003);
    wanted.extend_from_slice(&bytes[1001..]);
    wanted[..3].copy_from_slice(b"new");
    assert!(fs::read(at("to")).unwrap() == wanted);
    let mode = || fs::metadata(at("to")).unwrap().mode() & 0o7777;
    assert_eq!(mode(), 0o6755, "the superuser's change leaves them");

    // Of much, a part at a time.
    File::create(at("much")).unwrap().set_len(20 * MIB).unwrap();
    let (much, all) = (File::open(at("much")).unwrap(), File::create(at("all")).unwrap());
    let copy = || rustix::fs::copy_file_range(&much, None, &all, None, 1 << 30).unwrap() as u64;
    assert_eq!([copy(), copy(), copy()], [16 * MIB, 4 * MIB, 0]);
    drop((much, all));

    // Of a hole, zeroes are written.
    File::create(at("hole")).unwrap().set_len(2 * MIB).unwrap();
    let (hole, flat) = (File::open(at("hole")).unwrap(), File::create(at("flat")).unwrap());
    let copied = rustix::fs::copy_file_range(&hole, None, &flat, None, 2 << 20).unwrap();
    assert_eq!((copied, fs::metadata(at("flat")).unwrap().blocks()), (2 << 20, 2 * MIB / 512));
    drop((from, to, hole, flat));

    // Who adds to a file reads nothing of it.
    let long_ago = fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH);
    File::open(at("to")).unwrap().set_times(long_ago).unwrap();
    work.vdisk("umount at").succeeds();
    work.vdisk("mount --user-space disk.q at").succeeds();
    File::options().append(true).open(at("to")).unwrap().write_all(b"x").unwrap();
    work.vdisk("umount at").succeeds();
    work.vdisk("mount --user-space disk.q at").succeeds();
    assert_eq!(fs::metadata(at("to")).unwrap().atime(), 0);
    assert!(fs::read(at("to")).unwrap().ends_with(b"x"));
    assert_ne!(fs::metadata(at("to")).unwrap().atime(), 0);
    work.vdisk("umount at").succeeds();
    is_clean(&work, "disk.q");
}
