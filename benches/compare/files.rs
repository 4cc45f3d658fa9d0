//! Trees of files, the same on every side: overlays of the kernel, of fuse-overlayfs and of vdisk, in
//! turn. Needs the superuser.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::seconds;

/// Directories in the lower tree, and files in each.
const DIRECTORIES: usize = 300;
const FILES: usize = 30;
/// The one large file.
const LARGE: u64 = 256 << 20;
/// How often each side is measured.
const ROUNDS: usize = 3;

/// Who serves an overlay.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Kernel,
    FuseOverlayfs,
    Vdisk,
}

impl Side {
    const ALL: [Side; 3] = [Side::Kernel, Side::FuseOverlayfs, Side::Vdisk];

    fn mount(self, dir: &Path, lower: &Path, at: &Path) {
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        let (lower, upper, work) = (lower.display(), upper.display(), work.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let mut command = match self {
            Side::Kernel => {
                let mut mount = Command::new("mount");
                mount.args(["-t", "overlay", "overlay"]);
                mount
            }
            Side::FuseOverlayfs => Command::new("fuse-overlayfs"),
            Side::Vdisk => {
                let helper = dir.join("vdisk-overlay");
                symlink(env!("CARGO_BIN_EXE_vdisk"), &helper).unwrap();
                Command::new(helper)
            }
        };
        let done = command.args(["-o", &options]).arg(at).stdin(Stdio::null()).status().unwrap();
        assert!(done.success());
    }
}

/// A job on a mounted overlay.
pub struct Job {
    pub what: &'static str,
    pub work: Work,
}

/// What is done.
pub enum Work {
    /// By a shell that stands at the root.
    Shell(&'static str),
    /// Reads of 4 KiB, anywhere in the large file.
    RandomReads,
}

const JOBS: &[Job] = &[
    Job { what: "make 9,000 files", work: Work::Shell("cp -a d* new/") },
    Job { what: "find -ls", work: Work::Shell("find . -path ./new -prune -o -ls >/dev/null") },
    Job {
        what: "find -ls again",
        work: Work::Shell("find . -path ./new -prune -o -ls >/dev/null"),
    },
    Job { what: "read every file", work: Work::Shell("cat d*/* >/dev/null") },
    Job { what: "copy-up of 3,000 files", work: Work::Shell("touch d1*/*") },
    Job {
        what: "append to 3,000 files",
        work: Work::Shell("for f in d2*/*; do echo x >> $f; done"),
    },
    Job { what: "read 256 MiB in order", work: Work::Shell("cat large >/dev/null") },
    // From what the kernel has of it by now, without a word to any server.
    Job { what: "read 256 MiB again", work: Work::Shell("cat large >/dev/null") },
    Job { what: "20,000 random reads of 4 KiB", work: Work::RandomReads },
    Job { what: "du", work: Work::Shell("du -s new >/dev/null") },
    Job { what: "rm -rf", work: Work::Shell("rm -rf d*") },
];

fn shell(words: &str, at: &Path) {
    let mut command = Command::new("sh");
    let done = command.args(["-c", words]).current_dir(at).stderr(Stdio::null()).status().unwrap();
    assert!(done.success(), "{words}");
}

fn random_reads(at: &Path) {
    let file = File::open(at.join("large")).unwrap();
    let mut block = [0; 4096];
    let mut state = 1u64;
    for _ in 0..20_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        file.read_exact_at(&mut block, (state >> 33) % (LARGE / 4096) * 4096).unwrap();
    }
}

pub fn lower(dir: &Path) -> PathBuf {
    let lower = dir.join("lower");
    for d in 0..DIRECTORIES {
        let path = lower.join(format!("d{d}"));
        fs::create_dir_all(&path).unwrap();
        for f in 0..FILES {
            fs::write(path.join(format!("file-{f}")), vec![7; (d * 37 + f * 911) % 30_000])
                .unwrap();
        }
    }
    let large = File::create(lower.join("large")).unwrap();
    let piece = vec![1; 1 << 20];
    for at in (0..LARGE).step_by(piece.len()) {
        large.write_all_at(&piece, at).unwrap();
    }
    lower
}

/// Seconds of each job at a mount; it is unmounted then.
pub fn worked(jobs: &[Job], at: &Path) -> Vec<f64> {
    fs::create_dir(at.join("new")).unwrap();
    let done = |work: &Work| match work {
        Work::Shell(words) => shell(words, at),
        Work::RandomReads => random_reads(at),
    };
    let times = jobs.iter().map(|job| seconds(|| done(&job.work))).collect();
    assert!(Command::new("umount").arg(at).status().unwrap().success());
    times
}

/// One round of every job on one side, in seconds.
fn round(side: Side, dir: &Path, lower: &Path) -> Vec<f64> {
    let here = tempfile::tempdir_in(dir).unwrap();
    let at = here.path().join("at");
    for name in ["upper", "work", "at"] {
        fs::create_dir(here.path().join(name)).unwrap();
    }
    side.mount(here.path(), lower, &at);
    let times = worked(JOBS, &at);
    // A server that is still busy would be in the next one's way.
    std::thread::sleep(std::time::Duration::from_millis(300));
    times
}

/// Prints how the sides compare: seconds of the kernel, and what the others need in its place.
pub fn table() {
    if Command::new("fuse-overlayfs").arg("--version").output().is_err() {
        eprintln!("SKIPPED: the table of overlays needs fuse-overlayfs");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lower = lower(dir.path());
    let mut times = vec![Vec::new(); Side::ALL.len()];
    for _ in 0..ROUNDS {
        for (side, rounds) in Side::ALL.iter().zip(&mut times) {
            rounds.push(round(*side, dir.path(), &lower));
        }
    }
    compared("fuse-overlayfs", JOBS, &times);
}

/// Prints a table of the jobs by the kernel, a peer and vdisk.
pub fn compared(peer: &str, jobs: &[Job], times: &[Vec<Vec<f64>>]) {
    println!("{:<32} {:>10} {:>15} {:>8} {:>8}", "", "kernel", peer, "vdisk", "faster");
    for (number, Job { what, .. }) in jobs.iter().enumerate() {
        let median = |rounds: &Vec<Vec<f64>>| {
            let mut all: Vec<f64> = rounds.iter().map(|round| round[number]).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let [kernel, other, ours] = [0, 1, 2].map(|side: usize| median(&times[side]));
        let (a, b, c) = (other / kernel, ours / kernel, other / ours);
        println!("{what:<32} {kernel:>8.3} s {a:>13.2} x {b:>6.2} x {c:>8.2}");
    }
}
