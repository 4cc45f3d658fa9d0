//! The same random calls on an overlay of ours and on the kernel's overlayfs over the same lower
//! layers: every answer, the trees that are seen then, after a remount and from each other's upper
//! layer agree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::dice::Dice;
use crate::same_calls::{Call, Side};
use crate::same_tree::tree;

/// Mounts overlays: ours, or another program's for comparison.
pub type Mounting = dyn Fn(&Layers, &Path) + Send + Sync;

/// What an overlay is made of.
#[derive(Debug, Clone)]
pub struct Layers {
    /// Uppermost first.
    pub lowers: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

impl Layers {
    /// As a mount option.
    pub fn options(&self) -> String {
        let lowers: Vec<_> = self.lowers.iter().map(|path| path.display().to_string()).collect();
        let (upper, work) = (self.upper.display(), self.work.display());
        format!("lowerdir={},upperdir={upper},workdir={work}", lowers.join(":"))
    }
}

/// Runs a program that must succeed.
fn run(program: &str, words: &[&str]) {
    let done = Command::new(program).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {words:?}: {said}");
}

/// The kernel's overlayfs, with all that it knows.
pub fn kernel(layers: &Layers, at: &Path) {
    let options = format!("{},index=on,redirect_dir=on,metacopy=off", layers.options());
    run("mount", &["-t", "overlay", "overlay", "-o", &options, at.to_str().unwrap()]);
}

pub fn umount(at: &Path) {
    for _ in 0..100 {
        if Command::new("umount").arg(at).output().unwrap().status.success() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("{} stays busy", at.display());
}

/// Unmounts what a failed run leaves.
struct Clean(Vec<PathBuf>);

impl Drop for Clean {
    fn drop(&mut self) {
        for at in &self.0 {
            let _ = Command::new("umount").arg("-l").arg(at).output();
        }
    }
}

pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

/// Makes layers by calls on the kernel's overlayfs: what is in them is what it leaves.
fn layers(dice: &mut Dice, dir: &Path, at: &Path) -> Vec<PathBuf> {
    let mut lowers: Vec<PathBuf> = Vec::new();
    for number in 0..1 + dice.below(3) {
        let made = |name: &str| {
            let path = dir.join(format!("{name}{number}"));
            fs::create_dir(&path).unwrap();
            path
        };
        let (lower, work) = (made("lower"), made("lowerwork"));
        let mut side;
        if number == 0 {
            for thread in 0..THREADS {
                fs::create_dir(lower.join(format!("t{thread}"))).unwrap();
            }
            side = (0..THREADS)
                .map(|t| Side::new(&lower.join(format!("t{t}")), i64::MAX))
                .collect::<Vec<_>>();
        } else {
            let layers = Layers { lowers: lowers.clone(), upper: lower.clone(), work };
            kernel(&layers, at);
            side = (0..THREADS).map(|t| Side::new(&at.join(format!("t{t}")), i64::MAX)).collect();
        }
        for side in &mut side {
            for _ in 0..120 {
                let call = Call::random(dice);
                // Of space that is allocated and not written, it depends on who read it before
                // whether it is a hole.
                // And a whiteout that hides nothing is listed by the kernel's overlayfs, as no file.
                let left_out = match call {
                    Call::As(..) | Call::Umask(_) | Call::Allocate(..) => true,
                    Call::Mknod(_, _, rdev) => rdev == 0,
                    Call::Rename(_, _, flags) => flags & 4 != 0,
                    _ => false,
                };
                if !left_out {
                    side.make(&call);
                }
            }
        }
        drop(side);
        if number > 0 {
            umount(at);
        }
        age(&lower);
        lowers.insert(0, lower);
    }
    lowers
}

/// Gives everything in a layer times of long ago, so that they can be told from those of a change.
fn age(path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    if meta.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            age(&entry.unwrap().path());
        }
    }
    let at = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 5 };
    let times = rustix::fs::Timestamps { last_access: at, last_modification: at };
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, flags).unwrap();
}

/// Threads, each in a directory of its own.
const THREADS: usize = 2;

fn compare(what: &str, seed: u64, ours: &Path, theirs: &Path, started: i64) {
    let (ours, theirs) = (tree(ours, started), tree(theirs, started));
    for (a, b) in ours.iter().zip(&theirs) {
        assert_eq!(a, b, "seed {seed}: {what}: first ours, then the kernel's");
    }
    assert_eq!(ours.len(), theirs.len(), "seed {seed}: {what}");
}

/// The calls of one thread; every answer is compared.
pub fn calls(seed: u64, thread: u64, many: u64, ours: &Path, theirs: &Path, started: i64) {
    // A mask and a user of its own.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
    let mut dice = Dice::new(seed ^ (thread + 1) << 40);
    let name = format!("t{thread}");
    let (mut a, mut b) =
        (Side::new(&ours.join(&name), started), Side::new(&theirs.join(&name), started));
    let mut story = Vec::new();
    for number in 0..many {
        let call = Call::random(&mut dice);
        let (x, y) = (a.make(&call), b.make(&call));
        story.push(format!("{number} {}: {x}", short(&call)));
        if x != y {
            let tail = &story[story.len().saturating_sub(400)..];
            let text = tail.join("\n");
            // The superuser again, who alone can write it down and clean up.
            a.make(&Call::As(0, 0));
            panic!("{text}\nseed {seed} thread {thread}: ours {x}\nthe kernel's {y}");
        }
    }
    a.make(&Call::As(0, 0));
    if let Ok(file) = std::env::var("VDISK_STORY") {
        fs::write(format!("{file}.{thread}.{}", seed >> 50), story.join("\n")).unwrap();
    }
}

fn short(call: &Call) -> String {
    let text = format!("{call:?}");
    if text.len() < 200 { text } else { text.chars().take(200).collect::<String>() + "..." }
}

/// One run in `dir`, which is on a file system of the host.
pub fn agree(seed: u64, many: u64, dir: &Path, mount: &Arc<Mounting>) {
    let mut dice = Dice::new(seed);
    let made = |name: &str| {
        let path = dir.join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (at, other) = (made("ours"), made("theirs"));
    let _clean = Clean(vec![at.clone(), other.clone()]);
    let lowers = layers(&mut dice, dir, &other);
    let layers = |name: &str| Layers {
        lowers: lowers.clone(),
        upper: made(&format!("upper-{name}")),
        work: made(&format!("work-{name}")),
    };
    let (ours, theirs) = (layers("ours"), layers("theirs"));
    mount(&ours, &at);
    kernel(&theirs, &other);
    let started = now() - 1;
    for round in 0..2 {
        std::thread::scope(|scope| {
            for thread in 0..THREADS as u64 {
                let (at, other) = (&at, &other);
                let seed = seed ^ round << 50;
                scope.spawn(move || calls(seed, thread, many, at, other, started));
            }
        });
        compare("after the calls", seed, &at, &other, started);
        let before = inodes(&at);
        umount(&at);
        umount(&other);
        mount(&ours, &at);
        kernel(&theirs, &other);
        compare("after a remount", seed, &at, &other, started);
        assert_eq!(before, inodes(&at), "seed {seed}: inode numbers stay after a remount");
    }
    umount(&at);
    umount(&other);
    kernel(&ours, &at);
    kernel(&theirs, &other);
    compare("our upper layer under the kernel", seed, &at, &other, started);
    umount(&at);
    umount(&other);
    mount(&theirs, &at);
    kernel(&ours, &other);
    compare("the kernel's upper layer under us", seed, &at, &other, started);
    umount(&at);
    umount(&other);
}

/// Every name's inode number.
fn inodes(root: &Path) -> Vec<(PathBuf, u64)> {
    use std::os::unix::fs::MetadataExt;
    let mut all = Vec::new();
    let mut rest = vec![root.to_owned()];
    while let Some(path) = rest.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            rest.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        all.push((path, meta.ino()));
    }
    all.sort();
    all
}
