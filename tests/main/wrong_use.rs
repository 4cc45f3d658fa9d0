//! Wrong use and bad luck: a clear error, and nothing is lost.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::host::{PATIENCE, Running, Work};
use crate::require::{Need, have};
use crate::twin::{Twin, json, leaks_at_most, noise, same_bytes};

#[test]
fn a_missing_base_is_named() {
    let work = Work::new();
    work.vdisk("create base.qcow2 1M").succeeds();
    work.vdisk("clone base.qcow2 clone.qcow2").succeeds();
    let before = work.bytes("clone.qcow2");
    fs::remove_file(work.path("base.qcow2")).unwrap();
    work.vdisk("read clone.qcow2 0 512").fails(&["base.qcow2"]);
    work.vdisk_fed("write clone.qcow2 0", b"x").fails(&["base.qcow2"]);
    assert!(work.bytes("clone.qcow2") == before);
    assert_eq!(work.files(), ["clone.qcow2"]);
}

#[test]
fn a_base_that_is_the_clone_itself_is_refused() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.qemu_img("create -q -f qcow2 a.qcow2 1M").succeeds();
    work.qemu_img("create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2").succeeds();
    work.qemu_img("create -q -f qcow2 -b b.qcow2 -F qcow2 c.qcow2").succeeds();
    work.qemu_img("rebase -u -b c.qcow2 -F qcow2 a.qcow2").succeeds();
    work.qemu_img("create -q -f qcow2 self.qcow2 1M").succeeds();
    work.qemu_img("rebase -u -b self.qcow2 -F qcow2 self.qcow2").succeeds();
    fs::create_dir(work.path("sub")).unwrap();
    std::os::unix::fs::symlink("../self.qcow2", work.path("sub/again.qcow2")).unwrap();
    work.qemu_img("create -q -f qcow2 -u -b sub/again.qcow2 -F qcow2 linked.qcow2 1M").succeeds();
    for disk in ["a.qcow2", "b.qcow2", "c.qcow2", "self.qcow2", "linked.qcow2"] {
        work.vdisk(&format!("read {disk} 0 512")).fails(&["qcow2"]);
        work.vdisk_fed(&format!("write {disk} 0"), b"x").fails(&["qcow2"]);
        work.vdisk(&format!("info --chain {disk}")).fails(&[]);
        work.vdisk("tree .").says(&[]);
    }
}

#[test]
fn a_base_over_the_network_or_in_json_is_refused() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("secret", vec![b's'; 1 << 20]);
    let backing = [
        "nbd://127.0.0.1:1/x",
        "http://127.0.0.1:1/x",
        "fat:.",
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"secret\"}}",
    ];
    for name in backing {
        let _ = fs::remove_file(work.path("disk.qcow2"));
        let args = ["create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "disk.qcow2"];
        work.run("qemu-img", args.iter().chain(&["1M"])).succeeds();
        let done = work.vdisk("read disk.qcow2 0 512").fails(&["disk.qcow2"]);
        assert!(done.stdout.is_empty(), "{name}: {}", done.out());
    }
}

/// A guest can write a qcow2 header to its raw disk: whoever probes that disk as a base would
/// then read the file that the guest names.
#[test]
fn a_raw_base_is_never_probed_for_what_its_guest_wrote() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("secret.raw", vec![b's'; 1 << 20]);
    work.qemu_img("create -q -f qcow2 -b secret.raw -F raw base.raw").succeeds();
    let planted = work.bytes("base.raw");
    work.qemu_img("create -q -f qcow2 -u -b base.raw -F raw clone.qcow2 1M").succeeds();
    let read = work.vdisk("read clone.qcow2 0 64K").succeeds().stdout;
    same_bytes("what the guest wrote", &read, &planted[..65_536]);
    // The same with the declaration of the format taken away.
    let mut clone = work.bytes("clone.qcow2");
    let declared = [0xe2, 0x79, 0x2a, 0xca];
    let at = clone.windows(4).position(|window| window == declared).unwrap();
    clone[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    work.put("clone.qcow2", clone);
    let done = work.vdisk("read clone.qcow2 0 64K");
    assert!(!done.stdout.contains(&b's') || done.stdout == planted[..65_536], "the secret");
}

/// Waits until `running` holds a lock on the image, as the host's table of locks shows.
fn until_locked(work: &Work, image: &str, running: &mut Running) {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{} ", fs::metadata(work.path(image)).unwrap().ino());
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string("/proc/locks").unwrap().contains(&inode) {
        assert!(Instant::now() < deadline && !running.has_ended(), "it takes no lock");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_disk_that_qemu_holds_is_left_alone_and_the_holder_is_named() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.qcow2", 1 << 20, "");
    disk.write(0, &noise(1, 100_000));
    let mut holder = work.command("qemu-io", ["disk.qcow2"]);
    holder.type_in(b"aio_flush\n");
    until_locked(&work, "disk.qcow2", &mut holder);
    let before = work.bytes("disk.qcow2");
    let pid = holder.pid().to_string();
    let named = ["disk.qcow2", "qemu-io", pid.as_str()];
    work.vdisk_fed("write disk.qcow2 0", b"x").fails(&named);
    for words in [
        "read disk.qcow2 0 512",
        "snapshot create disk.qcow2 s1",
        "clone disk.qcow2 clone.qcow2",
        "convert disk.qcow2 flat.raw --format raw",
    ] {
        work.vdisk(words).fails(&named);
    }
    assert!(work.bytes("disk.qcow2") == before);
    assert_eq!(work.files(), ["disk.qcow2"]);
    holder.type_in(b"quit\n");
    holder.wait().succeeds();
    disk.write(0, b"free again");
    disk.holds();
}

/// A small file system of its own, so that it can be filled.
fn small_host(megabytes: usize) -> (Work, Work) {
    let outer = Work::new();
    fs::create_dir(outer.path("host")).unwrap();
    let options = format!("size={megabytes}M");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &options, "vdisk-test"])
        .arg(outer.path("host"))
        .status();
    assert!(mounted.unwrap().success());
    let inner = Work::below(&outer.path("host"));
    (inner, outer)
}

#[test]
fn a_full_host_disk_in_the_middle_of_a_write_loses_nothing_written_before() {
    if !have(Need::Qemu) || !have(Need::Root) {
        return;
    }
    let (work, _outer) = small_host(8);
    let mut disk = Twin::create(&work, "disk.qcow2", 32 << 20, "");
    disk.write(0, &noise(1, 3 << 20));
    disk.write(20 << 20, &noise(2, 70_000));
    work.vdisk_fed("write disk.qcow2 8M", &noise(3, 10 << 20)).fails(&["disk.qcow2", "space"]);
    leaks_at_most(&work, "disk.qcow2");
    // Where the failed write went, either its bytes or zeroes stand; elsewhere nothing changed.
    same_bytes("before it", &disk.read(0, 8 << 20), &disk.bytes[..8 << 20]);
    same_bytes("after it", &disk.read(18 << 20, 14 << 20), &disk.bytes[18 << 20..]);
    work.vdisk_fed("write disk.qcow2 100", b"in place needs no room").succeeds();
}

/// Two snapshots whose deltas are half a megabyte each, on a host disk with less room than that.
#[test]
fn a_full_host_disk_in_the_middle_of_a_merge_loses_nothing() {
    if !have(Need::Qemu) || !have(Need::Root) {
        return;
    }
    let (work, _outer) = small_host(16);
    let mut disk = Twin::create(&work, "disk.qcow2", 16 << 20, "");
    disk.write(0, &noise(1, 3 << 20));
    work.vdisk("snapshot create disk.qcow2 one").succeeds();
    disk.write(2 << 20, &noise(2, 3 << 20));
    work.vdisk("snapshot create disk.qcow2 two").succeeds();
    disk.write(4 << 20, &noise(3, 3 << 20));
    // Fill the host to the last block.
    let mut filling = 16 << 20;
    while filling >= 4096 {
        let name = format!("filler-{filling}");
        if fs::write(work.path(&name), vec![1; filling]).is_err() {
            fs::remove_file(work.path(&name)).unwrap();
        }
        filling /= 2;
    }
    for name in ["two", "one"] {
        let done = work.vdisk(&format!("snapshot merge disk.qcow2 {name}"));
        if done.code != Some(0) {
            done.fails(&["disk.qcow2", "space"]);
        }
        disk.reads_right();
        leaks_at_most(&work, "disk.qcow2");
    }
    for name in work.files().iter().filter(|name| name.starts_with("filler")) {
        fs::remove_file(work.path(name)).unwrap();
    }
    for snapshot in snapshot_names(&work) {
        work.vdisk(&format!("snapshot merge disk.qcow2 {snapshot}")).succeeds();
        disk.reads_right();
    }
    assert!(snapshot_names(&work).is_empty());
    assert_eq!(work.files(), ["disk.qcow2"], "what the failed merges left is cleaned up");
}

fn snapshot_names(work: &Work) -> Vec<String> {
    let list = json(work.vdisk("snapshot list --json disk.qcow2"));
    let entries = list.as_array().or_else(|| list["snapshots"].as_array()).unwrap().clone();
    entries.iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
}

/// Makes a snapshot `moment` to merge, and changes enough after it for the merge to take time.
fn moment(disk: &mut Twin, work: &Work, round: usize, way: Way) {
    let changes = noise(round as u64, 20 << 20);
    if way == Way::Up {
        // Less below the snapshot than above it, so that the smaller goes up, and into a frozen
        // layer at that, on which another stands.
        disk.write((round % 20) << 20, &changes[..8 << 20]);
    }
    work.vdisk("snapshot create disk.qcow2 moment").succeeds();
    disk.write((round % 20 + 4) << 20, &changes);
    if way == Way::Up {
        work.vdisk(&format!("snapshot create disk.qcow2 after-{round}")).succeeds();
        disk.write(round << 15, b"the head");
    }
}

/// Where a merge goes: into the layer below, or into those above.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Down,
    Up,
}

/// Stops merges with `signal` after growing delays, until one has run to its end.
fn interrupted_merges(signal: Signal, way: Way) {
    const SIZE: usize = 48 << 20;
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.qcow2", SIZE, "--cluster-size 4K");
    disk.write(0, &noise(99, SIZE));
    if way == Way::Up {
        work.vdisk("snapshot create disk.qcow2 bottom").succeeds();
    }
    let mut delay = Duration::ZERO;
    let mut stopped = 0;
    for round in 1.. {
        if !snapshot_names(&work).iter().any(|name| name == "moment") {
            moment(&mut disk, &work, round, way);
        }
        let merge = work.vdisk_start("snapshot merge disk.qcow2 moment");
        thread::sleep(delay);
        merge.signal(signal);
        let done = merge.wait();
        done.says(&[]);
        // To those who only read it, the disk is right at once, whatever was left.
        disk.reads_right();
        leaks_at_most(&work, "disk.qcow2");
        match (done.code, stopped) {
            // On a busy machine the signal may come after the merge: another one is tried then.
            (Some(0), 0) => {}
            (Some(0), _) => break,
            _ => {
                stopped += 1;
                delay += Duration::from_millis(2) + delay / 4;
            }
        }
        assert!(round < 60, "stopped {stopped} times, and no merge both stopped and ended");
    }
    let left = snapshot_names(&work);
    assert!(!left.iter().any(|name| name == "moment"), "{left:?}");
    disk.write(0, b"the next to write cleans up");
    disk.reads_right();
    let files = work.files();
    assert_eq!(files.len(), left.len() + 1, "snapshots {left:?}, files {files:?}");
    for name in files {
        leaks_at_most(&work, &name);
    }
}

#[test]
fn ctrl_c_in_the_middle_of_a_merge_loses_nothing() {
    if have(Need::Qemu) {
        interrupted_merges(Signal::SIGINT, Way::Down);
        interrupted_merges(Signal::SIGINT, Way::Up);
    }
}

#[test]
fn a_kill_in_the_middle_of_a_merge_loses_nothing() {
    if have(Need::Qemu) {
        interrupted_merges(Signal::SIGKILL, Way::Down);
        interrupted_merges(Signal::SIGKILL, Way::Up);
    }
}
