//! A base under its clones: who changed it is noticed, whoever it was and whatever its format, and
//! it is found again where it was moved to.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{clean, json, noise, same_bytes};

const SIZE: usize = 4 << 20;

/// A base of one format, made by QEMU, and two clones of it.
struct Family<'w> {
    work: &'w Work,
    base: &'static str,
    /// The file that holds the base's data.
    data: &'static str,
    bytes: Vec<u8>,
}

/// Name, format, options and data file of each kind of base.
const KINDS: [(&str, &str, &str, &str); 9] = [
    ("base.raw", "raw", "", "base.raw"),
    ("base.qcow2", "qcow2", "", "base.qcow2"),
    ("old.qcow2", "qcow2", "-o compat=0.10", "old.qcow2"),
    ("split.qcow2", "qcow2", "-o data_file=split.data,data_file_raw=on", "split.data"),
    ("base.vmdk", "vmdk", "", "base.vmdk"),
    ("flat.vmdk", "vmdk", "-o subformat=monolithicFlat", "flat-flat.vmdk"),
    ("base.vhd", "vpc", "-o force_size=on", "base.vhd"),
    ("base.vhdx", "vhdx", "", "base.vhdx"),
    ("base.vdi", "vdi", "", "base.vdi"),
];

impl<'w> Family<'w> {
    fn new(
        work: &'w Work,
        (base, format, options, data): (&'static str, &str, &str, &'static str),
    ) -> Self {
        let mut bytes = noise(1, SIZE / 2);
        bytes.resize(SIZE, 0);
        work.put("contents", &bytes);
        work.qemu_img(&format!("convert -f raw -O {format} {options} contents {base}")).succeeds();
        work.vdisk(&format!("clone {base} one.q two.q")).succeeds();
        Family { work, base, data, bytes }
    }

    #[track_caller]
    fn shows_the_same(&self) {
        for clone in ["one.q", "two.q"] {
            let found = self.work.vdisk(&format!("read {clone} 0 {SIZE}")).succeeds();
            assert!(found.stderr.is_empty(), "{}: {}", self.base, found.err());
            same_bytes(self.base, &found.stdout, &self.bytes);
        }
    }

    /// Every use of the clones is refused with the base's name, what changed and what to do.
    #[track_caller]
    fn is_refused(&self, what: &str) {
        let parts = [self.base, "has changed", what, "vdisk rebase one.q --accept-base"];
        self.work.vdisk("read one.q 0 512").fails(&parts);
        self.work.vdisk("convert one.q new.q").fails(&parts);
        self.work.vdisk("map one.q").fails(&parts);
        self.work.vdisk_fed("write one.q 0", b"x").fails(&parts);
        self.work.vdisk("rebase one.q --flatten").fails(&parts);
        self.work.vdisk("snapshot list one.q").succeeds();
        self.work.vdisk("info --chain one.q").succeeds().says(&["has changed"]);
    }

    /// It can be read as it is, and once that is recorded, used; the other clone stays refused.
    #[track_caller]
    fn can_be_accepted(&self) {
        let warned = self.work.vdisk("read one.q 0 512 --accept-base").succeeds();
        warned.says(&["warning", self.base]);
        self.work.vdisk("rebase one.q --accept-base").succeeds().says(&[self.base]);
        let read = self.work.vdisk("read one.q 0 512").succeeds();
        assert!(read.stderr.is_empty(), "{}", read.err());
        self.work.vdisk("read two.q 0 512").fails(&[self.base, "has changed"]);
        self.work.vdisk("rebase two.q --accept-base").succeeds();
        self.work.vdisk("rebase two.q --accept-base").succeeds().says(&["nothing to record"]);
        self.work.vdisk("read two.q 0 512").succeeds();
        clean(self.work, "one.q");
    }

    fn data(&self) -> File {
        File::options().read(true).write(true).open(self.work.path(self.data)).unwrap()
    }
}

/// Makes times differ from those that a clone recorded, as time alone would in the long run.
fn touch(file: &File) {
    let time = SystemTime::now() + Duration::from_secs(5);
    file.set_times(FileTimes::new().set_modified(time)).unwrap();
}

#[test]
fn a_base_of_any_format_that_qemu_wrote_is_refused_until_it_is_accepted() {
    if !have(Need::Qemu) {
        return;
    }
    for kind in KINDS {
        let work = Work::new();
        let family = Family::new(&work, kind);
        family.shows_the_same();
        if kind.1 == "qcow2" && kind.2.contains("0.10") {
            // A touch on the way does not make it unusable.
            touch(&family.data());
            family.shows_the_same();
        }
        work.run("qemu-io", ["-f", kind.1, "-t", "writeback", "-c", "write -P 7 8k 512", kind.0])
            .succeeds();
        family.is_refused("");
        family.can_be_accepted();
    }
}

#[test]
fn a_base_without_a_label_is_known_by_its_bytes_whoever_changed_them() {
    if !have(Need::Qemu) {
        return;
    }
    for kind in KINDS {
        let work = Work::new();
        let family = Family::new(&work, kind);
        let data = family.data();
        let len = data.metadata().unwrap().len();
        touch(&data);
        family.shows_the_same();

        let mut byte = [0];
        let at = len / 4 + 9;
        data.read_exact_at(&mut byte, at).unwrap();
        data.write_all_at(&[byte[0] ^ 1], at).unwrap();
        family.is_refused("contents are not the same");
        data.write_all_at(&byte, at).unwrap();
        family.shows_the_same();

        data.set_len(len + 512).unwrap();
        if work.vdisk(&format!("info {}", kind.0)).code == Some(0) {
            family.is_refused("bytes long");
        }
        data.set_len(len).unwrap();
        family.shows_the_same();
    }
}

#[test]
fn a_raw_base_may_be_copied_and_moved_but_not_replaced() {
    let work = Work::new();
    let mut bytes = noise(3, SIZE);
    work.put("base.raw", &bytes);
    work.vdisk("clone base.raw disk.q").succeeds();
    work.run("cp", ["base.raw", "copy.raw"]).succeeds();
    fs::rename(work.path("copy.raw"), work.path("base.raw")).unwrap();
    same_bytes("disk.q", &work.vdisk(&format!("read disk.q 0 {SIZE}")).succeeds().stdout, &bytes);
    bytes[SIZE - 1] ^= 1;
    work.put("other.raw", &bytes);
    fs::rename(work.path("other.raw"), work.path("base.raw")).unwrap();
    work.vdisk("read disk.q 0 512").fails(&["base.raw", "contents are not the same"]);
    work.vdisk("rebase disk.q --backing base.raw --unsafe").succeeds();
    same_bytes("disk.q", &work.vdisk(&format!("read disk.q 0 {SIZE}")).succeeds().stdout, &bytes);
    fs::remove_file(work.path("base.raw")).unwrap();
    work.vdisk("read disk.q 0 512").fails(&["base.raw", "missing", "disk.q"]);
}

/// Too large to be read whole: where its time says that it was written, nobody can say that it
/// was not, so the user is told exactly that.
#[test]
fn a_large_raw_base_that_was_written_in_one_sector_is_refused_and_one_that_was_renamed_is_not() {
    let work = Work::new();
    let base = File::create(work.path("base.raw")).unwrap();
    base.set_len(1 << 40).unwrap();
    for at in [0, 1 << 30, (1 << 40) - (32 << 20)] {
        base.write_all_at(&noise(at, 32 << 20), at).unwrap();
    }
    work.vdisk("clone base.raw disk.q").succeeds();
    work.vdisk("read disk.q 1G 512").succeeds();
    fs::rename(work.path("base.raw"), work.path("b")).unwrap();
    fs::rename(work.path("b"), work.path("base.raw")).unwrap();
    work.vdisk("read disk.q 1G 512").succeeds();
    touch(&base);
    let parts = ["base.raw", "time set", "not all were", "--accept-base"];
    work.vdisk("read disk.q 1G 512").fails(&parts);
    work.vdisk("rebase disk.q --accept-base").succeeds();
    // Within a hole of the parts that are compared.
    base.write_all_at(b"changed", (1 << 30) + (100 << 10)).unwrap();
    work.vdisk("read disk.q 1G 512").fails(&["base.raw", "has changed"]);
    work.vdisk("rebase disk.q --accept-base").succeeds();
    base.write_all_at(b"data", 1 << 35).unwrap();
    work.vdisk("read disk.q 1G 512").fails(&["base.raw", "contents are not the same"]);
}

#[test]
fn a_base_is_sealed_for_everything_that_would_change_it_and_the_refusal_names_the_clones() {
    let work = Work::new();
    work.vdisk("create base.qcow2 4M").succeeds();
    work.vdisk_fed("write base.qcow2 0", b"contents").succeeds();
    work.put("base.raw", noise(5, SIZE));
    work.vdisk("clone base.qcow2 one.q two.q").succeeds();
    work.vdisk("clone base.raw three.q").succeeds();
    work.vdisk("create other.qcow2 4M").succeeds();
    let before = (work.bytes("base.qcow2"), work.bytes("base.raw"));
    let all = [
        "resize BASE 8M",
        "mount --raw BASE mnt",
        "boot BASE --kernel base.raw",
        "rebase BASE --backing other.qcow2",
        "rebase BASE --flatten",
        "snapshot create BASE s",
    ];
    fs::create_dir(work.path("mnt")).unwrap();
    for (base, clones) in [("base.qcow2", &["one.q", "two.q"][..]), ("base.raw", &["three.q"])] {
        let mut parts = vec![base];
        parts.extend(clones);
        for words in all.map(|words| words.replace("BASE", base)) {
            work.vdisk(&words).fails(&parts);
        }
        work.vdisk_fed(&format!("write {base} 0"), b"x").fails(&parts);
        work.vdisk(&format!("convert other.qcow2 {base}")).fails(&[base, "exists"]);
        work.vdisk(&format!("create {base} 1M")).fails(&[base, "exists"]);
        work.vdisk(&format!("run {base} true")).fails_to_run(&[base]);
    }
    work.vdisk("unseal base.qcow2").fails(&["base.qcow2", "one.q", "two.q"]);
    for words in [
        "qemu-img create -f qcow2 base.qcow2 1M",
        "qemu-img create -f raw base.qcow2 1M",
        "qemu-img convert -O qcow2 other.qcow2 base.qcow2",
        "qemu-img dd if=other.qcow2 of=base.qcow2 bs=1M",
        "qemu-img commit one.q",
        "qemu-img resize base.qcow2 8M",
        "qemu-img rebase -u -b other.qcow2 -F qcow2 base.qcow2",
        "qemu-img amend -o compat=0.10 base.qcow2",
        "qemu-img snapshot -c s base.qcow2",
        "qemu-img bitmap --add base.qcow2 b",
    ] {
        work.vdisk(words).fails(&["base.qcow2", "one.q", "two.q"]);
    }
    // What is mended is who owns which cluster, never what the guest sees.
    work.vdisk("check --repair all base.qcow2").succeeds();
    assert!(before == (work.bytes("base.qcow2"), work.bytes("base.raw")));
    work.vdisk("read one.q 0 8").succeeds();
    fs::remove_file(work.path("three.q")).unwrap();
    work.vdisk_fed("write base.raw 0", b"its own again").succeeds();
}

#[test]
fn a_base_that_was_unsealed_and_written_is_refused_under_a_clone_in_another_directory() {
    let work = Work::new();
    fs::create_dir(work.path("clones")).unwrap();
    work.vdisk("create base.qcow2 4M").succeeds();
    work.vdisk("clone base.qcow2 clones/disk.q").succeeds();
    work.vdisk("unseal base.qcow2").fails(&["clones/disk.q", "--even-if-cloned"]);
    work.vdisk("read clones/disk.q 0 8").succeeds();
    work.vdisk("unseal base.qcow2 --even-if-cloned").succeeds().says(&["clones/disk.q"]);
    work.vdisk("read clones/disk.q 0 8").fails(&["base.qcow2", "unsealed"]);
    work.vdisk_fed("write base.qcow2 0", b"new").succeeds();
    work.vdisk("read clones/disk.q 0 8").fails(&["base.qcow2", "unsealed"]);
    work.vdisk("clone base.qcow2 second.q").succeeds();
    work.vdisk("read clones/disk.q 0 8").fails(&["base.qcow2", "sealed again"]);
    work.vdisk("rebase clones/disk.q --accept-base").succeeds();
    assert_eq!(work.vdisk("read clones/disk.q 0 3").succeeds().stdout, b"new");
    work.vdisk("read second.q 0 3").succeeds();
}

/// QEMU's commit opens the base for reading and takes the right to write later: it leaves the mark
/// by which the base's header vouches for its contents.
#[test]
fn a_base_that_qemu_committed_into_is_refused_under_its_other_clone() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.vdisk("create base.qcow2 4M").succeeds();
    work.vdisk_fed("write base.qcow2 0", &noise(2, 1 << 20)).succeeds();
    work.vdisk("clone base.qcow2 one.q two.q").succeeds();
    work.vdisk_fed("write one.q 0", b"for the base").succeeds();
    work.qemu_img("commit one.q").succeeds();
    work.vdisk("read two.q 0 8").fails(&["base.qcow2", "contents are not the same"]);
    work.vdisk("rebase two.q --accept-base").succeeds();
    assert_eq!(work.vdisk("read two.q 0 12").succeeds().stdout, b"for the base");
}

#[test]
fn a_base_that_changed_below_snapshots_is_accepted_for_the_whole_disk() {
    let work = Work::new();
    work.put("base.raw", noise(6, SIZE));
    work.vdisk("clone base.raw disk.q").succeeds();
    work.vdisk("snapshot create disk.q one").succeeds();
    work.vdisk("snapshot create disk.q two").succeeds();
    let mut bytes = noise(6, SIZE);
    bytes[..4].copy_from_slice(b"new!");
    work.put("base.raw", &bytes);
    work.vdisk("read disk.q 0 4").fails(&["base.raw", "vdisk rebase disk.q --accept-base"]);
    work.vdisk("rebase disk.q --accept-base").succeeds();
    assert_eq!(work.vdisk("read disk.q 0 4").succeeds().stdout, b"new!");
    assert_eq!(work.vdisk("read disk.q 0 4 --snapshot one").succeeds().stdout, b"new!");
    work.vdisk("snapshot merge disk.q one").succeeds();
    assert_eq!(work.vdisk("read disk.q 0 4").succeeds().stdout, b"new!");
    bytes[..4].copy_from_slice(b"and!");
    work.put("base.raw", &bytes);
    work.vdisk("read disk.q 0 4").fails(&["base.raw", "has changed"]);
}

#[test]
fn a_base_that_was_moved_or_renamed_is_found_by_its_id_and_the_user_is_told() {
    let work = Work::new();
    fs::create_dir(work.path("bases")).unwrap();
    fs::create_dir(work.path("clones")).unwrap();
    work.vdisk("create bases/golden.qcow2 4M").succeeds();
    work.vdisk_fed("write bases/golden.qcow2 0", b"golden").succeeds();
    work.vdisk("clone bases/golden.qcow2 clones/disk.q").succeeds();
    let read = || work.vdisk("read clones/disk.q 0 6");
    let rename = |a: &str, b: &str| fs::rename(work.path(a), work.path(b)).unwrap();

    rename("bases/golden.qcow2", "bases/new-name.qcow2");
    let found = read().succeeds();
    assert_eq!(found.stdout, b"golden");
    found.says(&["warning", "new-name.qcow2", "vdisk rebase clones/disk.q --accept-base"]);
    // Another disk under the old name is not taken for it.
    work.vdisk("create bases/golden.qcow2 4M").succeeds();
    let found = read().succeeds();
    assert_eq!(found.stdout, b"golden");
    found.says(&["new-name.qcow2"]);
    fs::remove_file(work.path("bases/golden.qcow2")).unwrap();

    rename("bases", "elsewhere");
    read().fails(&["golden.qcow2", "missing"]);
    rename("elsewhere", "clones/bases");
    read().succeeds().says(&["clones/bases/new-name.qcow2"]);
    rename("clones/bases/new-name.qcow2", "clones/new-name.qcow2");
    work.vdisk("rebase clones/disk.q --accept-base").succeeds().says(&["new-name.qcow2"]);
    let found = read().succeeds();
    assert_eq!((&found.stdout[..], found.err().as_str()), (&b"golden"[..], ""));
    assert!(!json(work.vdisk("info --json clones/disk.q"))["backing"].is_null());
}

#[test]
fn a_file_is_taken_for_a_base_only_if_it_carries_both_ids_unchanged() {
    let work = Work::new();
    work.vdisk("create base.qcow2 4M").succeeds();
    work.vdisk("clone base.qcow2 disk.q").succeeds();
    fs::copy(work.path("base.qcow2"), work.path("copy.qcow2")).unwrap();
    fs::remove_file(work.path("base.qcow2")).unwrap();
    work.vdisk("read disk.q 0 8").succeeds().says(&["copy.qcow2"]);
    // A copy that was changed is another: its content id does not speak for it any more.
    work.vdisk("unseal copy.qcow2").succeeds();
    work.vdisk_fed("write copy.qcow2 0", b"other").succeeds();
    work.vdisk("read disk.q 0 8").fails(&["base.qcow2", "missing"]);
    // A link leads anywhere, also out of what may be looked at.
    fs::create_dir(work.path("far")).unwrap();
    fs::remove_file(work.path("copy.qcow2")).unwrap();
    work.vdisk("read disk.q 0 8").fails(&["base.qcow2", "missing"]);
}

#[test]
fn a_clone_that_the_drop_in_put_on_another_base_knows_that_one_again() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.vdisk("create old.q 4M").succeeds();
    work.vdisk("clone old.q clone.q").succeeds();
    work.put("new.raw", noise(1, SIZE));
    work.qemu_img("create -q -f qcow2 new.q 4M").succeeds();
    for (base, format) in [("new.raw", "raw"), ("new.q", "qcow2")] {
        work.vdisk(&format!("qemu-img rebase -u -b {base} -F {format} clone.q")).succeeds();
        work.vdisk("read clone.q 0 1").succeeds();
        work.qemu_io(base, &["write -P 9 4096 512"]).succeeds();
        work.vdisk("read clone.q 0 1").fails(&[base, "has changed"]);
    }
}
