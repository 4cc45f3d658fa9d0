//! Who may use a disk's files: what a change of its snapshots makes is its owner's, and nobody
//! else's, whoever ran the command.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, removexattr, setxattr};

use crate::host::{Done, VDISK, Work};
use crate::mount::{overwrite, soon};
use crate::require::{Need, have};
use crate::twin::noise;

/// Mode, user and group of a private disk.
const OWN: (u32, u32, u32) = (0o600, 1000, 1000);
/// What is noted of a private disk, as far as the host keeps it: by its owner, by root, by a security
/// module.
const NOTES: [(&str, &[u8]); 3] = [
    ("user.note", b"mine"),
    ("trusted.note", b"root's"),
    (LABEL, b"system_u:object_r:svirt_image_t:s0:c1,c2\0"),
];
const LABEL: &str = "security.selinux";
const LIST: &str = "system.posix_acl_access";

fn who(path: &Path) -> (u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.mode() & 0o7777, meta.uid(), meta.gid())
}

fn give(path: &Path, (mode, user, group): (u32, u32, u32)) {
    chown(path, Some(user), Some(group)).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let len = getxattr(path, name, &mut value[..]).ok()?;
    value.truncate(len);
    Some(value)
}

/// An access list: the owner reads and writes, so does user `user`, and nobody else.
fn list(user: u32) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let entries = [(1u16, 6u16, !0u32), (2, 6, user), (4, 0, !0), (0x10, 6, !0), (0x20, 0, !0)];
    for (tag, may, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(may.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Requires that the disk and all its layers are as the disk was.
#[track_caller]
fn all_private(work: &Work, words: &str, notes: &[(&str, &[u8])]) {
    for name in work.files().iter().filter(|name| name.starts_with('d')) {
        assert_eq!(who(&work.path(name)), OWN, "{name} after {words}");
        for (note, value) in notes {
            let found = attribute(&work.path(name), note);
            assert_eq!(found.as_deref(), Some(*value), "{note} of {name} after {words}");
        }
    }
}

/// A private disk in a directory of its own, and the notes that the host keeps of it.
fn private() -> (Work, Vec<(&'static str, &'static [u8])>) {
    let work = Work::new();
    work.vdisk("create d.qcow2 4M").succeeds();
    give(&work.path("d.qcow2"), OWN);
    let disk = work.path("d.qcow2");
    let set =
        |(name, value): &(&str, &[u8])| setxattr(&disk, *name, value, XattrFlags::empty()).is_ok();
    let notes = NOTES.into_iter().filter(set).collect();
    (work, notes)
}

#[test]
fn a_private_disk_stays_its_owners_through_every_change_of_its_snapshots() {
    if !have(Need::Root) {
        return;
    }
    // It was everybody's to read and root's to write after each of them.
    let (work, notes) = private();
    let changes = [
        "snapshot create d.qcow2 a",
        "snapshot create d.qcow2 b --description words",
        "snapshot create d.qcow2 c",
        "snapshot revert d.qcow2 b --yes",
        "snapshot undo d.qcow2 --yes",
        "snapshot revert d.qcow2 a --keep e",
        "snapshot delete d.qcow2 a --tree --yes",
        "snapshot undo d.qcow2 --yes --keep f",
        "snapshot merge d.qcow2 b",
        "snapshot merge d.qcow2 a --in-batches",
        "snapshot rename d.qcow2 e g",
        "snapshot delete d.qcow2 g --forget --yes",
        "resize d.qcow2 5M",
        "compact d.qcow2",
        "snapshot forget d.qcow2",
    ];
    for (number, words) in changes.iter().enumerate() {
        let fed = noise(number as u64, 70_000 + 30_000 * number);
        work.vdisk_fed("write d.qcow2 1000", &fed).succeeds();
        work.vdisk(words).succeeds();
        all_private(&work, words, &notes);
    }
}

#[test]
fn a_private_disk_in_use_stays_its_owners() {
    if !have(Need::Root) || !have(Need::Fuse) {
        return;
    }
    let (work, notes) = private();
    fs::create_dir(work.path("raw")).unwrap();
    work.vdisk("mount --raw d.qcow2 raw").succeeds();
    for (number, words) in [
        "snapshot create d.qcow2 a",
        "snapshot create d.qcow2 b",
        "snapshot create d.qcow2 c",
        "snapshot merge d.qcow2 b",
        "snapshot merge d.qcow2 a --in-batches",
        "snapshot merge d.qcow2 c",
    ]
    .iter()
    .enumerate()
    {
        overwrite(&work.path("raw/disk.raw"), &noise(number as u64, 200_000));
        work.vdisk(words).succeeds();
        all_private(&work, words, &notes);
    }
    work.vdisk("umount raw").succeeds();
    soon("the mount has gone", || !work.path("raw/disk.raw").exists());
}

#[test]
fn a_layer_that_becomes_the_head_is_as_accessible_as_the_head() {
    if !have(Need::Root) {
        return;
    }
    // The layers were made when the disk was everybody's; the head was given away since. A merge
    // down writes the head's few changes into the large layer, which takes the head's place.
    let now = (0o640, 1000, 1001);
    for merge in ["snapshot merge d.qcow2 a", "snapshot merge d.qcow2 a --in-batches"] {
        let work = Work::new();
        work.vdisk("create d.qcow2 4M").succeeds();
        work.vdisk_fed("write d.qcow2 0", &noise(1, 3 << 20)).succeeds();
        work.vdisk("snapshot create d.qcow2 a").succeeds();
        work.vdisk_fed("write d.qcow2 0", b"little").succeeds();
        give(&work.path("d.qcow2"), now);
        work.vdisk(merge).succeeds();
        assert_eq!(who(&work.path("d.qcow2")), now, "{merge}");
    }
    // So is what an undo brings back.
    let work = Work::new();
    work.vdisk("create d.qcow2 4M").succeeds();
    work.vdisk("snapshot create d.qcow2 a").succeeds();
    work.vdisk_fed("write d.qcow2 0", b"little").succeeds();
    work.vdisk("snapshot revert d.qcow2 a --yes").succeeds();
    give(&work.path("d.qcow2"), now);
    work.vdisk("snapshot undo d.qcow2 --yes").succeeds();
    assert_eq!(who(&work.path("d.qcow2")), now);
}

#[test]
fn an_access_list_is_kept_and_that_of_the_directory_lets_nobody_in() {
    if !have(Need::Root) {
        return;
    }
    let (work, _) = private();
    let disk = work.path("d.qcow2");
    if setxattr(&disk, LIST, &list(1001), XattrFlags::empty()).is_err() {
        eprintln!("skipped: no access lists on this file system");
        return;
    }
    let mine = (who(&disk), attribute(&disk, LIST));
    work.vdisk("snapshot create d.qcow2 a").succeeds();
    assert_eq!((who(&disk), attribute(&disk, LIST)), mine);
    // Every new file of the directory is user 1002's, too; this disk is not.
    setxattr(work.dir(), "system.posix_acl_default", &list(1002), XattrFlags::empty()).unwrap();
    work.vdisk("snapshot create d.qcow2 b").succeeds();
    assert_eq!((who(&disk), attribute(&disk, LIST)), mine);
    removexattr(&disk, LIST).unwrap();
    give(&disk, (0o660, 1000, 1000));
    for words in ["snapshot create d.qcow2 c", "snapshot revert d.qcow2 a --yes"] {
        work.vdisk(words).succeeds();
        assert_eq!((who(&disk), attribute(&disk, LIST)), ((0o660, 1000, 1000), None), "{words}");
    }
}

/// Runs `vdisk` as an ordinary user of a group.
fn as_user(work: &Work, user: u32, group: u32, words: &str) -> Done {
    let ids = [format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()];
    let own = work.path(format!("run-{user}"));
    fs::create_dir_all(&own).unwrap();
    give(&own, (0o700, user, group));
    let env = ["env".to_owned(), format!("XDG_RUNTIME_DIR={}", own.display())];
    let program = [work.path("vdisk").display().to_string()];
    let words = words.split_whitespace().map(str::to_owned);
    let all = ids.into_iter().chain(env).chain(program).chain(words);
    work.run("setpriv", all.collect::<Vec<String>>())
}

#[test]
fn who_cannot_keep_a_disk_its_owners_changes_nothing_and_is_told_who_can() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    fs::copy(VDISK, work.path("vdisk")).unwrap();
    fs::set_permissions(work.path("vdisk"), Permissions::from_mode(0o755)).unwrap();
    give(work.dir(), (0o770, 1000, 1000));
    work.vdisk("create d.qcow2 4M").succeeds();
    work.vdisk_fed("write d.qcow2 0", b"one").succeeds();
    let shared = (0o660, 1000, 1000);
    give(&work.path("d.qcow2"), shared);
    // Who may write to it, but would take it away from its owner, is refused.
    let before = work.files();
    let refused = as_user(&work, 1001, 1000, "snapshot create d.qcow2 a");
    refused.fails(&["d.qcow2", "belongs to user 1000 and group 1000", "root"]);
    assert_eq!(who(&work.path("d.qcow2")), shared);
    let left: Vec<String> = work.files().into_iter().filter(|n| !n.starts_with("run-")).collect();
    assert_eq!(left, before);
    as_user(&work, 1001, 1000, "read d.qcow2 0 3").succeeds();
    // A label that nobody goes by, left by another boot, is in nobody's way.
    let _ = setxattr(work.path("d.qcow2"), LABEL, NOTES[2].1, XattrFlags::empty());
    // Its owner is not, and neither is the other for what takes nothing away.
    as_user(&work, 1000, 1000, "snapshot create d.qcow2 a").succeeds();
    assert_eq!(who(&work.path("d.qcow2")), shared);
    as_user(&work, 1001, 1000, "snapshot revert d.qcow2 a --yes").fails(&["belongs to user 1000"]);
    assert_eq!(who(&work.path("d.qcow2")), shared);
    as_user(&work, 1001, 1000, "snapshot merge d.qcow2 a").succeeds();
    assert_eq!(who(&work.path("d.qcow2")), shared);
    assert_eq!(work.vdisk("read d.qcow2 0 3").succeeds().stdout, b"one");
}

#[test]
fn a_new_file_is_everybodys_to_read_less_the_umask() {
    let work = Work::new();
    let makes = [
        "create a.qcow2 1M",
        "create b.raw 1M --format raw",
        "create c.qcow2 1M --data-file c.data",
        "clone a.qcow2 d.qcow2",
        "clone --full a.qcow2 e.qcow2",
        "convert a.qcow2 f.qcow2",
        "qemu-img create -q -f qcow2 g.qcow2 1M",
        "qemu-img create -q -f vmdk -o subformat=monolithicFlat h.vmdk 1M",
        "qemu-img convert -O raw a.qcow2 i.raw",
        "qemu-img convert -O vdi a.qcow2 j.vdi",
        "qemu-img dd -O qcow2 if=a.qcow2 of=k.qcow2",
    ];
    for (umask, mode) in [("0", 0o644), ("022", 0o644), ("027", 0o640), ("077", 0o600)] {
        for words in makes {
            let line = format!("umask {umask}; exec {VDISK} {words}");
            work.run("sh", ["-c", &line]).succeeds();
        }
        for name in work.files() {
            assert_eq!(who(&work.path(&name)).0, mode, "{name} under umask {umask}");
            fs::remove_file(work.path(&name)).unwrap();
        }
    }
}
