//! Disks and overlays mounted by mount(8) and by lines of fstab, as other file systems are.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use nix::mount::MsFlags;

use crate::host::{VDISK, Work, with_own_mounts};
use crate::require::{Need, have};

/// A disk with a file in it, directories for an overlay, and the programs as a package installs them.
fn laid() -> Work {
    let work = Work::new();
    for name in ["root", "at", "lower", "upper", "work", "bin"] {
        fs::create_dir(work.path(name)).unwrap();
    }
    work.put("root/file", "in the disk");
    work.put("root/program", "#!/bin/sh\n");
    work.put("lower/file", "below");
    work.run("mke2fs", ["-q", "-t", "ext4", "-d", "root", "plain.raw", "24M"]).succeeds();
    work.vdisk("convert plain.raw disk.q").succeeds();
    for name in ["vdisk", "vdisk-overlay"] {
        symlink(VDISK, work.path("bin").join(name)).unwrap();
    }
    work
}

/// Runs a test where the programs stand as they do when they are installed: mount(8) looks for them
/// in the system's own directories only.
fn installed(test: impl FnOnce(&Work) + Send) {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = laid();
    with_own_mounts(|| {
        let (from, bind) = (work.path("bin"), MsFlags::MS_BIND);
        nix::mount::mount(Some(&from), "/usr/local/bin", None::<&str>, bind, None::<&str>).unwrap();
        test(&work);
    });
}

fn mount(work: &Work, words: &[&str]) {
    let mut command = Command::new("mount");
    let done = command.args(words).current_dir(work.dir()).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "mount {words:?}: {said}");
}

fn options(at: &Path) -> String {
    let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let line = table.lines().rfind(|line| line.split(' ').nth(1) == at.to_str()).unwrap();
    line.split(' ').nth(3).unwrap().to_owned()
}

#[test]
fn mount_knows_disks_and_overlays_by_their_types() {
    installed(types);
}

fn types(work: &Work) {
    let (disk, at) = (work.path("disk.q"), work.path("at"));
    let (disk, at) = (disk.to_str().unwrap(), at.to_str().unwrap());
    mount(work, &["-t", "fuse.vdisk", disk, at]);
    assert_eq!(fs::read(work.path("at/file")).unwrap(), b"in the disk");
    fs::write(work.path("at/new"), "new").unwrap();
    work.vdisk("umount at").succeeds();
    assert_eq!(work.vdisk("cat disk.q:/new").succeeds().out(), "new");
    work.vdisk("snapshot create disk.q one").succeeds();
    work.vdisk("rm disk.q:/new").succeeds();
    let words = ["-t", "fuse.vdisk", "-o", "ro,snapshot=one,noexec,nofail", disk, at];
    mount(work, &words);
    assert_eq!(fs::read(work.path("at/new")).unwrap(), b"new");
    let shown = options(&work.path("at"));
    for word in ["ro", "noexec", "nosuid", "nodev"] {
        assert!(shown.split(',').any(|option| option == word), "{shown}");
    }
    work.vdisk("umount at").succeeds();
    let layers =
        format!("lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work", work.dir().display());
    mount(work, &["-t", "fuse.vdisk-overlay", "-o", &layers, "none", at]);
    fs::write(work.path("at/file"), "above").unwrap();
    work.run("umount", ["at"]).succeeds();
    assert_eq!(fs::read(work.path("upper/file")).unwrap(), b"above");
    assert_eq!(fs::read(work.path("lower/file")).unwrap(), b"below");
}

#[test]
fn lines_of_fstab_mount_disks_and_overlays() {
    installed(lines);
}

fn lines(work: &Work) {
    fs::create_dir(work.path("other")).unwrap();
    let dir = work.dir().display();
    work.put(
        "fstab",
        format!(
            "{dir}/disk.q {dir}/at fuse.vdisk defaults,nofail,user_space,x-test=1 0 0\n\
             none {dir}/other fuse.vdisk-overlay \
             lowerdir={dir}/lower,upperdir={dir}/upper,workdir={dir}/work,noatime 0 0\n"
        ),
    );
    let (fstab, at, other) = (work.path("fstab"), work.path("at"), work.path("other"));
    let fstab = fstab.to_str().unwrap();
    mount(work, &["--fstab", fstab, at.to_str().unwrap()]);
    mount(work, &["--fstab", fstab, other.to_str().unwrap()]);
    assert_eq!(fs::read(work.path("at/file")).unwrap(), b"in the disk");
    assert_eq!(fs::read(work.path("other/file")).unwrap(), b"below");
    let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let kind = |at: &Path| {
        let line = table.lines().rfind(|line| line.split(' ').nth(1) == at.to_str()).unwrap();
        line.split(' ').nth(2).unwrap().to_owned()
    };
    assert_eq!(kind(&at), "fuse.vdisk");
    assert_eq!(kind(&other), "fuse.vdisk-overlay");
    work.vdisk("umount at").succeeds();
    work.vdisk("umount other").succeeds();
}

#[test]
fn umount_waits_for_who_serves_where_it_finds_the_helper() {
    installed(unmounts);
}

/// Puts links to the program into /sbin, which only this thread sees.
fn install_umount(work: &Work) {
    let (old, new) = (work.path("old-sbin"), fs::canonicalize("/sbin").unwrap());
    fs::create_dir(&old).unwrap();
    let none = None::<&str>;
    nix::mount::mount(Some(&new), &old, none, MsFlags::MS_BIND, none).unwrap();
    nix::mount::mount(none, &new, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    for entry in fs::read_dir(&old).unwrap().flatten() {
        symlink(entry.path(), new.join(entry.file_name())).unwrap();
    }
    // As links to the program, and noting that they are asked.
    let ran = work.path("ran");
    let script =
        format!("#!/bin/bash\necho \"$0\" >>{}\nexec -a \"$0\" {VDISK} \"$@\"\n", ran.display());
    for kind in ["vdisk", "vdisk-overlay"] {
        let helper = new.join(format!("umount.fuse.{kind}"));
        // Where it is installed: not through the link.
        let _ = fs::remove_file(&helper);
        fs::write(&helper, &script).unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn unmounts(work: &Work) {
    install_umount(work);
    let (at, memory) = (work.path("at"), work.path("memory"));
    let at = at.to_str().unwrap();
    fs::create_dir(&memory).unwrap();
    let mount_overlay = || {
        mount(work, &["-t", "tmpfs", "none", memory.to_str().unwrap()]);
        for name in ["upper", "work"] {
            fs::create_dir(memory.join(name)).unwrap();
        }
        let layers = format!(
            "lowerdir={0}/lower,upperdir={0}/memory/upper,workdir={0}/memory/work",
            work.dir().display()
        );
        mount(work, &["-t", "fuse.vdisk-overlay", "-o", &layers, "none", at]);
        fs::write(work.path("at/new"), "new").unwrap();
    };
    for _ in 0..5 {
        mount_overlay();
        work.run("umount", ["at"]).succeeds();
        // Nobody holds the upper layer any more.
        work.run("umount", ["memory"]).succeeds();
    }
    mount_overlay();
    let held = fs::File::open(work.path("at/new")).unwrap();
    assert!(!Command::new("umount").arg(at).status().unwrap().success());
    work.run("umount", ["-l", "at"]).succeeds();
    assert!(work.bytes("ran").ends_with(b"/sbin/umount.fuse.vdisk-overlay\n"));
    assert!(!work.path("at/new").exists());
    drop(held);
    let disk = work.path("disk.q");
    mount(work, &["-t", "fuse.vdisk", "-o", "user_space", disk.to_str().unwrap(), at]);
    fs::write(work.path("at/new"), "new").unwrap();
    work.run("umount", ["at"]).succeeds();
    work.run("qemu-img", ["check", "-q", "disk.q"]).succeeds();
    assert!(work.bytes("ran").ends_with(b"/sbin/umount.fuse.vdisk\n"));
}

#[test]
fn a_mount_option_that_a_disk_does_not_have_is_refused() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = laid();
    let disk = work.path("disk.q");
    let said = work.vdisk_args([disk.to_str().unwrap(), "at", "-o", "rw,nonsense"]).ends(1).err();
    assert!(said.contains("nonsense"), "{said}");
    assert!(fs::read_dir(work.path("at")).unwrap().next().is_none());
}
