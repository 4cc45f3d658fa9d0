//! `vdisk apply`: the changes of an overlay over a disk's files, put into the disk: what the overlay
//! showed the disk shows then, all of it or, where the command is killed, nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::fs::XattrFlags;

use crate::dice::Dice;
use crate::host::{VDISK, Work};
use crate::require::{Need, have};
use crate::same_calls::{Call, Side};
use crate::same_tree::tree;

fn can_mount() -> bool {
    have(Need::Fuse) && have(Need::Root)
}

/// `disk.q` with the files in `root`, and directories to mount at.
fn disk(work: &Work) {
    let words = "-q -F -t ext4 -d root plain.raw 48M";
    work.run("mke2fs", words.split_whitespace()).succeeds();
    work.vdisk("convert plain.raw disk.q").succeeds();
    fs::remove_file(work.path("plain.raw")).unwrap();
    for name in ["at", "upper"] {
        fs::create_dir_all(work.path(name)).unwrap();
    }
}

/// What a tree shows but its root, and where holes are: that is each file system's own affair.
fn shown(at: &Path) -> Vec<String> {
    let is_range = |word: &str| {
        let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        word.split_once('-').is_some_and(|(from, to)| number(from) && number(to))
    };
    let line = |line: String| {
        let mut words: Vec<&str> = line.split(' ').collect();
        while words.last().is_some_and(|word| is_range(word)) {
            words.pop();
        }
        words.join(" ")
    };
    tree(at, i64::MAX).into_iter().skip(1).map(line).collect()
}

fn check(work: &Work) {
    work.vdisk("check disk.q").succeeds();
    check_files(work);
}

fn check_files(work: &Work) {
    work.vdisk("convert --format raw disk.q checked.raw").succeeds();
    work.run("e2fsck", ["-fn", "checked.raw"]).succeeds();
    fs::remove_file(work.path("checked.raw")).unwrap();
    work.vdisk("snapshot list disk.q --json").succeeds();
}

#[test]
fn a_disk_shows_what_the_overlay_showed_whatever_was_done_there() {
    if !can_mount() {
        return;
    }
    for seed in 1..=4 {
        let work = Work::new();
        let mut dice = Dice::new(seed);
        fs::create_dir_all(work.path("root/t")).unwrap();
        let mut side = Side::new(&work.path("root/t"), i64::MAX);
        // A device that is a whiteout hides itself under an overlay.
        let kept = |call: &Call| match call {
            Call::As(..) | Call::Umask(_) | Call::Allocate(..) => false,
            Call::Mknod(_, _, device) => *device != 0,
            Call::Rename(_, _, flags) => flags & 4 == 0,
            _ => true,
        };
        (0..300).map(|_| Call::random(&mut dice)).filter(kept).for_each(|call| {
            side.make(&call);
        });
        drop(side);
        disk(&work);
        work.vdisk("mount --overlay upper disk.q at").succeeds();
        let mut side = Side::new(&work.path("at/t"), i64::MAX);
        (0..300).map(|_| Call::random(&mut dice)).filter(kept).for_each(|call| {
            side.make(&call);
        });
        drop(side);
        let before = shown(&work.path("at"));
        work.vdisk("umount at").succeeds();
        work.vdisk("apply upper disk.q").succeeds();
        work.vdisk("mount --read-only disk.q at").succeeds();
        let after = shown(&work.path("at"));
        for (a, b) in before.iter().zip(&after) {
            assert_eq!(a, b, "seed {seed}: first the overlay's, then the disk's");
        }
        assert_eq!(before.len(), after.len(), "seed {seed}");
        work.vdisk("umount at").succeeds();
        check(&work);
    }
}

/// A disk with an old state, and an overlay with a new one that moves, removes, changes and adds.
fn old_and_new(work: &Work) {
    for name in ["root/a/b", "root/gone"] {
        fs::create_dir_all(work.path(name)).unwrap();
    }
    work.put("root/state", "old");
    work.put("root/a/b/kept", "kept");
    work.put("root/gone/x", "x");
    disk(work);
    work.vdisk("mount --overlay upper disk.q at").succeeds();
    work.put("at/state", "new");
    fs::rename(work.path("at/a/b"), work.path("at/b")).unwrap();
    fs::rename(work.path("at/a"), work.path("at/b/a")).unwrap();
    fs::remove_dir_all(work.path("at/gone")).unwrap();
    fs::create_dir(work.path("at/gone")).unwrap();
    for n in 0..60 {
        work.put(format!("at/gone/{n}"), vec![n as u8; 20_000]);
    }
    work.vdisk("umount at").succeeds();
}

/// Which state the disk shows: all of it is checked.
fn state(work: &Work) -> String {
    let list = work.vdisk("ls --recursive disk.q:/").succeeds().out();
    let state = work.vdisk("cat disk.q:/state").succeeds().out();
    let is_old = state == "old";
    let has = |path: &str| work.vdisk(&format!("cat disk.q:{path}")).code == Some(0);
    assert_eq!(has("/a/b/kept"), is_old, "{list}");
    assert_eq!(has("/gone/x"), is_old, "{list}");
    assert_eq!(has("/b/kept"), !is_old, "{list}");
    assert_eq!(has("/gone/59"), !is_old, "{list}");
    assert!(!list.contains("vdisk-apply"), "{list}");
    state
}

#[test]
fn an_apply_that_is_killed_at_any_moment_leaves_the_old_disk_or_the_new() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    old_and_new(&work);
    fs::copy(work.path("disk.q"), work.path("first.q")).unwrap();
    let begin = Instant::now();
    work.vdisk("apply upper disk.q").succeeds();
    let whole = begin.elapsed();
    assert_eq!(state(&work), "new");
    const STEPS: u32 = 16;
    let mut seen = [0, 0];
    for step in 0..=STEPS + 2 {
        for name in work
            .files()
            .iter()
            .filter(|name| name.starts_with("disk.q") || name.starts_with(".disk.q"))
        {
            fs::remove_file(work.path(name)).unwrap();
        }
        fs::copy(work.path("first.q"), work.path("disk.q")).unwrap();
        let mut child = Command::new(VDISK)
            .args(["apply", "upper", "disk.q"])
            .current_dir(work.dir())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole * step / STEPS);
        let _ = child.kill();
        child.wait().unwrap();
        let found = state(&work);
        seen[usize::from(found == "new")] += 1;
        // It can be done; once it is, what was moved is not there to be moved again.
        work.vdisk("apply upper disk.q").ends(i32::from(found == "new"));
        assert_eq!(state(&work), "new", "step {step}");
        // What was killed may leave leaks.
        let checked = work.vdisk("check disk.q");
        assert!(matches!(checked.code, Some(0 | 3)), "{}", checked.text());
        check_files(&work);
    }
    assert!(seen[0] > 0, "never was it killed before its end");
}

#[test]
fn a_disk_or_an_overlay_in_use_is_refused_and_named() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    old_and_new(&work);
    work.vdisk("mount disk.q at").succeeds();
    let said = work.vdisk("apply upper disk.q").ends(1).err();
    assert!(said.contains("disk.q") && said.contains("vdisk"), "{said}");
    work.vdisk("umount at").succeeds();
    work.vdisk("mount --overlay upper disk.q at").succeeds();
    let said = work.vdisk("apply upper disk.q").ends(1).err();
    assert!(said.contains("overlay"), "{said}");
    work.vdisk("umount at").succeeds();
    assert_eq!(state(&work), "old");
    work.vdisk("apply nowhere disk.q").ends(1);
    work.vdisk("apply upper disk.q").succeeds();
    assert_eq!(state(&work), "new");
}

#[test]
fn changes_that_mean_ill_leave_the_disk_as_it_was() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir_all(work.path("root/d")).unwrap();
    work.put("root/secret", "old");
    disk(&work);
    let mark = |path: &str, key: &str, value: &[u8]| {
        rustix::fs::lsetxattr(work.path(path), key, value, XattrFlags::empty()).unwrap();
    };
    work.put("upper/secret", "new");
    fs::create_dir(work.path("upper/z")).unwrap();
    for redirect in ["/../etc", "..", "/", "/d/../d"] {
        mark("upper/z", "trusted.overlay.redirect", redirect.as_bytes());
        work.vdisk("apply upper disk.q").ends(1);
        assert_eq!(work.vdisk("cat disk.q:/secret").succeeds().out(), "old");
    }
    // Two directories that both stand on one.
    mark("upper/z", "trusted.overlay.redirect", b"/d");
    fs::create_dir(work.path("upper/y")).unwrap();
    mark("upper/y", "trusted.overlay.redirect", b"/d");
    work.vdisk("apply upper disk.q").ends(1);
    assert_eq!(work.vdisk("cat disk.q:/secret").succeeds().out(), "old");
    fs::remove_dir(work.path("upper/y")).unwrap();
    // A link is a link, wherever it leads on the host.
    symlink("/etc/passwd", work.path("upper/link")).unwrap();
    work.vdisk("apply upper disk.q").succeeds();
    assert_eq!(work.vdisk("cat disk.q:/secret").succeeds().out(), "new");
    let link = work.vdisk("ls --long disk.q:/").succeeds().out();
    assert!(link.contains("link -> /etc/passwd"), "{link}");
    let names = work.vdisk("ls disk.q:/").succeeds().out();
    let names: Vec<_> = names.split_whitespace().collect();
    assert!(names.contains(&"z") && !names.contains(&"d"), "{names:?}");
    check(&work);
}

#[test]
fn a_file_with_several_names_in_the_disk_stays_one() {
    if !can_mount() {
        return;
    }
    let work = Work::new();
    fs::create_dir_all(work.path("root/d")).unwrap();
    work.put("root/one", "old");
    fs::hard_link(work.path("root/one"), work.path("root/d/two")).unwrap();
    disk(&work);
    work.vdisk("mount --overlay upper disk.q at").succeeds();
    fs::write(work.path("at/one"), "changed").unwrap();
    assert_eq!(fs::read(work.path("at/d/two")).unwrap(), b"changed");
    work.vdisk("umount at").succeeds();
    work.vdisk("apply upper disk.q").succeeds();
    for path in ["/one", "/d/two"] {
        assert_eq!(work.vdisk(&format!("cat disk.q:{path}")).succeeds().out(), "changed");
    }
    check(&work);
}
