//! Trees of files in a disk, the same on every side: the kernel's ext4 on a loop device, fuse2fs, and
//! vdisk's ext4 in user space, in turn. Needs the superuser.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::files::{Job, Work, compared, lower, worked};

/// How often each side is measured.
const ROUNDS: usize = 3;

/// Who serves the files.
#[derive(Clone, Copy)]
enum Side {
    Kernel,
    Fuse2fs,
    Vdisk,
}

impl Side {
    const ALL: [Side; 3] = [Side::Kernel, Side::Fuse2fs, Side::Vdisk];

    fn mount(self, disk: &Path, at: &Path) {
        let (program, words): (&str, &[&str]) = match self {
            Side::Kernel => ("mount", &["-o", "loop"]),
            Side::Fuse2fs => ("fuse2fs", &["-o", "rw"]),
            Side::Vdisk => {
                let words = &["mount", "--user-space", "--format", "raw"];
                (env!("CARGO_BIN_EXE_vdisk"), words)
            }
        };
        let mut command = Command::new(program);
        let done = command.args(words).args([disk, at]).stdin(Stdio::null()).status().unwrap();
        assert!(done.success(), "{program}");
    }
}

const JOBS: &[Job] = &[
    Job { what: "make 9,000 files", work: Work::Shell("cp -a d* new/") },
    Job { what: "find -ls", work: Work::Shell("find d* -ls >/dev/null") },
    Job { what: "find -ls again", work: Work::Shell("find d* -ls >/dev/null") },
    Job { what: "read every file", work: Work::Shell("cat d*/* >/dev/null") },
    Job {
        what: "append to 3,000 files",
        work: Work::Shell("for f in d2*/*; do echo x >> $f; done"),
    },
    Job {
        what: "write 128 MiB, fsync",
        work: Work::Shell("dd if=large of=big bs=1M count=128 conv=fsync"),
    },
    Job { what: "read 256 MiB in order", work: Work::Shell("cat large >/dev/null") },
    Job { what: "20,000 random reads of 4 KiB", work: Work::RandomReads },
    Job { what: "du", work: Work::Shell("du -s new >/dev/null") },
    Job { what: "rm -rf", work: Work::Shell("rm -rf d*") },
];

/// One round of every job on one side, in seconds.
fn round(side: Side, dir: &Path, disk: &Path) -> Vec<f64> {
    let here = tempfile::tempdir_in(dir).unwrap();
    let (at, own) = (here.path().join("at"), here.path().join("disk"));
    fs::create_dir(&at).unwrap();
    let copied = Command::new("cp").arg("--sparse=always").args([disk, &own]).status().unwrap();
    assert!(copied.success());
    side.mount(&own, &at);
    let times = worked(JOBS, &at);
    // A server that is still busy would be in the next one's way.
    std::thread::sleep(std::time::Duration::from_millis(500));
    times
}

/// Prints how the sides compare; without fuse2fs there is no table.
pub fn table() {
    if Command::new("fuse2fs").arg("-V").output().is_err() {
        eprintln!("SKIPPED: the table of files in a disk needs fuse2fs");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (lower, disk) = (lower(dir.path()), dir.path().join("disk"));
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&lower, &disk])
        .arg("2G")
        .status()
        .unwrap();
    assert!(made.success());
    let mut times = vec![Vec::new(); Side::ALL.len()];
    for _ in 0..ROUNDS {
        for (side, rounds) in Side::ALL.iter().zip(&mut times) {
            rounds.push(round(*side, dir.path(), &disk));
        }
    }
    compared("fuse2fs", JOBS, &times);
}
