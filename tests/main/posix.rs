//! pjdfstest, a suite of others' (crates.io), on mounts in user space and overlays: each of its tests is answered
//! as the kernel's file systems answer it, also where that is not what the suite asks for.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use crate::host::{Work, with_own_mounts};
use crate::require::{Need, have};
use crate::same_overlay::{Layers, kernel, umount};

/// What one run may take.
const LONG: Duration = Duration::from_secs(600);
/// Where the limit on links cannot be asked for (pathconf(3) knows it by the file system's type), it is not tested.
const UNASKED: &str = "link::link_count_max";
const SETTINGS: &str = "
    [features]
    posix_fallocate = {}
    utime_now = {}
    utimensat = {}
    [settings]
    naptime = 0.02
    [dummy_auth]
    entries = [ ['nobody', 'nogroup'], ['daemon', 'daemon'] ]
";

/// How each test ended on what is mounted at `at`.
fn answers(work: &Work, at: &str) -> BTreeMap<String, String> {
    work.put("settings.toml", SETTINGS);
    let done = work.command("pjdfstest", ["-c", "settings.toml", "-p", at]).finish(None, LONG);
    let said = done.out();
    let mut ends = BTreeMap::new();
    for line in said.lines() {
        let plain: String = line.split('\u{1b}').map(uncoloured).collect();
        let words: Vec<&str> = plain.split_whitespace().collect();
        if let [name, end @ ("ok" | "FAILED" | "skipped")] = words[..] {
            ends.insert(name.to_owned(), end.to_owned());
        }
    }
    assert!(ends.len() > 300, "{at}: {}", done.text());
    ends
}

/// What follows an escape character, without the rest of the sequence that sets a colour.
fn uncoloured(text: &str) -> &str {
    match text.strip_prefix('[') {
        Some(rest) => rest.split_once('m').map_or("", |(_, rest)| rest),
        None => text,
    }
}

fn agree(kernels: &BTreeMap<String, String>, ours: &BTreeMap<String, String>, what: &str) {
    let differ: Vec<String> = kernels
        .iter()
        .filter(|(name, end)| ours.get(*name) != Some(end))
        .filter(|(name, _)| *name != UNASKED)
        .map(|(name, end)| format!("{name}: {end}, and {:?} of ours", ours.get(name)))
        .collect();
    assert!(differ.is_empty() && kernels.len() == ours.len(), "{what}:\n{}", differ.join("\n"));
}

fn scene() -> Option<Work> {
    if !have(Need::Fuse) || !have(Need::Root) || !have(Need::Pjdfstest) {
        return None;
    }
    let work = Work::new();
    // Others than root go there, too.
    fs::set_permissions(work.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["kernels.raw", "ours.raw"] {
        work.run("mke2fs", ["-q", "-t", "ext4", name, "128M"]).succeeds();
    }
    for name in ["kernels", "ours"] {
        fs::create_dir(work.path(name)).unwrap();
    }
    Some(work)
}

#[test]
fn a_mount_in_user_space_answers_pjdfstest_as_the_kernel_does() {
    let Some(work) = scene() else { return };
    with_own_mounts(|| {
        work.run("mount", ["-o", "loop", "kernels.raw", "kernels"]).succeeds();
        let theirs = answers(&work, "kernels");
        umount(&work.path("kernels"));
        work.vdisk("mount --user-space ours.raw ours").succeeds();
        agree(&theirs, &answers(&work, "ours"), "in user space");
        work.vdisk("umount ours").succeeds();
        work.run("e2fsck", ["-fn", "ours.raw"]).succeeds();
    });
}

/// A program in the upper layer was not to be run, which nothing but this suite had asked for.
#[test]
fn an_overlay_answers_pjdfstest_as_the_kernels_does() {
    let Some(work) = scene() else { return };
    with_own_mounts(|| {
        work.run("mount", ["-o", "loop", "kernels.raw", "kernels"]).succeeds();
        let lay = |name: &str| {
            let dir = work.path("kernels").join(name);
            let made = |part: &str| {
                fs::create_dir_all(dir.join(part)).unwrap();
                dir.join(part)
            };
            let (lower, upper, work) = (made("lower"), made("upper"), made("work"));
            Layers { lowers: vec![lower], upper, work }
        };
        let at = work.path("ours");
        kernel(&lay("theirs"), &at);
        let theirs = answers(&work, "ours");
        umount(&at);
        let Layers { lowers, upper, work: own } = lay("own");
        let shown = |path: &Path| path.display().to_string();
        let (lower, upper, own) = (shown(&lowers[0]), shown(&upper), shown(&own));
        let words = ["mount", "--overlay", &upper, "--work", &own, "--lower", &lower, "ours"];
        work.vdisk_args(words).succeeds();
        agree(&theirs, &answers(&work, "ours"), "an overlay");
        work.vdisk("umount ours").succeeds();
        umount(&work.path("kernels"));
    });
}
