//! Snapshots, merges, sizes and compaction of a disk that is mounted, in a container, or booted: the
//! command reaches the process that holds it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{VDISK, Work};
use crate::mount::soon;
use crate::require::{Need, have};

const MIB: u64 = 1 << 20;

fn can_mount() -> bool {
    have(Need::Fuse) && have(Need::Root) && have(Need::Qemu)
}

/// A test's directory with `disk.qcow2`, an ext4 file system that QEMU has written, mounted at `at`.
fn mounted(options: &str) -> Work {
    let work = Work::new();
    fs::File::create(work.path("plain.raw")).unwrap().set_len(64 * MIB).unwrap();
    work.run("mke2fs", ["-q", "-t", "ext4", "plain.raw"]).succeeds();
    work.qemu_img("convert -f raw -O qcow2 plain.raw disk.qcow2").succeeds();
    fs::remove_file(work.path("plain.raw")).unwrap();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk(&format!("mount {options} disk.qcow2 at")).succeeds();
    work
}

/// Requires that QEMU finds nothing wrong with any layer, nor e2fsck with what it shows.
#[track_caller]
fn all_sound(work: &Work) {
    for name in work.files().iter().filter(|n| n.ends_with(".qcow2")) {
        work.qemu_img(&format!("check {name}")).succeeds();
        work.qemu_img(&format!("convert -O raw {name} flat.raw")).succeeds();
        // A journal that is not empty is no error: it is replayed first, as by a mount.
        let code = work.run("e2fsck", ["-f", "-y", "flat.raw"]).code;
        assert!(matches!(code, Some(0 | 1)), "{name}: e2fsck says {code:?}");
        work.run("e2fsck", ["-f", "-n", "flat.raw"]).succeeds();
        fs::remove_file(work.path("flat.raw")).unwrap();
    }
}

/// What a snapshot shows of a file.
fn in_snapshot(work: &Work, name: &str, file: &str) -> Option<Vec<u8>> {
    let at = work.path("past");
    let _ = fs::create_dir(&at);
    work.vdisk(&format!("mount --snapshot {name} --read-only disk.qcow2 past")).succeeds();
    let bytes = fs::read(at.join(file)).ok();
    work.vdisk("umount past").succeeds();
    bytes
}

#[test]
fn a_mounted_disk_takes_frozen_snapshots_under_a_writer() {
    if !can_mount() {
        return;
    }
    let work = mounted("");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut number = 0u64;
            while !over.load(Ordering::Relaxed) {
                number += 1;
                let file = work.path(format!("at/log{}", number % 7));
                fs::write(file, number.to_string().repeat(3000)).unwrap();
            }
        });
        for name in ["one", "two", "three"] {
            // Frozen, what was written before is part of it without a sync.
            fs::write(work.path("at/mark"), name).unwrap();
            work.vdisk(&format!("snapshot create disk.qcow2 {name} --freeze")).succeeds();
        }
        fs::write(work.path("at/mark"), "now").unwrap();
        work.vdisk("snapshot merge disk.qcow2 two").succeeds();
        let text = work.vdisk("info disk.qcow2").succeeds().out();
        assert!(text.contains("held as: mounted at"), "{text}");
        work.vdisk("snapshot revert disk.qcow2 one --yes").fails(&["umount"]);
        work.vdisk("snapshot delete disk.qcow2 three --yes").fails(&["stop it first"]);
        work.vdisk("compact disk.qcow2").succeeds();
        over.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    assert_eq!(fs::read_to_string(work.path("at/mark")).unwrap(), "now");
    work.vdisk("umount at").succeeds();
    all_sound(&work);
    assert_eq!(in_snapshot(&work, "one", "mark").unwrap(), b"one");
    assert_eq!(in_snapshot(&work, "three", "mark").unwrap(), b"three");
    let list = work.vdisk("snapshot list disk.qcow2").succeeds().out();
    assert!(list.contains("one") && !list.contains("two") && list.contains("* three"), "{list}");
}

#[test]
fn a_mounted_disk_grows_and_its_loop_device_with_it() {
    if !can_mount() {
        return;
    }
    let work = mounted("");
    work.vdisk("resize disk.qcow2 96M").succeeds();
    let source = work.run("findmnt", ["-n", "-o", "SOURCE", "at"]).succeeds().out();
    let device = source.trim();
    let size = work.run("blockdev", ["--getsize64", device]).succeeds().out();
    assert_eq!(size.trim(), (96 * MIB).to_string());
    work.vdisk("resize disk.qcow2 64M --shrink").fails(&["in use"]);
    work.vdisk("umount at").succeeds();
    all_sound(&work);
}

#[test]
fn a_merge_of_a_mounted_disk_is_slowed_down_and_cancelled() {
    if !can_mount() {
        return;
    }
    let work = mounted("");
    fs::write(work.path("at/much"), vec![7; 20 << 20]).unwrap();
    work.vdisk("snapshot create disk.qcow2 one --freeze").succeeds();
    let began = Instant::now();
    let merge = work.vdisk_start("snapshot merge disk.qcow2 one --rate 1M");
    soon("a merge under way", || {
        work.vdisk("info disk.qcow2").succeeds().out().contains("under way: merge")
    });
    work.vdisk("snapshot create disk.qcow2 two").fails(&["under way"]);
    merge.signal(Signal::SIGINT);
    merge.wait().fails(&["interrupted"]);
    assert!(began.elapsed() < Duration::from_secs(15), "it was cancelled long before its end");
    soon("the end of the merge", || {
        !work.vdisk("info disk.qcow2").succeeds().out().contains("under way")
    });
    let list = work.vdisk("snapshot list disk.qcow2").succeeds().out();
    assert!(list.contains("one"), "{list}");
    work.vdisk("snapshot merge disk.qcow2 one").succeeds();
    work.vdisk("umount at").succeeds();
    all_sound(&work);
    assert_eq!(work.files().iter().filter(|n| n.ends_with(".qcow2")).count(), 1);
}

#[test]
fn a_raw_mount_and_its_disk_without_a_label_are_found() {
    if !can_mount() {
        return;
    }
    let work = mounted("--raw");
    for name in ["one", "two"] {
        work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
    }
    work.vdisk("snapshot create disk.qcow2 three --freeze").fails(&["freeze"]);
    let diff = work.vdisk("snapshot diff disk.qcow2 one two").succeeds().out();
    assert_eq!(diff, "", "nothing was written");
    work.vdisk("resize disk.qcow2 +1M").succeeds();
    soon("the new size", || fs::metadata(work.path("at/disk.raw")).unwrap().len() == 65 * MIB);
    work.vdisk("umount at").succeeds();
    work.qemu_img("check disk.qcow2").succeeds();
}

/// The control socket of the process that holds a disk. A holder of an earlier file with the same inode
/// number may have left one too.
fn socket_of(work: &Work, disk: &str) -> PathBuf {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(work.path(disk)).unwrap();
    let info = work.vdisk(&format!("info --json {disk}")).succeeds().out();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let prefix = format!("file-{:x}-{:x}-{}-", meta.dev(), meta.ino(), info["held"]["pid"]);
    let entries = fs::read_dir("/run/vdisk").unwrap().map(|e| e.unwrap());
    let mut found = entries.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix));
    found.next().unwrap().path()
}

#[test]
fn without_a_run_directory_a_disk_in_use_is_found_below_tmpdir() {
    if !can_mount() || !have(Need::Root) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.qcow2 8M").succeeds();
    fs::create_dir(work.path("at")).unwrap();
    let script = format!(
        "set -e; mount -t tmpfs -o ro none /run; export TMPDIR=$PWD
         {VDISK} mount --raw disk.qcow2 at; trap '{VDISK} umount at' EXIT
         {VDISK} snapshot create disk.qcow2 s; {VDISK} snapshot list disk.qcow2"
    );
    let done = work.run("unshare", ["-m", "sh", "-c", &script]).succeeds();
    assert!(done.err().contains("control sockets are here"), "{}", done.err());
    assert!(done.err().contains("waited for"), "the mount took the snapshot: {}", done.err());
    assert!(done.out().contains("s "), "{}", done.out());
}

#[test]
fn a_hostile_client_does_not_keep_a_holder_from_its_work() {
    use std::os::unix::fs::MetadataExt;
    if !can_mount() {
        return;
    }
    let work = mounted("");
    let socket = socket_of(&work, "disk.qcow2");
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for nonsense in ["{}\n", "\u{0}\n", "[1,2]\n", "{\"do\":\"format\"}\n"] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(nonsense.as_bytes()).unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.contains("failed"), "{said}");
    }
    let mut endless = UnixStream::connect(&socket).unwrap();
    // It may be cut off before it has said all.
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);
    work.vdisk("snapshot create disk.qcow2 one").succeeds();
    drop(silent);
    work.vdisk("umount at").succeeds();
    assert!(!socket.exists());
    all_sound(&work);
}

#[test]
fn a_holder_that_was_killed_leaves_a_disk_that_opens() {
    if !can_mount() {
        return;
    }
    let work = mounted("");
    fs::write(work.path("at/kept"), "kept").unwrap();
    work.vdisk("snapshot create disk.qcow2 one --freeze").succeeds();
    let info = work.vdisk("info --json disk.qcow2").succeeds().out();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let pid = info["held"]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    work.run("umount", ["-l", "at"]).succeeds();
    // Its socket is left, and nobody listens there.
    soon("the disk is free", || work.vdisk("snapshot create disk.qcow2 two").code == Some(0));
    assert_eq!(in_snapshot(&work, "one", "kept").unwrap(), b"kept");
}
