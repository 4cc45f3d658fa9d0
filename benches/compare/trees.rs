//! Clones, snapshots and deep chains against QEMU's tools.
//!
//! Deep chains are read through the same transport on both sides: FUSE, from `vdisk mount --raw`
//! and from `qemu-storage-daemon --export fuse`, past the kernel's page cache.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc::O_DIRECT;

use super::peers::{STEP, Side, place, row, scattered, write_scattered};
use super::{BLOCK, open, seconds, stack};

/// Clones and snapshots that are made in one measurement.
const MADE: usize = 50;
/// Reads in one measurement.
const READS: u64 = 10_000;
const DEPTHS: [usize; 4] = [1, 16, 64, 200];

fn vdisk(dir: &Path, words: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vdisk"));
    let done = command.args(words).current_dir(dir).stdout(Stdio::null()).status().unwrap();
    assert!(done.success(), "vdisk {words:?}");
}

/// Copies a file whose holes stay holes: what it maps may be larger than the host.
fn copy(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    assert!(command.arg("--sparse=always").args([from, to]).status().unwrap().success());
}

fn clones(dir: &Path) {
    Side::Peer.run(dir, &["create", "-f", "qcow2", "-o", "preallocation=metadata", "base", "10G"]);
    let count = MADE.to_string();
    let made = dir.join("clones");
    row(&format!("{MADE} clones of a 10 GiB disk"), "qemu-img create", |side| {
        let _ = fs::remove_dir_all(&made);
        fs::create_dir(&made).unwrap();
        seconds(|| match side {
            Side::Ours => {
                vdisk(dir, &["clone", "base", "--count", &count, "--name", "clones/{:03}"]);
            }
            Side::Peer => (0..MADE).for_each(|n| {
                let name = format!("clones/{n:03}");
                let words = ["create", "-f", "qcow2", "-b", "../base", "-F", "qcow2", &name];
                Side::Peer.run(dir, &words);
            }),
        })
    });
    fs::remove_dir_all(&made).unwrap();
    vdisk(dir, &["unseal", "base"]);
}

/// Takes the snapshots on a disk with mapped metadata, which `clones` made.
fn snapshots(dir: &Path) {
    let what = format!("{MADE} snapshots of a 10 GiB disk, mapped");
    row(&what, "qemu-img snapshot", |side| {
        for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
            if entry.file_name() != "base" {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        copy(&dir.join("base"), &dir.join("disk"));
        seconds(|| {
            for n in 0..MADE {
                let name = format!("s{n}");
                match side {
                    Side::Ours => vdisk(dir, &["snapshot", "create", "disk", &name]),
                    Side::Peer => Side::Peer.run(dir, &["snapshot", "-c", &name, "disk"]),
                }
            }
        })
    });
}

/// The same work on both sides: a scattered delta goes down into a full disk.
fn merge(dir: &Path, size: u64) {
    let text = size.to_string();
    Side::Peer.run(dir, &["create", "-f", "qcow2", "-o", "preallocation=full", "empty", &text]);
    row("merge of a scattered delta, 1/4 of the disk", "qemu-img commit", |side| {
        let work = dir.join("work");
        let _ = fs::remove_dir_all(&work);
        fs::create_dir(&work).unwrap();
        copy(&dir.join("empty"), &work.join("base"));
        match side {
            Side::Ours => {
                vdisk(&work, &["snapshot", "create", "base", "s"]);
                write_scattered(&open(&work.join("base")), size);
                seconds(|| vdisk(&work, &["snapshot", "merge", "base", "s"]))
            }
            Side::Peer => {
                scattered(&work, "delta", "base", size);
                side.timed(&work, &["commit", "-d", "-f", "qcow2", "delta"])
            }
        }
    });
    fs::remove_dir_all(dir.join("work")).unwrap();
    fs::remove_file(dir.join("empty")).unwrap();
}

/// A disk that one side shows as a file, over FUSE.
struct Shown {
    side: Side,
    file: PathBuf,
    point: PathBuf,
    pid: u32,
    /// The peer's process; ours serves in the background.
    child: Option<Child>,
}

impl Shown {
    fn new(side: Side, dir: &Path, disk: &Path) -> Shown {
        let point = dir.join(format!("at-{}", side.name()));
        let shown = match side {
            Side::Ours => {
                fs::create_dir(&point).unwrap();
                let words = ["mount", "--raw", "--read-only"];
                let mut command = Command::new(env!("CARGO_BIN_EXE_vdisk"));
                let done = command.args(words).arg(disk).arg(&point).status().unwrap();
                assert!(done.success());
                let pid = serving(&point);
                Shown { side, file: point.join("disk.raw"), point, pid, child: None }
            }
            Side::Peer => {
                File::create_new(&point).unwrap();
                let node = format!(
                    "driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename={}",
                    disk.display()
                );
                let export =
                    format!("type=fuse,id=e,node-name=disk,mountpoint={}", point.display());
                let mut command = Command::new("qemu-storage-daemon");
                let child =
                    command.args(["--blockdev", &node, "--export", &export]).spawn().unwrap();
                Shown { side, file: point.clone(), point, pid: child.id(), child: Some(child) }
            }
        };
        let until = Instant::now() + Duration::from_secs(20);
        while fs::metadata(&shown.file).map_or(0, |m| m.len()) == 0 {
            assert!(Instant::now() < until, "{} does not show the disk", side.name());
            std::thread::sleep(Duration::from_millis(5));
        }
        shown
    }

    /// The seconds that scattered reads take.
    fn read(&self) -> f64 {
        let file = File::options().read(true).custom_flags(O_DIRECT).open(&self.file).unwrap();
        let size = file.metadata().unwrap().len();
        let mut space = vec![0; 2 * BLOCK as usize];
        let from = space.as_ptr().align_offset(BLOCK as usize);
        let block = &mut space[from..][..BLOCK as usize];
        seconds(|| {
            for n in 0..READS {
                let at = n * STEP % size;
                file.read_exact_at(block, at).unwrap();
            }
        })
    }

    /// The most memory that the serving process had so far, in MiB.
    fn memory(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        match self.side {
            Side::Ours => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_vdisk"));
                let _ = command.arg("umount").arg(&self.point).status();
                let _ = fs::remove_dir(&self.point);
            }
            Side::Peer => {
                let pid = nix::unistd::Pid::from_raw(self.pid as i32);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
                let _ = self.child.as_mut().map(Child::wait);
                let _ = fs::remove_file(&self.point);
            }
        }
    }
}

/// The process that serves what is mounted at `point`.
fn serving(point: &Path) -> u32 {
    let all = fs::read_dir("/proc").unwrap().map(|e| e.unwrap());
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let is_it = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|b| *b == 0).any(|word| Path::new(&*String::from_utf8_lossy(word)) == point)
    };
    pids.into_iter().find(is_it).expect("a process serves the mount")
}

fn depths(dir: &Path) {
    let mut medians = Vec::new();
    for depth in DEPTHS {
        let disk = stack(dir, depth);
        let shown = [Side::Ours, Side::Peer].map(|side| Shown::new(side, dir, &disk));
        let [ours, peer] = &shown;
        let what = format!("4 KiB scattered reads over FUSE, depth {depth}");
        medians.push(row(&what, "qemu, FUSE", |side| match side {
            Side::Ours => ours.read(),
            Side::Peer => peer.read(),
        }));
        println!(
            "{:<44} {:<16} {:>8.1} {:>8.1} {:>7.2}",
            format!("memory of the process, depth {depth}, MiB"),
            "qemu, FUSE",
            peer.memory(),
            ours.memory(),
            peer.memory() / ours.memory()
        );
    }
    let (first, last) = (medians[0], medians[DEPTHS.len() - 1]);
    println!("depth {} / depth 1: {:.2} of its time", DEPTHS[DEPTHS.len() - 1], last / first);
    let disk = stack_path(dir, DEPTHS[DEPTHS.len() - 1]);
    let name = disk.to_str().unwrap();
    row("open and read one block, depth 200", "qemu-io", |side| match side {
        Side::Ours => seconds(|| vdisk(dir, &["read", name, "0", "4096"])),
        Side::Peer => seconds(|| {
            let mut command = Command::new("qemu-io");
            command.args(["-r", "-f", "qcow2", "-c", "read 0 4k", name]).stdout(Stdio::null());
            assert!(command.status().unwrap().success());
        }),
    });
}

fn stack_path(dir: &Path, depth: usize) -> PathBuf {
    dir.join(format!("depth{depth}-{}", depth - 1))
}

/// Prints the table; without QEMU's tools there is none.
pub fn table() {
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        eprintln!("SKIPPED: the table of trees needs QEMU's tools");
        return;
    }
    let (dir, size) = place();
    clones(dir.path());
    snapshots(dir.path());
    drop(dir);
    let (dir, _) = place();
    merge(dir.path(), size);
    depths(dir.path());
}
