//! Merges where the host has little room, or lets files share what they hold.

use std::os::unix::fs::FileExt;

use nix::sys::statvfs::statvfs;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, leaks_at_most, noise};

const MIB: usize = 1 << 20;

/// Mounts a file system of its own at `host`; it goes with the test's directory.
fn tmpfs(work: &Work, size: &str) {
    std::fs::create_dir(work.path("host")).unwrap();
    let options = format!("size={size}");
    work.run("mount", ["-t", "tmpfs", "-o", &options, "none", "host"]).succeeds();
}

/// Mounts a new file system of that kind at `host`, over a loop device.
fn loop_device(work: &Work, size: u64, make: &[&str]) {
    std::fs::create_dir(work.path("host")).unwrap();
    std::fs::File::create(work.path("image")).unwrap().set_len(size).unwrap();
    work.run(make[0], make[1..].iter().copied().chain(["image"])).succeeds();
    work.run("mount", ["-o", "loop", "image", "host"]).succeeds();
}

fn free(work: &Work) -> usize {
    let stat = statvfs(&work.path("host")).unwrap();
    stat.blocks_available() as usize * stat.fragment_size() as usize
}

/// Takes the file system's space but for `left` bytes.
fn fill(work: &Work, left: usize) {
    work.put("host/ballast", vec![0x55; free(work) - left]);
}

/// A disk with `lower` MiB below the snapshot `s`, and `upper` MiB written since, a quarter of it
/// over what was there.
fn disk(work: &Work, lower: usize, upper: usize) -> Twin<'_> {
    let mut disk = Twin::create(work, "host/disk.qcow2", 128 * MIB, "");
    disk.write(0, &noise(1, lower * MIB));
    work.vdisk("snapshot create host/disk.qcow2 s").succeeds();
    disk.write(lower * MIB - upper * MIB / 4, &noise(2, upper * MIB));
    disk
}

/// Merges where nearly nothing is free, and says how little it was at least.
fn merges_in(work: &Work, disk: &Twin<'_>, left: usize, direction: &str) {
    fill(work, left);
    let plan = json(work.vdisk("snapshot merge host/disk.qcow2 s --dry-run --json"));
    assert_eq!(plan["method"], "batches", "{plan}");
    assert_eq!(plan["direction"], direction, "{plan}");
    let moved = plan["moved"].as_u64().unwrap() as usize;
    assert!(moved > 2 * free(work), "{moved} bytes to be moved, {} free: {plan}", free(work));
    work.vdisk("snapshot merge host/disk.qcow2 s").succeeds();
    disk.reads_right();
    if have(Need::Qemu) {
        clean(work, "host/disk.qcow2");
    }
}

#[test]
fn a_merge_up_succeeds_with_much_less_room_than_it_moves() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "110M");
    let disk = disk(&work, 32, 48);
    merges_in(&work, &disk, 7 * MIB, "up");
}

#[test]
fn a_merge_down_succeeds_with_much_less_room_than_it_moves() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "110M");
    let disk = disk(&work, 64, 30);
    merges_in(&work, &disk, 7 * MIB, "down");
}

#[test]
fn a_merge_on_a_nearly_full_ext4_succeeds() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    loop_device(&work, 160 << 20, &["mkfs.ext4", "-q", "-m", "0"]);
    let disk = disk(&work, 64, 40);
    merges_in(&work, &disk, 10 * MIB, "down");
}

#[test]
fn a_merge_for_which_there_is_no_room_at_all_changes_nothing() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "100M");
    let disk = disk(&work, 32, 48);
    fill(&work, 300_000);
    work.vdisk("snapshot merge host/disk.qcow2 s").fails(&["no space", "nothing was changed"]);
    disk.reads_right();
    work.vdisk("snapshot revert host/disk.qcow2 s --dry-run").succeeds();
}

/// What is kept for undo gives way before an operation fails.
#[test]
fn a_merge_lets_go_of_what_is_kept_aside_when_the_space_is_wanted() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "140M");
    let mut disk = disk(&work, 32, 48);
    work.vdisk("snapshot create host/disk.qcow2 later").succeeds();
    let before = disk.bytes.clone();
    disk.write(100 * MIB, &noise(3, 20 * MIB));
    work.vdisk("snapshot revert host/disk.qcow2 later --yes").succeeds();
    disk.bytes = before;
    fill(&work, 300_000);
    let plan = json(work.vdisk("snapshot merge host/disk.qcow2 s --dry-run --json"));
    assert_eq!(plan["forgets"]["what"], "revert", "{plan}");
    work.vdisk("snapshot merge host/disk.qcow2 s").succeeds().says(&["kept aside"]);
    disk.reads_right();
    work.vdisk("snapshot undo host/disk.qcow2").fails(&["nothing is kept aside"]);
}

/// ... and before a write fails.
#[test]
fn a_write_lets_go_of_what_is_kept_aside_when_the_space_is_wanted() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "80M");
    let mut disk = Twin::create(&work, "host/disk.qcow2", 128 * MIB, "");
    disk.write(0, &noise(1, 8 * MIB));
    let before = disk.bytes.clone();
    work.vdisk("snapshot create host/disk.qcow2 s").succeeds();
    disk.write(6 * MIB, &noise(2, 40 * MIB));
    work.vdisk("snapshot revert host/disk.qcow2 s --yes").succeeds();
    disk.bytes = before;
    fill(&work, 10 * MIB);
    assert!(work.vdisk("snapshot list host/disk.qcow2").succeeds().text().contains("kept aside"));
    disk.write(64 * MIB, &noise(3, 24 * MIB));
    disk.reads_right();
    assert!(free(&work) > 16 * MIB, "what was kept is gone");
    work.vdisk("snapshot undo host/disk.qcow2").fails(&["nothing is kept aside"]);
    // What nobody keeps gives no room: the write fails, and the disk is as it was.
    work.vdisk_fed("write host/disk.qcow2 8M", &noise(4, 40 * MIB)).fails(&["No space left"]);
    if have(Need::Qemu) {
        clean(&work, "host/disk.qcow2");
    }
}

/// ... and before a disk cannot be made to stand alone.
#[test]
fn a_disk_that_takes_in_its_base_lets_go_of_what_is_kept_aside_when_the_space_is_wanted() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "110M");
    let mut base = Twin::create(&work, "host/base.qcow2", 128 * MIB, "");
    base.write(0, &noise(1, 24 * MIB));
    work.vdisk("clone host/base.qcow2 host/disk.qcow2").succeeds();
    work.vdisk("snapshot create host/disk.qcow2 s").succeeds();
    work.vdisk_fed("write host/disk.qcow2 6M", &noise(2, 40 * MIB)).succeeds();
    work.vdisk("snapshot revert host/disk.qcow2 s --yes").succeeds();
    fill(&work, 10 * MIB);
    work.vdisk("rebase host/disk.qcow2 --flatten").succeeds();
    let read = work.vdisk("read host/disk.qcow2 0 24M").succeeds();
    assert!(read.stdout == noise(1, 24 * MIB), "it does not hold what its base held");
    work.vdisk("snapshot undo host/disk.qcow2").fails(&["nothing is kept aside"]);
    work.vdisk("check host/disk.qcow2").succeeds();
}

#[test]
fn a_merge_in_batches_that_is_killed_goes_on_where_it_stopped() {
    for (lower, upper) in [(16, 24), (24, 12)] {
        for pause in [5, 20, 40, 80] {
            let work = Work::new();
            std::fs::create_dir(work.path("host")).unwrap();
            let mut disk = disk(&work, lower, upper);
            let merge = "snapshot merge host/disk.qcow2 s --in-batches";
            let running = work.vdisk_start(merge);
            std::thread::sleep(std::time::Duration::from_millis(pause));
            running.signal(nix::sys::signal::Signal::SIGKILL);
            running.wait();
            disk.reads_right();
            if pause == 40 {
                disk.write(0, b"the next writer finishes it");
                let list = json(work.vdisk("snapshot list --json host/disk.qcow2"));
                if list["snapshots"].as_array().unwrap().iter().any(|one| one["name"] == "s") {
                    // On a busy host it was stopped before it began.
                    work.vdisk(merge).succeeds();
                }
            } else {
                let done = work.vdisk(merge);
                assert!(
                    done.code == Some(0) || done.text().contains("no snapshot"),
                    "{}",
                    done.text()
                );
            }
            disk.reads_right();
            assert_eq!(std::fs::read_dir(work.path("host")).unwrap().count(), 1);
            if have(Need::Qemu) {
                leaks_at_most(&work, "host/disk.qcow2");
            }
        }
    }
}

#[test]
fn where_files_share_space_a_merge_copies_nothing_and_can_be_undone() {
    if !have(Need::Xfs) {
        return;
    }
    let work = Work::new();
    loop_device(&work, 320 << 20, &["mkfs.xfs", "-q", "-m", "reflink=1"]);
    let mut disk = disk(&work, 32, 48);
    let at_s = work.vdisk("snapshot revert host/disk.qcow2 s --keep now").succeeds();
    drop(at_s);
    work.vdisk("snapshot revert host/disk.qcow2 now --yes").succeeds();
    disk.write(0, b"on");
    let plan = json(work.vdisk("snapshot merge host/disk.qcow2 s --dry-run --json"));
    assert_eq!((&plan["method"], &plan["moved"]), (&"share".into(), &0.into()), "{plan}");
    assert_eq!(plan["undo"]["possible"], true, "{plan}");
    work.run("sync", ["-f", "host"]).succeeds();
    let before = free(&work);
    work.vdisk("snapshot merge host/disk.qcow2 s").succeeds();
    work.run("sync", ["-f", "host"]).succeeds();
    let taken = before.saturating_sub(free(&work));
    assert!(taken < 2 * MIB, "{taken} bytes were taken for a merge that shares 32 MiB");
    disk.reads_right();
    let kept = json(work.vdisk("snapshot list --json host/disk.qcow2"))["kept_aside"].clone();
    assert_eq!(kept["what"], "merge of 's'", "{kept}");
    disk.write(5 * MIB, &noise(9, 3 * MIB));
    work.vdisk("snapshot undo host/disk.qcow2").succeeds();
    disk.reads_right();
    let after = disk.bytes.clone();
    work.vdisk("snapshot revert host/disk.qcow2 s --keep then").succeeds();
    let mut at_s = noise(1, 32 * MIB);
    at_s.resize(128 * MIB, 0);
    disk.bytes = at_s;
    disk.reads_right();
    work.vdisk("snapshot revert host/disk.qcow2 then --yes").succeeds();
    disk.bytes = after;
    disk.reads_right();
    // The kept one goes for good, and nothing of what it shared with others.
    work.vdisk("snapshot merge host/disk.qcow2 s").succeeds();
    work.vdisk("snapshot forget host/disk.qcow2").succeeds();
    disk.reads_right();
    if have(Need::Qemu) {
        for name in std::fs::read_dir(work.path("host")).unwrap() {
            let name = name.unwrap().file_name().into_string().unwrap();
            clean(&work, &format!("host/{name}"));
        }
    }
}

/// The second `umount` after a write for which there was no room unmounted without a word.
#[test]
fn an_unmount_of_a_raw_mount_on_a_full_host_says_each_time_what_is_lost() {
    if !have(Need::Root) || !have(Need::Fuse) {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "24M");
    work.vdisk("create host/disk.qcow2 64M").succeeds();
    let kept = noise(1, 2 * MIB);
    std::fs::create_dir(work.path("at")).unwrap();
    work.vdisk("mount --raw host/disk.qcow2 at").succeeds();
    let put = |at: usize, bytes: &[u8]| {
        let file = std::fs::File::options().write(true).open(work.path("at/disk.raw")).unwrap();
        let written = file.write_all_at(bytes, at as u64);
        written.and_then(|()| file.sync_all())
    };
    put(0, &kept).unwrap();
    let too_much = put(8 * MIB, &noise(2, 40 * MIB)).unwrap_err();
    assert_eq!(too_much.raw_os_error(), Some(nix::libc::ENOSPC));
    work.vdisk("umount at").fails(&["not everything could be written", "it stays mounted"]);
    assert!(work.path("at/disk.raw").exists());
    let second = work.vdisk("umount at").ends(1);
    second.says(&["unmounted, but not without loss", "host/disk.qcow2", "No space left"]);
    assert!(!work.path("at/disk.raw").exists());
    work.vdisk("umount at").fails(&["nothing is mounted there"]);
    // What was synced before is there.
    let read = work.vdisk("read host/disk.qcow2 0 2M").succeeds();
    assert!(read.stdout == kept, "what was durable is lost");
    work.vdisk("check host/disk.qcow2").succeeds();
}
