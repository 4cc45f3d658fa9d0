//! Overlays of directories: the command, the mount helper, what is left in the upper layer, and
//! layers that somebody else made or that mean ill.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, XattrFlags};
use rustix::io::Errno;

use crate::host::{VDISK, Work, with_own_mounts};
use crate::mount::is_beside;
use crate::require::{Need, have};
use crate::same_calls::{Call, Side};
use crate::same_overlay::{Layers, Mounting, agree, umount};

/// Directories for an overlay, and what is mounted there.
pub struct Laid {
    pub work: Work,
}

impl Laid {
    /// Empty directories `lower`, `upper` and `at`.
    pub fn new() -> Laid {
        let work = Work::new();
        for name in ["lower", "upper", "at"] {
            fs::create_dir(work.path(name)).unwrap();
        }
        Laid { work }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.work.path(name)
    }

    pub fn mount(&self) {
        self.work.vdisk("mount --overlay upper --lower lower at").succeeds();
    }

    pub fn umount(&self) {
        self.work.vdisk("umount at").succeeds();
    }
}

impl Drop for Laid {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path("at")).output();
    }
}

fn mark(path: &Path, key: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, key, value, XattrFlags::empty()).unwrap();
}

/// Mounts as mount(8) does: by the helper's name.
fn by_helper(dir: &Path) -> Arc<Mounting> {
    let helper = dir.join("vdisk-overlay");
    symlink(VDISK, &helper).unwrap();
    Arc::new(move |layers: &Layers, at: &Path| {
        let done = Command::new(&helper)
            .arg("overlay")
            .arg(at)
            .args(["-o", &format!("rw,{}", layers.options())])
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    })
}

#[test]
fn random_calls_are_answered_as_by_the_kernels_overlayfs_and_leave_the_same() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let number = |name: &str, otherwise| {
        std::env::var(name).ok().map_or(otherwise, |word| word.parse::<u64>().unwrap())
    };
    let (runs, first) = (number("VDISK_OVERLAY_RUNS", 8), number("VDISK_OVERLAY_SEED", 1));
    // These have found faults: what a rename that cannot be is refused for.
    let known = [22754, 51043];
    with_own_mounts(|| {
        for seed in known.into_iter().chain(first..first + runs) {
            // Whether allocated space is a hole depends on who has read it, but in memory.
            let work = Work::below(Path::new("/dev/shm"));
            agree(seed, 300, work.dir(), &by_helper(work.dir()));
        }
    });
}

#[test]
fn what_is_changed_goes_into_the_upper_layer_in_the_form_of_overlayfs() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    fs::write(laid.path("lower/kept"), "below").unwrap();
    fs::write(laid.path("lower/gone"), "below").unwrap();
    fs::create_dir_all(laid.path("lower/old/deep")).unwrap();
    laid.mount();
    fs::write(laid.path("at/kept"), "above").unwrap();
    fs::remove_file(laid.path("at/gone")).unwrap();
    fs::rename(laid.path("at/old"), laid.path("at/new")).unwrap();
    assert!(laid.path("at/new/deep").is_dir());
    laid.umount();
    assert_eq!(fs::read(laid.path("lower/kept")).unwrap(), b"below");
    assert_eq!(fs::read(laid.path("upper/kept")).unwrap(), b"above");
    let whiteout = fs::symlink_metadata(laid.path("upper/gone")).unwrap();
    assert!(whiteout.file_type().is_char_device());
    assert_eq!(whiteout.rdev(), 0);
    let mut value = [0; 16];
    let key = "trusted.overlay.redirect";
    let len = rustix::fs::lgetxattr(laid.path("upper/new"), key, &mut value[..]).unwrap();
    assert_eq!(&value[..len], b"old");
    laid.mount();
    assert_eq!(fs::read(laid.path("at/kept")).unwrap(), b"above");
    assert!(laid.path("at/new/deep").is_dir());
    assert!(!laid.path("at/old").exists());
    laid.umount();
}

#[test]
fn a_directory_that_lost_its_set_group_id_mark_gives_its_group_to_nothing_new() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    let (somebody, others) = (1234, 77777);
    for name in ["acl", "mode"] {
        let dir = laid.path("lower").join(name);
        fs::create_dir(&dir).unwrap();
        chown(&dir, Some(somebody), Some(others)).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o2777)).unwrap();
    }
    laid.mount();
    let at = laid.path("at");
    let groups = std::thread::spawn(move || {
        let mut side = Side::new(&at, 0);
        side.make(&Call::As(somebody, somebody));
        let mut groups = Vec::new();
        let takes = [Call::Acl("acl".into(), false, 7), Call::Chmod("mode".into(), 0o777)];
        for (name, take) in ["acl", "mode"].iter().zip(takes) {
            for file in ["before", "after"] {
                let path = Path::new(name).join(file);
                assert_eq!(side.make(&Call::Symlink("to".into(), path.clone())), "()");
                groups.push(fs::symlink_metadata(at.join(path)).unwrap().gid());
                assert_eq!(side.make(&take), "()");
            }
        }
        groups
    });
    assert_eq!(groups.join().unwrap(), [others, somebody, others, somebody]);
    laid.umount();
}

/// What is removed is still read, changed and asked of by who has it open, and gets no name again: also where
/// a lower layer has it yet, by which the kernel takes it for a file with a name.
#[test]
fn a_file_that_lost_its_last_name_gets_no_other() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    for name in ["asked", "changed", "one", "other"] {
        fs::write(laid.path("lower").join(name), name).unwrap();
    }
    fs::hard_link(laid.path("lower/one"), laid.path("lower/two")).unwrap();
    laid.mount();
    let at = laid.path("at");
    fs::write(at.join("new"), "new").unwrap();
    let link = |file: &File, to: &str| {
        let from = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, from, CWD, at.join(to), AtFlags::SYMLINK_FOLLOW)
    };
    for name in ["asked", "changed", "new"] {
        let file = File::open(at.join(name)).unwrap();
        fs::remove_file(at.join(name)).unwrap();
        if name == "changed" {
            file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
        }
        // The kernel believes what it hears of the names now.
        assert_eq!(file.metadata().unwrap().len(), name.len() as u64);
        assert_eq!(link(&file, "again"), Err(Errno::NOENT), "{name}");
        assert!(!at.join("again").exists() && !laid.path("upper/again").exists());
    }
    // A name that others do not know of is a name.
    let file = File::open(at.join("one")).unwrap();
    fs::remove_file(at.join("one")).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 1);
    link(&file, "again").unwrap();
    assert_eq!(fs::read(at.join("again")).unwrap(), b"one");
    fs::rename(at.join("other"), at.join("two")).unwrap();
    assert_eq!(link(&file, "more"), Ok(()));
    fs::remove_file(at.join("more")).unwrap();
    fs::remove_file(at.join("again")).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(link(&file, "more"), Err(Errno::NOENT));
    drop(file);
    laid.umount();
}

#[test]
fn the_superusers_overlay_reads_ahead_further_than_the_kernel_would() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    laid.mount();
    // What was answered came after the greeting, in which the kernel lets itself be bounded.
    let device = fs::metadata(laid.path("at")).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let ahead = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    assert_eq!(fs::read_to_string(ahead).unwrap().trim(), "1024");
    laid.umount();
}

#[test]
fn large_files_of_a_lower_layer_are_read_as_they_are_by_many_at_once() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    let fill = |len: usize| (0..len).map(|n| (n / 7 + n % 251) as u8).collect::<Vec<u8>>();
    // Around the sizes of a page, of what goes by a copy, of a request and of what is read ahead.
    let sizes = [4096, 64 << 10, 128 << 10, 512 << 10, 1 << 20, 3 << 20];
    let sizes = sizes.iter().flat_map(|size| [size - 1, *size, size + 1, size + 4097]);
    let sizes: Vec<usize> = sizes.collect();
    for size in &sizes {
        fs::write(laid.path("lower").join(size.to_string()), fill(*size)).unwrap();
    }
    // Nothing of the first part, and a hole in the middle.
    let sparse = File::create(laid.path("lower/sparse")).unwrap();
    sparse.set_len(2 << 20).unwrap();
    sparse.write_all_at(&fill(300_000), 1 << 20).unwrap();
    laid.mount();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (laid, sizes) = (&laid, &sizes);
            scope.spawn(move || {
                for size in sizes.iter().skip(thread).step_by(2) {
                    let at = laid.path("at").join(size.to_string());
                    assert!(fs::read(at).unwrap() == fill(*size), "{size} bytes");
                }
            });
        }
    });
    assert!(
        fs::read(laid.path("at/sparse")).unwrap() == fs::read(laid.path("lower/sparse")).unwrap()
    );
    // Without what the kernel keeps, from odd places on.
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    let size = 3 << 20;
    let (file, all) = (File::open(laid.path("at").join(size.to_string())).unwrap(), fill(size));
    for (from, len) in [(1, 1 << 20), (700_001, 600_000), (size - 100_001, 200_000)] {
        let mut bytes = vec![0; len];
        let mut read = 0;
        while let n @ 1.. = file.read_at(&mut bytes[read..], (from + read) as u64).unwrap() {
            read += n;
        }
        assert!(bytes[..read] == all[from..(from + len).min(size)], "{len} bytes at {from}");
    }
    drop(file);
    // One that ends before what the kernel knows of it has bytes to its end.
    File::options().write(true).open(laid.path("lower/sparse")).unwrap().set_len(100_000).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    assert!(fs::read(laid.path("at/sparse")).unwrap().iter().all(|byte| *byte == 0));
    laid.umount();
}

/// A file system in memory, until dropped.
struct Memory(PathBuf);

impl Memory {
    fn at(path: PathBuf, options: &str) -> Memory {
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", "tmpfs", "-o", options, "none"]).arg(&path).status().unwrap();
        assert!(done.success());
        Memory(path)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// As under the kernel's overlayfs: who serves may be alive a moment longer than his mount.
#[test]
fn what_a_lower_directory_stands_on_can_be_unmounted_while_the_overlay_stands() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    with_own_mounts(|| {
        let laid = Laid::new();
        let (lower, other) = (laid.path("lower"), laid.path("other"));
        fs::create_dir(&other).unwrap();
        let _memory = (Memory::at(lower.clone(), "rw"), Memory::at(other.clone(), "rw"));
        fs::create_dir_all(lower.join("dir")).unwrap();
        fs::write(lower.join("dir/file"), "below").unwrap();
        symlink("file", lower.join("dir/link")).unwrap();
        // Of this one what is mounted in it is shown, and so it stays in use.
        fs::create_dir(other.join("inner")).unwrap();
        let _inner = Memory::at(other.join("inner"), "rw");
        fs::write(other.join("inner/seen"), "seen").unwrap();
        let command = format!("mount --overlay upper --lower {} --lower other at", lower.display());
        laid.work.vdisk(&command).succeeds();
        laid.work.run("umount", ["lower"]).succeeds();
        assert_eq!(fs::read_dir(&lower).unwrap().count(), 0);
        let at = laid.path("at");
        assert_eq!(fs::read(at.join("dir/link")).unwrap(), b"below");
        assert_eq!(fs::read(at.join("inner/seen")).unwrap(), b"seen");
        fs::rename(at.join("dir"), at.join("renamed")).unwrap();
        fs::write(at.join("renamed/file"), "above").unwrap();
        laid.umount();
        assert_eq!(fs::read(laid.path("upper/renamed/file")).unwrap(), b"above");
    });
}

/// What is in memory only needs nobody to wait until it is durable; a disk does.
#[test]
fn an_upper_layer_in_memory_can_be_unmounted_while_the_overlay_stands() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    with_own_mounts(|| {
        let laid = Laid::new();
        let (memory, at) = (laid.path("memory"), laid.path("at"));
        for name in ["memory", "kept"] {
            fs::create_dir(laid.path(name)).unwrap();
        }
        fs::create_dir(laid.path("lower/dir")).unwrap();
        fs::write(laid.path("lower/dir/file"), "below").unwrap();
        let _memory = (Memory::at(memory.clone(), "rw"), Memory::at(laid.path("kept"), "rw"));
        fs::create_dir_all(memory.join("deep/upper")).unwrap();
        fs::create_dir(memory.join("work")).unwrap();
        laid.work.run("mount", ["--bind", "memory", "kept"]).succeeds();
        let layers = Layers {
            lowers: vec![laid.path("lower")],
            upper: memory.join("deep/upper"),
            work: memory.join("work"),
        };
        by_helper(laid.work.dir())(&layers, &at);
        laid.work.run("umount", ["memory"]).succeeds();
        fs::rename(at.join("dir"), at.join("renamed")).unwrap();
        fs::write(at.join("renamed/file"), "above").unwrap();
        laid.umount();
        let left = laid.path("kept/deep/upper/renamed/file");
        assert_eq!(fs::read(left).unwrap(), b"above");
        assert!(fs::read_dir(laid.path("kept/work/work")).unwrap().next().is_none());
    });
}

/// Where reading a lower file does not change its times, the kernel reads it by itself.
#[test]
fn an_overlay_that_cannot_be_changed_shows_its_layers_and_leaves_their_times() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    for options in ["noatime", "strictatime"] {
        let laid = Laid::new();
        let lower = laid.path("lower");
        let _memory = Memory::at(lower.clone(), options);
        let bytes: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
        fs::write(lower.join("large"), &bytes).unwrap();
        fs::write(lower.join("small"), "few").unwrap();
        let helper = laid.path("vdisk-overlay");
        symlink(VDISK, &helper).unwrap();
        let layer = format!("lowerdir={}", lower.display());
        let (mut mount, at) = (Command::new(&helper), laid.path("at"));
        assert!(mount.arg(&at).args(["-o", &layer]).status().unwrap().success());
        let before = fs::metadata(lower.join("large")).unwrap();
        let held = fs::File::open(at.join("large")).unwrap();
        assert!(fs::read(at.join("large")).unwrap() == bytes, "{options}");
        let mut piece = [0; 5000];
        std::os::unix::fs::FileExt::read_exact_at(&held, &mut piece, 123_456).unwrap();
        assert!(piece[..] == bytes[123_456..][..5000], "{options}");
        assert_eq!(fs::read(at.join("small")).unwrap(), b"few");
        let refused = fs::OpenOptions::new().append(true).open(at.join("large")).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(nix::libc::EROFS));
        drop(held);
        umount(&at);
        let after = fs::metadata(lower.join("large")).unwrap();
        let times = |meta: &fs::Metadata| (meta.atime(), meta.atime_nsec(), meta.ctime_nsec());
        assert_eq!(times(&before), times(&after), "{options}");
    }
}

#[test]
fn whiteouts_that_are_names_hide_what_is_below_them() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    for (path, bytes) in
        [("base/d/a", "1"), ("base/d/b", "1"), ("base/e/a", "1"), ("base/e/b", "1")]
    {
        fs::create_dir_all(laid.path(path).parent().unwrap()).unwrap();
        fs::write(laid.path(path), bytes).unwrap();
    }
    for path in ["lower/d/.wh.a", "lower/e/.wh..wh..opq", "lower/e/c"] {
        fs::create_dir_all(laid.path(path).parent().unwrap()).unwrap();
        fs::write(laid.path(path), "").unwrap();
    }
    laid.work.vdisk("mount --overlay upper --lower lower --lower base at").succeeds();
    let names = |path: &str| {
        let entries = fs::read_dir(laid.path(path)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names("at/d"), ["b"]);
    assert_eq!(names("at/e"), ["c"]);
    assert!(!laid.path("at/d/a").exists() && !laid.path("at/d/.wh.a").exists());
    assert!(!laid.path("at/e/a").exists());
    fs::write(laid.path("at/d/a"), "again").unwrap();
    assert_eq!(names("at/d"), ["a", "b"]);
    laid.umount();
}

#[test]
fn a_redirect_leads_nowhere_but_into_the_lower_layers() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    fs::create_dir(laid.path("outside")).unwrap();
    fs::write(laid.path("outside/secret"), "secret").unwrap();
    symlink("../outside", laid.path("lower/link")).unwrap();
    symlink(laid.path("outside"), laid.path("lower/full")).unwrap();
    let ill: [&[u8]; 8] = [
        b"/../outside",
        b"../outside",
        b"..",
        b"/link",
        b"/full",
        b"/link/../../outside",
        b"/",
        b"",
    ];
    for (number, redirect) in ill.iter().enumerate() {
        let dir = laid.path(&format!("upper/d{number}"));
        fs::create_dir(&dir).unwrap();
        mark(&dir, "trusted.overlay.redirect", redirect);
    }
    laid.mount();
    for (number, redirect) in ill.iter().enumerate() {
        let at = laid.path(&format!("at/d{number}"));
        assert!(!at.join("secret").exists(), "{:?}", String::from_utf8_lossy(redirect));
        if let Ok(entries) = fs::read_dir(&at) {
            assert_eq!(entries.count(), 0);
        }
    }
    laid.umount();
}

#[test]
fn a_server_that_is_killed_while_it_copies_up_leaves_the_old_file_or_the_new() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    let bytes = crate::twin::noise(1, 24 << 20);
    fs::write(laid.path("lower/big"), &bytes).unwrap();
    // Also while somebody reads it: then the kernel makes the copy.
    for (pause, reads) in
        [0, 2, 5, 10, 20, 40].map(|pause| [(pause, false), (pause, true)]).concat()
    {
        laid.mount();
        let reader = reads.then(|| File::open(laid.path("at/big")).unwrap());
        let append = {
            let path = laid.path("at/big");
            std::thread::spawn(move || fs::OpenOptions::new().append(true).open(path).map(drop))
        };
        std::thread::sleep(std::time::Duration::from_millis(pause));
        let server = server_of(&laid.path("upper"));
        nix::sys::signal::kill(server, nix::sys::signal::Signal::SIGKILL).unwrap();
        let _ = append.join().unwrap();
        drop(reader);
        let _ = Command::new("umount").arg("-l").arg(laid.path("at")).output();
        if let Ok(copy) = fs::read(laid.path("upper/big")) {
            assert!(copy == bytes, "half a file after {pause} ms");
        }
        laid.mount();
        assert!(fs::read(laid.path("at/big")).unwrap() == bytes);
        laid.umount();
        let left = fs::read_dir(laid.path("upper.work/work")).unwrap().count();
        assert_eq!(left, 0, "leftovers are cleared with the next mount");
        let names = fs::read_dir(laid.path("upper.work")).unwrap();
        let names: Vec<_> = names.map(|name| name.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| name == "work" || name == "index"), "{names:?}");
    }
}

/// The process that serves the overlay with this upper layer.
fn server_of(upper: &Path) -> nix::unistd::Pid {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = words.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        if words.nth(1).is_some_and(|word| word == "overlay-daemon")
            && words.any(|word| Path::new(&*word) == upper)
        {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            if !is_beside(number) {
                return nix::unistd::Pid::from_raw(number);
            }
        }
    }
    panic!("nobody serves {}", upper.display());
}

#[test]
fn an_upper_directory_serves_one_overlay_and_bad_options_are_refused() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let laid = Laid::new();
    let helper = by_helper(laid.work.dir());
    let layers = Layers {
        lowers: vec![laid.path("lower")],
        upper: laid.path("upper"),
        work: laid.path("elsewhere"),
    };
    fs::create_dir(&layers.work).unwrap();
    helper(&layers, &laid.path("at"));
    let kinds = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(kinds.contains("fuse.vdisk-overlay"));
    umount(&laid.path("at"));
    let refused = laid
        .work
        .run("./vdisk-overlay", ["none", "at", "-o", "lowerdir=lower,upperdir=upper,nonsense"]);
    refused.fails(&["nonsense"]);
    laid.work.vdisk("mount --overlay upper --lower missing at").fails(&["missing"]);
}
