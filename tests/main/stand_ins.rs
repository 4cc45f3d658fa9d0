//! Large files of lower layers, which the kernel reads by itself in an overlay of the host's superuser, and their
//! copies.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Deref;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mount::{noise, server};
use crate::overlay::Laid;
use crate::require::{Need, have, skipped};

/// An overlay, and what is mounted beside it.
struct Overlay {
    laid: Laid,
}

impl Deref for Overlay {
    type Target = Laid;

    fn deref(&self) -> &Laid {
        &self.laid
    }
}

impl Overlay {
    fn new() -> Overlay {
        let laid = Laid::new();
        for name in ["lower/d", "over"] {
            fs::create_dir(laid.path(name)).unwrap();
        }
        Overlay { laid }
    }

    /// How many overlays have copies in a directory, in the one to work in that is in it.
    fn copies(&self, dir: &str) -> usize {
        let dirs = fs::read_dir(self.path(dir)).unwrap().flatten();
        let works = dirs.flat_map(|dir| fs::read_dir(dir.path()).into_iter().flatten().flatten());
        let names = works.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.starts_with("#stand-ins.")).count()
    }

    /// What an open file holds, read while nobody could answer.
    fn read_unserved(&self, file: &File) -> Vec<u8> {
        let server = self.server();
        kill(server, Signal::SIGSTOP).unwrap();
        let (told, waited) = std::sync::mpsc::channel();
        let file = file.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut all = vec![0; SIZE];
            let _ = told.send(file.read_exact_at(&mut all, 0).map(|()| all));
        });
        let seen = waited.recv_timeout(Duration::from_secs(20));
        kill(server, Signal::SIGCONT).unwrap();
        seen.expect("the kernel reads by itself").unwrap()
    }

    /// The process that serves it.
    fn server(&self) -> Pid {
        server(&self.path("at")).expect("a process serves the overlay")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // Innermost first: what they stand on goes with `laid`.
        for name in ["over", "at", "small"] {
            let _ = Command::new("umount").arg("-l").arg(self.path(name)).output();
        }
    }
}

/// Whether the kernel can: from Linux 6.15 on it takes all that it needs.
fn can() -> bool {
    if !have(Need::Fuse) || !have(Need::Root) {
        return false;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|word| word.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let can = version >= (6, 15) && vdisk_fuse::mount::is_host_root();
    if !can {
        skipped("needs Linux 6.15 and the superuser of the host");
    }
    can
}

const SIZE: usize = 600_000;

#[test]
fn a_large_lower_file_is_read_without_its_server_and_whoever_has_it_open_sees_changes() {
    if !can() {
        return;
    }
    let overlay = Overlay::new();
    let (bytes, lower) = (noise(1, SIZE), overlay.path("lower/d/big"));
    for name in ["big", "cut", "gone", "kept"] {
        fs::write(overlay.path("lower/d").join(name), &bytes).unwrap();
    }
    fs::set_permissions(&lower, fs::Permissions::from_mode(0o640)).unwrap();
    chown(&lower, Some(5), Some(7)).unwrap();
    let value: &[u8] = b"value";
    rustix::fs::setxattr(&lower, "user.key", value, rustix::fs::XattrFlags::empty()).unwrap();
    fs::hard_link(&lower, overlay.path("lower/other")).unwrap();
    overlay.mount();
    let open = |name: &str| File::open(overlay.path("at").join(name)).unwrap();
    let [big, cut, gone, kept] = ["d/big", "d/cut", "d/gone", "d/kept"].map(open);
    let before = big.metadata().unwrap();
    let read = |file: &File| {
        let mut all = vec![0; SIZE + 1];
        let len = file.read_at(&mut all, 0).unwrap();
        all.truncate(len);
        all
    };

    assert!(overlay.read_unserved(&kept) == bytes);

    // One opening sees what another writes, also under the file's other name.
    let writer = File::options().write(true).open(overlay.path("at/other")).unwrap();
    writer.write_all_at(b"changed", 100_000).unwrap();
    let mut changed = bytes.clone();
    changed[100_000..100_007].copy_from_slice(b"changed");
    assert!(read(&big) == changed && read(&open("d/big")) == changed);
    let after = big.metadata().unwrap();
    let same =
        |meta: &fs::Metadata| (meta.ino(), meta.mode(), meta.uid(), meta.gid(), meta.nlink());
    assert_eq!(same(&before), same(&after));
    drop(writer);

    // The same where all goes, where only the size is set, and where the file has no name any more.
    drop(File::create(overlay.path("at/d/cut")).unwrap());
    assert_eq!(read(&cut).len(), 0);
    fs::remove_file(overlay.path("at/d/gone")).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&gone));
    let writer = File::options().write(true).open(path).unwrap();
    writer.set_len(300_000).unwrap();
    writer.write_all_at(b"later", 0).unwrap();
    let seen = read(&gone);
    assert!(seen.starts_with(b"later") && seen[5..] == bytes[5..300_000]);
    // One that is not changed stays in its layer.
    assert!(read(&kept) == bytes && !overlay.path("upper/d/kept").exists());
    drop((big, cut, gone, kept, writer));

    let upper = overlay.path("upper/d/big");
    let (meta, below) = (fs::metadata(&upper).unwrap(), fs::metadata(&lower).unwrap());
    assert_eq!((meta.mode(), meta.uid(), meta.gid()), (0o100_640, 5, 7));
    assert!(fs::read(&upper).unwrap() == changed && fs::read(&lower).unwrap() == bytes);
    assert_eq!(below.atime(), before.atime(), "nobody has read the layer's own");
    let mut found = [0; 16];
    let len = rustix::fs::getxattr(&upper, "user.key", &mut found[..]).unwrap();
    assert_eq!(&found[..len], value);
    overlay.umount();
    assert_eq!(overlay.copies(""), 0);
    // As the kernel's overlayfs shows it, and as it is shown again.
    overlay.mount();
    assert!(fs::read(overlay.path("at/other")).unwrap() == changed);
    assert_eq!(fs::metadata(overlay.path("at/d/big")).unwrap().ino(), before.ino());
    overlay.umount();
}

#[test]
fn many_read_and_change_large_lower_files_at_once() {
    if !can() {
        return;
    }
    const FILES: usize = 24;
    let overlay = Overlay::new();
    for number in 0..FILES {
        fs::write(overlay.path(&format!("lower/d/{number}")), noise(number as u64, SIZE)).unwrap();
    }
    overlay.mount();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let overlay = &overlay;
            scope.spawn(move || {
                for number in 0..FILES {
                    let path = overlay.path(&format!("at/d/{number}"));
                    let reader = File::open(&path).unwrap();
                    let mut seen = vec![0; SIZE];
                    reader.read_exact_at(&mut seen, 0).unwrap();
                    let at = 1000 + u64::from(thread);
                    let writer = File::options().write(true).open(&path).unwrap();
                    writer.write_all_at(&[thread], at).unwrap();
                    let mut byte = [0xff];
                    reader.read_exact_at(&mut byte, at).unwrap();
                    assert_eq!(byte, [thread], "file {number}");
                }
            });
        }
    });
    for number in 0..FILES {
        let mut wanted = noise(number as u64, SIZE);
        wanted[1000..1004].copy_from_slice(&[0, 1, 2, 3]);
        assert!(fs::read(overlay.path(&format!("at/d/{number}"))).unwrap() == wanted);
    }
    overlay.umount();
    assert_eq!(overlay.copies(""), 0);
}

#[test]
fn what_a_killed_server_had_copied_is_cleared_away_and_a_copy_without_room_is_an_error() {
    if !can() {
        return;
    }
    let overlay = Overlay::new();
    let small = overlay.path("small");
    fs::create_dir(&small).unwrap();
    let bytes = noise(9, 3 << 20);
    fs::write(overlay.path("lower/big"), &bytes).unwrap();
    let mut memory = Command::new("mount");
    memory.args(["-t", "tmpfs", "-o", "size=2m", "none"]).arg(&small);
    assert!(memory.status().unwrap().success());
    fs::create_dir(small.join("upper")).unwrap();
    let mount = || overlay.work.vdisk("mount --overlay small/upper --lower lower at");
    mount().succeeds();
    let reader = File::open(overlay.path("at/big")).unwrap();
    for _ in 0..2 {
        let refused = File::options().append(true).open(overlay.path("at/big")).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC));
    }
    let more = Command::new("mount").args(["-o", "remount,size=64m"]).arg(&small).status();
    assert!(more.unwrap().success());
    File::options().append(true).open(overlay.path("at/big")).unwrap().write_all(b"x").unwrap();
    let mut last = [0];
    reader.read_exact_at(&mut last, bytes.len() as u64).unwrap();
    assert_eq!(&last, b"x");
    drop(reader);

    assert_eq!(overlay.copies("small"), 1);
    kill(overlay.server(), Signal::SIGKILL).unwrap();
    let _ = Command::new("umount").arg("-l").arg(overlay.path("at")).output();
    mount().succeeds();
    assert_eq!(overlay.copies("small"), 1, "what was killed is cleared away");
    overlay.umount();
    assert_eq!(overlay.copies("small"), 0);
}

/// The kernel's own overlayfs can be laid over it where that was asked for.
#[test]
fn an_overlay_can_be_stacked_further_where_it_is_asked_to() {
    if !can() {
        return;
    }
    let overlay = Overlay::new();
    fs::write(overlay.path("lower/big"), noise(1, SIZE)).unwrap();
    for name in ["upper2", "work2", "work"] {
        fs::create_dir(overlay.path(name)).unwrap();
    }
    let helper = overlay.path("vdisk-overlay");
    std::os::unix::fs::symlink(crate::host::VDISK, &helper).unwrap();
    let path = |name: &str| overlay.path(name).display().to_string();
    let laid = format!("lowerdir={},upperdir={}", path("at"), path("upper2"));
    for (option, can) in [("stackable,", true), ("", false)] {
        let words = format!("{option}lowerdir={},upperdir={}", path("lower"), path("upper"));
        let mut ours = Command::new(&helper);
        ours.args(["-o", &format!("{words},workdir={}", path("work"))]).arg(path("at"));
        assert!(ours.status().unwrap().success());
        let mut theirs = Command::new("mount");
        theirs.args(["-t", "overlay", "overlay", "-o"]);
        theirs.arg(format!("{laid},workdir={}", path("work2"))).arg(path("over"));
        assert_eq!(theirs.output().unwrap().status.success(), can, "{option}");
        if can {
            assert!(fs::read(overlay.path("over/big")).unwrap() == noise(1, SIZE));
            assert!(Command::new("umount").arg(path("over")).status().unwrap().success());
        }
        overlay.umount();
    }
}

#[test]
fn what_cannot_be_changed_is_read_without_its_server_and_keeps_its_times() {
    if !can() {
        return;
    }
    let overlay = Overlay::new();
    let (bytes, lower) = (noise(1, SIZE), overlay.path("lower/big"));
    fs::write(&lower, &bytes).unwrap();
    File::open(&lower)
        .unwrap()
        .set_times(fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH))
        .unwrap();
    let helper = overlay.path("vdisk-overlay");
    std::os::unix::fs::symlink(crate::host::VDISK, &helper).unwrap();
    let layer = format!("lowerdir={}", overlay.path("lower").display());
    let mut mount = Command::new(&helper);
    assert!(mount.args(["-o", &layer]).arg(overlay.path("at")).status().unwrap().success());
    let file = File::open(overlay.path("at/big")).unwrap();
    assert!(overlay.read_unserved(&file) == bytes);
    drop(file);
    overlay.umount();
    assert_eq!(fs::metadata(&lower).unwrap().atime(), 0);
}
