//! The tree of a disk in use: its snapshots are renamed, deleted, merged and taken back as those of an
//! idle disk, through the process that holds it, as long as its user sees nothing of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, leaks_at_most, noise};

const MIB: usize = 1 << 20;

fn can_mount() -> bool {
    have(Need::Fuse) && have(Need::Root)
}

/// A disk in `host` that is shown as the file `at/disk.raw`.
struct Held<'w> {
    work: &'w Work,
    disk: Twin<'w>,
}

impl<'w> Held<'w> {
    fn new(work: &'w Work, disk: Twin<'w>) -> Held<'w> {
        fs::create_dir(work.path("at")).unwrap();
        let held = Held { work, disk };
        held.mount();
        held
    }

    fn mount(&self) {
        self.work.vdisk(&format!("mount --raw {} at", self.disk.image)).succeeds();
    }

    /// Writes as the disk's user does.
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let file = File::options().write(true).open(self.work.path("at/disk.raw")).unwrap();
        file.write_all_at(bytes, offset as u64).unwrap();
        file.sync_all().unwrap();
        self.disk.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// What the disk's user reads is what was written, now and when it is free.
    #[track_caller]
    fn reads_right(&self) {
        let path = self.work.path("at/disk.raw");
        let file = File::open(&path).unwrap();
        let none = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, none).unwrap();
        let read = fs::read(&path).unwrap();
        let wrong = read.iter().zip(&self.disk.bytes).position(|(a, b)| a != b);
        assert_eq!((read.len(), wrong), (self.disk.bytes.len(), None));
    }

    #[track_caller]
    fn ends_right(&self) {
        self.reads_right();
        self.work.vdisk("umount at").succeeds();
        self.disk.reads_right();
        let dir = self.work.path(&self.disk.image);
        for entry in fs::read_dir(dir.parent().unwrap()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(self.work.dir()).unwrap().to_str().unwrap();
            if have(Need::Qemu) && name.ends_with(".qcow2") {
                clean(self.work, name);
            }
        }
    }

    fn snapshot(&self, words: &str) -> crate::host::Done {
        let (verb, rest) = words.split_once(' ').unwrap_or((words, ""));
        self.work.vdisk(&format!("snapshot {verb} {} {rest}", self.disk.image))
    }

    fn names(&self) -> Vec<String> {
        let list = json(self.snapshot("list --json"));
        let all = list["snapshots"].as_array().unwrap().clone();
        let mut names: Vec<_> =
            all.iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    }

    fn kept(&self) -> Value {
        json(self.snapshot("list --json"))["kept_aside"].clone()
    }
}

/// A disk on the snapshots `one` and `two`, with `side` as a branch on `one`.
fn branched(work: &Work) -> Twin<'_> {
    let mut disk = Twin::create(work, "disk.qcow2", 8 * MIB, "");
    disk.write(0, &noise(0, MIB));
    work.vdisk("snapshot create disk.qcow2 one").succeeds();
    let at_one = disk.bytes.clone();
    disk.write(MIB, &noise(1, MIB));
    work.vdisk("snapshot revert disk.qcow2 one --keep side").succeeds();
    disk.bytes = at_one;
    disk.write(MIB / 2, &noise(2, MIB));
    work.vdisk("snapshot create disk.qcow2 two").succeeds();
    disk.write(2 * MIB, &noise(3, MIB));
    disk
}

#[test]
fn snapshots_of_a_disk_in_use_are_renamed() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    let mut held = Held::new(&work, branched(&work));
    held.snapshot("rename two second").succeeds();
    held.snapshot("rename side besides").succeeds();
    held.snapshot("rename second one").fails(&["'one' already"]);
    held.snapshot("rename three four").fails(&["no snapshot 'three'"]);
    assert_eq!(held.names(), ["besides", "one", "second"]);
    held.write(0, b"goes on");
    held.snapshot("create third").succeeds();
    held.snapshot("rename third three").succeeds();
    held.write(MIB, b"and on");
    held.snapshot("diff second three").succeeds().says(&["changed"]);
    held.ends_right();
    let list = work.vdisk("snapshot list disk.qcow2").succeeds().out();
    assert!(list.contains("* three"), "{list}");
}

#[test]
fn a_branch_of_a_disk_in_use_is_deleted_as_planned_and_comes_back() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    let mut held = Held::new(&work, branched(&work));
    let plan = json(held.snapshot("delete side --dry-run --json"));
    assert!(plan["dropped"].as_u64().unwrap() >= MIB as u64, "{plan}");
    assert_eq!(held.names(), ["one", "side", "two"]);
    held.snapshot("delete side").refuses(&["changes will be dropped", "--yes"]);
    let done = json(held.snapshot("delete side --json --yes"));
    assert_eq!((&done["kept"], &done["dry_run"]), (&plan["kept"], &false.into()));
    assert_eq!(held.names(), ["one", "two"]);
    assert_eq!(held.kept()["what"], "delete of 'side'");
    held.write(3 * MIB, b"meanwhile");
    held.snapshot("undo").succeeds();
    assert_eq!(held.names(), ["one", "side", "two"]);
    held.snapshot("undo").fails(&["nothing is kept aside"]);
    let files = work.files().len();
    held.snapshot("delete side --forget --yes").succeeds();
    assert_eq!(work.files().len(), files - 1);
    assert_eq!(held.kept(), Value::Null);
    held.ends_right();
}

#[test]
fn what_is_kept_aside_of_a_disk_in_use_is_kept_as_long_as_asked_and_forgotten() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    let mut held = Held::new(&work, branched(&work));
    held.snapshot("delete side --yes --keep-for 2h").succeeds();
    let kept = held.kept();
    let hours =
        (kept["until_ms"].as_u64().unwrap() - kept["since_ms"].as_u64().unwrap()) / 3_600_000;
    assert_eq!(hours, 2, "{kept}");
    let plan = json(held.snapshot("forget --json"));
    assert!(plan["freed"].as_u64().unwrap() >= MIB as u64, "{plan}");
    assert_eq!(held.kept(), Value::Null);
    held.write(0, b"still here");
    held.ends_right();
}

/// The disk stands on the layer of a snapshot that was deleted, and loses it as it goes on.
#[test]
fn a_layer_without_a_name_is_folded_under_the_user_of_the_disk() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    let mut disk = branched(&work);
    let at_two = {
        let mut bytes = disk.bytes.clone();
        bytes[2 * MIB..3 * MIB].fill(0);
        bytes
    };
    work.vdisk("snapshot delete disk.qcow2 two --yes").succeeds();
    disk.bytes = at_two;
    let mut held = Held::new(&work, disk);
    held.write(4 * MIB, b"after the delete");
    held.snapshot("undo --yes").fails(&["in use by vdisk (pid", "mounted at", "stop it first"]);
    held.snapshot("undo --keep now").fails(&["in use by vdisk (pid"]);
    let files = work.files().len();
    held.snapshot("forget").succeeds();
    assert!(work.files().len() <= files - 2, "{:?}", work.files());
    held.write(5 * MIB, b"after that");
    held.ends_right();
}

#[test]
fn what_would_change_the_disk_under_its_user_is_refused_before_anything_is_asked() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    let held = Held::new(&work, branched(&work));
    let who = ["in use by vdisk (pid", "mounted at", "stop it first"];
    for words in ["revert one --yes", "revert one", "revert one --dry-run", "delete two"] {
        held.snapshot(words).fails(&who);
    }
    held.snapshot("delete one --tree --dry-run").fails(&who);
    assert_eq!(held.names(), ["one", "side", "two"]);
    held.ends_right();
}

#[test]
fn a_disk_in_use_is_checked_by_who_holds_it() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    let mut held = Held::new(&work, branched(&work));
    let layers = |done| json(done)["layers"].as_array().unwrap().clone();
    for round in 0..4 {
        held.write(round * MIB + 5000, &noise(round as u64, MIB));
        let check = json(work.vdisk("check disk.qcow2 --json"));
        assert_eq!((&check["leaks"], &check["corruptions"]), (&0.into(), &0.into()), "{check}");
        assert_eq!(check["filename"], work.path("disk.qcow2").to_str().unwrap(), "{check}");
        assert!(check["allocated_clusters"].as_u64().unwrap() > 16, "{check}");
    }
    assert_eq!(layers(work.vdisk("check disk.qcow2 --chain --json")).len(), 3);
    let text = work.vdisk("check disk.qcow2").succeeds().out();
    assert!(text.contains("No errors were found"), "{text}");
    work.vdisk("check disk.qcow2 --repair all").fails(&["in use by vdisk (pid"]);
    held.ends_right();
}

/// Leaks that a disk has are found under its user.
#[test]
fn a_disk_in_use_that_leaks_is_told_so() {
    if !can_mount() || !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let disk = branched(&work);
    // The refcount of a cluster past all that is in use.
    let image = File::options().read(true).write(true).open(work.path("disk.qcow2")).unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        image.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = word(word(48));
    let end = image.metadata().unwrap().len().div_ceil(65536);
    image.write_all_at(&[0, 1], block + 2 * end).unwrap();
    image.set_len((end + 1) << 16).unwrap();
    assert_eq!(work.qemu_img("check disk.qcow2").code, Some(3));
    let held = Held::new(&work, disk);
    assert_eq!(work.vdisk("check disk.qcow2").code, Some(3));
    work.vdisk("umount at").succeeds();
    held.disk.reads_right();
}

/// A layer may go between the moment that its name is read and the moment that it is opened.
#[test]
fn a_disk_whose_tree_changes_can_be_looked_at_all_the_time() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    let mut held = Held::new(&work, branched(&work));
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for words in ["info --chain disk.qcow2", "snapshot list disk.qcow2", "tree disk.qcow2"] {
            let (work, over) = (&work, &over);
            scope.spawn(move || {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    work.vdisk(words).succeeds();
                }
            });
        }
        let changes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..12 {
                held.write(round * 100_000, &noise(round as u64, 300_000));
                held.snapshot(&format!("create s{round}")).succeeds();
                held.snapshot(&format!("merge s{round}")).succeeds();
            }
        }));
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        changes.unwrap();
    });
    held.ends_right();
}

/// Mounts a file system of its own at `host`; it goes with the test's directory.
fn tmpfs(work: &Work, size: &str) {
    fs::create_dir(work.path("host")).unwrap();
    let options = format!("size={size}");
    work.run("mount", ["-t", "tmpfs", "-o", &options, "none", "host"]).succeeds();
}

/// Takes the file system's space but for `left` bytes.
fn fill(work: &Work, left: usize) {
    let stat = nix::sys::statvfs::statvfs(&work.path("host")).unwrap();
    let free = stat.blocks_available() as usize * stat.fragment_size() as usize;
    work.put("host/ballast", vec![0x55; free - left]);
}

/// A disk with `lower` MiB below the snapshot `s`, `upper` MiB below `t`, a part of it over what was
/// there, and a little since.
fn stacked(work: &Work, lower: usize, upper: usize) -> Twin<'_> {
    let mut disk = Twin::create(work, "host/disk.qcow2", 64 * MIB, "");
    disk.write(0, &noise(1, lower * MIB));
    work.vdisk("snapshot create host/disk.qcow2 s").succeeds();
    disk.write(lower * MIB - upper * MIB / 4, &noise(2, upper * MIB));
    work.vdisk("snapshot create host/disk.qcow2 t").succeeds();
    disk.write(60 * MIB, &noise(3, MIB));
    disk
}

#[test]
fn a_merge_of_a_disk_in_use_succeeds_with_much_less_room_than_it_moves() {
    if !can_mount() {
        return;
    }
    // Down into the snapshot's layer, up into a frozen one, and up into the head.
    let ways = [(24, 14, "s", "down"), (18, 30, "s", "up"), (20, 16, "t", "up")];
    for (lower, upper, name, direction) in ways {
        let work = Work::new();
        tmpfs(&work, "60M");
        let mut held = Held::new(&work, stacked(&work, lower, upper));
        fill(&work, 4 * MIB + MIB / 2);
        let plan = json(held.snapshot(&format!("merge {name} --dry-run --json")));
        assert_eq!((&plan["method"], &plan["direction"]), (&"batches".into(), &direction.into()));
        assert!(plan["moved"].as_u64().unwrap() > 10 << 20, "{plan}");
        held.snapshot(&format!("merge {name}")).succeeds();
        held.write(0, b"after the merge");
        held.ends_right();
        assert_eq!(fs::read_dir(work.path("host")).unwrap().count(), 3);
    }
}

#[test]
fn a_merge_of_a_disk_in_use_for_which_there_is_no_room_changes_nothing() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    tmpfs(&work, "48M");
    let held = Held::new(&work, stacked(&work, 12, 24));
    fill(&work, 300_000);
    held.snapshot("merge s").fails(&["no space", "nothing was changed"]);
    assert_eq!(held.names(), ["s", "t"]);
    held.ends_right();
}

#[test]
fn a_merge_in_batches_of_a_disk_in_use_goes_on_where_it_was_stopped() {
    if !can_mount() {
        return;
    }
    for (lower, upper, name) in [(24, 14, "s"), (12, 24, "s"), (20, 16, "t")] {
        let work = Work::new();
        fs::create_dir(work.path("host")).unwrap();
        let mut held = Held::new(&work, stacked(&work, lower, upper));
        let words = format!("snapshot merge host/disk.qcow2 {name} --in-batches");
        let running = work.vdisk_start(&format!("{words} --rate 6M"));
        std::thread::sleep(std::time::Duration::from_millis(700));
        running.signal(nix::sys::signal::Signal::SIGINT);
        running.wait().fails(&["interrupted", "running it again"]);
        held.write(MIB, b"between");
        held.reads_right();
        held.snapshot("create later").succeeds();
        held.write(2 * MIB, b"after");
        work.vdisk(&words).succeeds();
        assert_eq!(held.names().len(), 2);
        held.ends_right();
    }
}

/// An idle merge that was killed wrote down, into the layer that the head stands on.
#[test]
fn a_merge_that_was_killed_while_the_disk_was_idle_is_finished_while_it_is_in_use() {
    if !can_mount() {
        return;
    }
    // When a kill comes, only the host knows.
    let delays = [5, 10, 20, 40, 80].map(std::time::Duration::from_millis);
    let unfinished = delays.iter().cycle().take(30).any(|delay| killed_idle_merge(*delay));
    assert!(unfinished, "no merge was killed in its middle");
}

/// Whether a merge that is killed after `delay` is left for the disk's holder to finish.
fn killed_idle_merge(delay: std::time::Duration) -> bool {
    let work = Work::new();
    tmpfs(&work, "60M");
    let mut disk = Twin::create(&work, "host/disk.qcow2", 64 * MIB, "");
    disk.write(0, &noise(1, 24 * MIB));
    work.vdisk("snapshot create host/disk.qcow2 s").succeeds();
    disk.write(20 * MIB, &noise(2, 16 * MIB));
    let words = "snapshot merge host/disk.qcow2 s --in-batches";
    let running = work.vdisk_start(words);
    std::thread::sleep(delay);
    running.signal(nix::sys::signal::Signal::SIGKILL);
    running.wait();
    let role =
        |name: &str| json(work.vdisk(&format!("info --json {name}")))["label"]["role"].clone();
    let names = || fs::read_dir(work.path("host")).unwrap().map(|e| e.unwrap().file_name());
    let merging = names().any(|n| role(&format!("host/{}", n.to_str().unwrap())) == "merging");
    // So full that opening the disk cannot finish it, unless hardly anything was left to do.
    fill(&work, 100_000);
    let mut held = Held::new(&work, disk);
    fs::remove_file(work.path("host/ballast")).unwrap();
    let unfinished = merging && names().count() > 1;
    if unfinished {
        work.vdisk(words).succeeds();
    }
    held.write(0, b"on");
    held.reads_right();
    work.vdisk("umount at").succeeds();
    held.disk.reads_right();
    if have(Need::Qemu) {
        leaks_at_most(&work, "host/disk.qcow2");
    }
    if unfinished {
        assert_eq!(names().count(), 1);
    }
    unfinished
}

#[test]
fn an_external_data_file_below_a_disk_in_use_is_merged() {
    if !can_mount() || !have(Need::Qemu) {
        return;
    }
    for (name, upper) in [("one", 2), ("one", 6), ("two", 2)] {
        let work = Work::new();
        work.qemu_img("create -f qcow2 -o data_file=disk.data disk.qcow2 8M").succeeds();
        let mut held = Held::new(&work, Twin::blank(&work, "disk.qcow2", 8 * MIB));
        held.write(0, &noise(1, 4 * MIB));
        held.snapshot("create one").succeeds();
        held.write(MIB, &noise(2, upper * MIB));
        held.snapshot("create two").succeeds();
        held.write(2 * MIB, &noise(3, MIB));
        // Nobody else writes what the disk stands on.
        work.run("qemu-io", ["-f", "raw", "-c", "write 0 1M", "disk.data"]).fails(&["lock"]);
        held.snapshot(&format!("merge {name}")).succeeds();
        held.write(0, b"after the merge");
        held.ends_right();
    }
}

#[test]
fn a_merge_of_a_disk_in_use_on_a_host_that_shares_space_can_be_undone_there() {
    if !can_mount() || !have(Need::Xfs) {
        return;
    }
    for name in ["s", "t"] {
        let work = Work::new();
        fs::create_dir(work.path("host")).unwrap();
        File::create(work.path("image")).unwrap().set_len(320 << 20).unwrap();
        work.run("mkfs.xfs", ["-q", "-m", "reflink=1", "image"]).succeeds();
        work.run("mount", ["-o", "loop", "image", "host"]).succeeds();
        let mut held = Held::new(&work, stacked(&work, 20, 16));
        let plan = json(held.snapshot(&format!("merge {name} --json")));
        assert_eq!((&plan["method"], &plan["moved"]), (&"share".into(), &0.into()), "{plan}");
        assert_eq!(held.names().len(), 1);
        held.write(5 * MIB, &noise(9, 3 * MIB));
        held.snapshot("undo").succeeds();
        assert_eq!(held.names(), ["s", "t"]);
        held.write(6 * MIB, &noise(10, MIB));
        held.snapshot(&format!("merge {name}")).succeeds();
        held.snapshot("forget").succeeds();
        held.write(7 * MIB, &noise(11, MIB));
        held.ends_right();
        work.vdisk("snapshot list host/disk.qcow2").succeeds();
    }
}
