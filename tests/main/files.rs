//! `vdisk snapshot diff --files`: which files differ between two moments, judged by the kernel's own
//! view of both.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{json, noise};

fn can_mount() -> bool {
    have(Need::Fuse) && have(Need::Root)
}

/// `disk.q` with a file system of the files in `root`, and an empty directory `at`.
fn disk(work: &Work, options: &str) {
    let words = format!("-q -F {options} -d root plain.raw 24M");
    work.run("mke2fs", words.split_whitespace()).succeeds();
    work.vdisk("convert plain.raw disk.q").succeeds();
    fs::remove_file(work.path("plain.raw")).unwrap();
    fs::create_dir(work.path("at")).unwrap();
}

fn files(work: &Work, words: &str) -> Vec<Value> {
    let done = json(work.vdisk(&format!("snapshot diff disk.q --files --json {words}")));
    done["files"].as_array().unwrap().clone()
}

/// Runs `change` on the mounted disk.
fn mounted(work: &Work, change: impl FnOnce(&Path)) {
    work.vdisk("mount disk.q at").succeeds();
    change(&work.path("at"));
    work.vdisk("umount at").succeeds();
}

#[test]
fn files_are_told_apart_by_what_happened_to_them() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir_all(work.path("root/etc/old")).unwrap();
    let names =
        ["motd", "gone", "mode", "owner", "moved", "type", "same", "back", "old/x", "old/y"];
    names.iter().for_each(|name| work.put(format!("root/etc/{name}"), name));
    disk(&work, "-t ext4");
    work.vdisk("snapshot create disk.q one").succeeds();
    mounted(&work, |at| {
        let etc = at.join("etc");
        fs::write(etc.join("motd"), "changed").unwrap();
        fs::remove_file(etc.join("gone")).unwrap();
        fs::set_permissions(etc.join("mode"), fs::Permissions::from_mode(0o4711)).unwrap();
        std::os::unix::fs::chown(etc.join("owner"), Some(7), Some(70_000)).unwrap();
        fs::rename(etc.join("moved"), at.join("here")).unwrap();
        fs::rename(etc.join("old"), etc.join("new")).unwrap();
        fs::write(etc.join("new/x"), "changed and moved").unwrap();
        fs::remove_file(etc.join("type")).unwrap();
        symlink("motd", etc.join("type")).unwrap();
        // Written with what was there, and written with something else behind the old time.
        fs::write(etc.join("same"), "same").unwrap();
        let back = fs::File::options().write(true).open(etc.join("back")).unwrap();
        let time = back.metadata().unwrap().modified().unwrap();
        back.write_all_at(b"BACK", 0).unwrap();
        back.set_modified(time).unwrap();
        fs::write(etc.join("\u{1b}[1mloud"), "").unwrap();
    });
    let text = work.vdisk("snapshot diff disk.q one --files").succeeds();
    let expected = [
        "added      /etc/\\u{1b}[1mloud",
        "modified   /etc/back (contents)",
        "removed    /etc/gone",
        "attributes /etc/mode (mode)",
        "modified   /etc/motd (contents)",
        "renamed    /etc/old/ -> /etc/new/",
        "modified   /etc/new/x (contents)",
        "attributes /etc/owner (owner)",
        "attributes /etc/same (time)",
        "added      /etc/type",
        "removed    /etc/type",
        "renamed    /etc/moved -> /here",
    ];
    assert_eq!(text.out().lines().collect::<Vec<_>>(), expected);
    assert!(text.err().contains("2 added, 2 removed, 2 renamed, 3 modified, 3 attributes"));
    work.vdisk("snapshot create disk.q two").succeeds();
    let rows = files(&work, "one two");
    assert_eq!(rows.len(), expected.len());
    let owner = rows.iter().find(|row| row["path"] == "/etc/owner").unwrap();
    assert_eq!((&owner["after"]["gid"], &owner["type"]), (&70_000.into(), &"file".into()));
    let back = files(&work, "two one");
    assert_eq!(back.len(), rows.len(), "and the way back");
    assert!(files(&work, "two").is_empty());
}

/// What the kernel shows of a file.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    kind: u32,
    mode: u32,
    contents: Vec<u8>,
}

fn look(at: &Path, below: &Path, found: &mut BTreeMap<String, Seen>) {
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        let contents = match meta.file_type() {
            t if t.is_file() => fs::read(&path).unwrap(),
            t if t.is_symlink() => fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let name = format!("/{}", path.strip_prefix(at).unwrap().display());
        let seen = Seen { kind: meta.mode() & 0o170_000, mode: meta.mode() & 0o7777, contents };
        found.insert(name, seen);
        if meta.is_dir() {
            look(at, &path, found);
        }
    }
}

/// The files of a snapshot, once the kernel has replayed its journal into a throw-away delta.
fn truth(work: &Work, snapshot: &str) -> BTreeMap<String, Seen> {
    work.vdisk(&format!("mount --ephemeral --snapshot {snapshot} disk.q at")).succeeds();
    let mut found = BTreeMap::new();
    look(&work.path("at"), &work.path("at"), &mut found);
    work.vdisk("umount at").succeeds();
    found
}

/// Requires that `rows` tell how `before` became `after`.
fn explains(before: &BTreeMap<String, Seen>, after: &BTreeMap<String, Seen>, rows: &[Value]) {
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let renames: Vec<(String, String)> = rows
        .iter()
        .filter(|row| row["change"] == "renamed")
        .map(|row| (text(row, "from"), text(row, "path")))
        .collect();
    let is = |change: &str, path: &str| {
        rows.iter().any(|row| row["change"] == change && row["path"] == path)
    };
    // Where a file stood: the name it was renamed from, or the directory above it was.
    let origin = |path: &str| {
        let above = renames.iter().filter(|(_, to)| {
            path.strip_prefix(to.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        let nearest = above.max_by_key(|(_, to)| to.len());
        nearest.map_or(path.to_owned(), |(from, to)| format!("{from}{}", &path[to.len()..]))
    };
    let mut explained = Vec::new();
    for (path, new) in after {
        let from = origin(path);
        let Some(old) = before.get(&from).filter(|o| o.kind == new.kind && !is("added", path))
        else {
            assert!(is("added", path), "{path} came, and nobody says so");
            continue;
        };
        explained.push(from);
        let row = rows.iter().find(|row| row["path"] == **path && row["change"] != "removed");
        let differs: Vec<&str> = row
            .and_then(|row| row["differs"].as_array())
            .map(|all| all.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        assert_eq!(differs.contains(&"contents"), old.contents != new.contents, "{path}: {row:?}");
        assert_eq!(differs.contains(&"mode"), old.mode != new.mode, "{path}: {row:?}");
    }
    for path in before.keys().filter(|path| !explained.contains(path)) {
        assert!(is("removed", path), "{path} went, and nobody says so");
    }
    let removed = rows.iter().filter(|row| row["change"] == "removed");
    for path in removed.map(|row| text(row, "path")) {
        assert!(before.contains_key(&path) && !explained.contains(&path), "{path} did not go");
    }
}

/// Changes files at random, and has the file system write its journal now and then.
fn disturb(at: &Path, seed: u64) {
    let dice = noise(seed, 600);
    let mut names: Vec<PathBuf> = Vec::new();
    let mut directories = vec![at.join("d")];
    for (number, roll) in dice.chunks_exact(3).enumerate() {
        let pick = |all: &[PathBuf]| all.get(usize::from(roll[1]) % all.len().max(1)).cloned();
        let below = pick(&directories).unwrap();
        let fresh = below.join(format!("n{seed}-{number}"));
        match (roll[0] % 12, pick(&names)) {
            (0..=3, _) | (_, None) => {
                fs::write(&fresh, noise(seed + number as u64, usize::from(roll[2]) * 16)).unwrap();
                names.push(fresh);
            }
            (4, _) => {
                fs::create_dir(&fresh).unwrap();
                directories.push(fresh);
            }
            (5, _) => symlink("t".repeat(usize::from(roll[2]).max(1)), &fresh).unwrap(),
            (6, Some(name)) => {
                fs::rename(&name, &fresh).unwrap();
                names.retain(|n| *n != name);
                names.push(fresh);
            }
            (7, Some(name)) => {
                fs::remove_file(&name).unwrap();
                names.retain(|n| *n != name);
            }
            (8, Some(name)) => {
                let mode = 0o600 | u32::from(roll[2]);
                fs::set_permissions(name, fs::Permissions::from_mode(mode)).unwrap();
            }
            (9, Some(name)) => fs::write(name, noise(seed + 7, usize::from(roll[2]))).unwrap(),
            (10, Some(name)) => _ = fs::hard_link(name, fresh),
            _ => nix::unistd::syncfs(fs::File::open(at).unwrap()).unwrap(),
        }
    }
    // More than a journal of 1 MiB holds: it begins anew.
    for turn in 0..40 {
        for name in &names {
            fs::set_permissions(name, fs::Permissions::from_mode(0o640 + turn % 2)).unwrap();
        }
        nix::unistd::syncfs(fs::File::open(at).unwrap()).unwrap();
    }
}

fn a_running_file_system(options: &str) {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir_all(work.path("root/d")).unwrap();
    work.put("root/d/large", noise(1, 3 << 20));
    disk(&work, options);
    work.vdisk("snapshot create disk.q s0").succeeds();
    mounted(&work, |at| {
        for round in 1..=4 {
            disturb(at, round * 1000);
            nix::unistd::syncfs(fs::File::open(at).unwrap()).unwrap();
            // What follows is in no journal yet, or in one that nobody has committed.
            fs::write(at.join(format!("d/late{round}")), "late").unwrap();
            work.vdisk(&format!("snapshot create disk.q s{round}")).succeeds();
        }
    });
    work.vdisk("snapshot create disk.q s5").succeeds();
    let seen: Vec<_> = (0..=5).map(|n| truth(&work, &format!("s{n}"))).collect();
    for (from, to) in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5), (5, 2)] {
        let rows = files(&work, &format!("s{from} s{to}"));
        assert!(!rows.is_empty());
        explains(&seen[from], &seen[to], &rows);
    }
}

#[test]
fn the_files_of_a_running_file_system_are_those_after_its_journal() {
    a_running_file_system("-t ext4");
}

#[test]
fn a_journal_that_has_wrapped_around_is_read_from_its_begin() {
    a_running_file_system("-t ext4 -b 1024 -J size=1 -O ^metadata_csum,^64bit,inline_data -I 256");
}

#[test]
fn older_file_systems_are_read_too() {
    a_running_file_system("-t ext3 -b 1024 -I 128 -J size=1");
}

#[test]
fn a_partition_is_named_and_another_file_system_is_refused() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir_all(work.path("root")).unwrap();
    disk(&work, "-t ext4 -O meta_bg,^resize_inode");
    // The same file system in the first partition of another disk.
    let mut bytes = vec![0; 1 << 20];
    bytes[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0xc0, 0, 0]);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes.extend(work.vdisk("read disk.q 0 24M").succeeds().stdout);
    work.put("parts.raw", &bytes);
    work.vdisk("convert parts.raw parts.q").succeeds();
    work.vdisk("snapshot create parts.q one").succeeds();
    work.vdisk("mount --partition 1 parts.q at").succeeds();
    work.put("at/file", "new");
    work.vdisk("umount at").succeeds();
    work.vdisk("snapshot diff parts.q one --files").fails(&["--partition", "1: ext4"]);
    let told = work.vdisk("snapshot diff parts.q one --files --partition 1").succeeds();
    assert_eq!(told.out(), "added      /file\n");
    work.vdisk("create empty.q 8M").succeeds();
    work.vdisk("snapshot create empty.q one").succeeds();
    work.vdisk("snapshot diff empty.q one --files").fails(&["empty.q", "no file system"]);
    work.vdisk("snapshot diff empty.q one --partition 1").ends(64);
}

#[test]
fn a_damaged_file_system_is_an_error_and_no_crash() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir_all(work.path("root/d/e")).unwrap();
    (0..200).for_each(|n| work.put(format!("root/d/file-{n}"), noise(n, 3000)));
    disk(&work, "-t ext4 -b 1024 -N 512");
    work.vdisk("snapshot create disk.q one").succeeds();
    let dice = noise(77, 40 * 12);
    for roll in dice.chunks_exact(12) {
        // The metadata stand in the first blocks, most of them.
        let at = u32::from_le_bytes([roll[0], roll[1], roll[2], 0]) % (400 << 10);
        work.vdisk_fed(&format!("write disk.q {at}"), &roll[3..]).succeeds();
        let done = work.vdisk("snapshot diff disk.q one --files");
        assert!(matches!(done.code, Some(0 | 1)), "{}", done.text());
    }
}
