//! Plans that are executed later than they were made, as after a question on a terminal: what was done
//! to the disk in between counts.

use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vdisk::ErrorKind;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::change::commit::commit;
use vdisk::internals::change::merge::Wishes;
use vdisk::internals::change::plan::Keeping;
use vdisk::internals::change::{self, Base, DeleteWishes, merge, plan_remove, snapshot, unseal};
use vdisk::internals::family::tree::Family;
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::CreateOptions;

use crate::processes::undisturbed;

const SIZE: usize = 256 << 10;
const SNAPSHOTS: [&str; 3] = ["a", "b", "c"];

/// A disk of which every snapshot, and the head, is full of a byte of its own.
struct Disk {
    dir: tempfile::TempDir,
    path: PathBuf,
}

fn fill(path: &Path, byte: u8) {
    let disk = change::open(path, &OpenOptions::writable()).unwrap();
    disk.write_at(0, &[IoSlice::new(&vec![byte; SIZE])]).unwrap();
    disk.flush().unwrap();
}

fn shows(path: &Path, byte: u8) {
    let disk = change::open(path, &OpenOptions::default()).unwrap();
    let mut bytes = vec![0; SIZE];
    disk.read_at(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    assert!(bytes.iter().all(|b| *b == byte), "{} does not show {byte}", path.display());
}

impl Disk {
    fn new() -> Disk {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("elsewhere")).unwrap();
        let path = dir.path().join("disk.qcow2");
        open::create(&path, &CreateOptions::new(SIZE as u64)).unwrap();
        for (name, byte) in SNAPSHOTS.into_iter().zip(1..) {
            fill(&path, byte);
            snapshot::create(&path, name, "").unwrap();
        }
        fill(&path, 9);
        Disk { dir, path }
    }

    fn layer(&self, name: &str) -> PathBuf {
        Family::of(&self.path).unwrap().snapshot(name).unwrap().path.clone()
    }

    /// A clone of a snapshot, where nobody who lists the disk's directory finds it.
    fn clone(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("elsewhere").join("clone.qcow2");
        Base::seal(&self.layer(name)).unwrap().clone_to(&path).unwrap();
        path
    }

    fn is_as_before(&self) {
        for (name, byte) in SNAPSHOTS.into_iter().zip(1..) {
            shows(&self.layer(name), byte);
        }
        shows(&self.path, 9);
        // Nothing is left that a writer could not put right.
        drop(change::open(&self.path, &OpenOptions::writable()).unwrap());
    }
}

/// Executes a plan that `make` makes after a clone was made of `name`: it is refused.
fn refused<P>(
    name: &str,
    make: impl FnOnce(&Path) -> vdisk::Result<P>,
    go: impl FnOnce(P) -> vdisk::Result<()>,
) {
    undisturbed(|| {
        let disk = Disk::new();
        let plan = make(&disk.path).unwrap();
        let clone = disk.clone(name);
        let refusal = go(plan).unwrap_err();
        assert_eq!(refusal.kind(), ErrorKind::Sealed, "{refusal}");
        let byte = SNAPSHOTS.into_iter().zip(1..).find(|(n, _)| *n == name).unwrap().1;
        shows(&clone, byte);
        disk.is_as_before();
    });
}

/// A clone that was made while the question was asked lost its base to `rm`; and a delete that had
/// moved the head already could not go on, nor anybody after it open the disk.
#[test]
fn a_plan_made_before_a_clone_is_refused_and_leaves_all_as_it_was() {
    for name in SNAPSHOTS {
        refused(name, |disk| plan_remove(disk, false), |plan| plan.execute().map(drop));
        for keeping in [Keeping::default(), Keeping::NOTHING] {
            let wishes = DeleteWishes { tree: true, keeping, even_if_cloned: false };
            refused(
                name,
                |disk| snapshot::plan_delete_as(disk, "a", wishes),
                |plan| plan.execute(&mut |_, _| true),
            );
        }
        for in_batches in [false, true] {
            let wishes = Wishes { in_batches, ..Wishes::default() };
            refused(
                name,
                |disk| merge::plan_merge(disk, name, wishes),
                |plan| plan.execute(&mut |_, _| true),
            );
        }
    }
}

/// It took away the marks of clones that were just being made, too, and their base went with the next
/// delete.
#[test]
fn who_says_that_no_clone_is_left_does_not_mean_those_that_are_being_made() {
    undisturbed(|| {
        let disk = Disk::new();
        let layer = disk.layer("a");
        std::fs::remove_file(disk.clone("a")).unwrap();
        let base = Base::seal(&layer).unwrap();
        assert_eq!(unseal(&layer, false).unwrap_err().kind(), ErrorKind::InUse);
        drop(base);
        unseal(&layer, false).unwrap();
        disk.is_as_before();
    });
}

/// A clone that was made while a commit waited for its base showed what was committed.
#[test]
fn a_commit_that_waited_for_who_makes_clones_of_its_base_is_refused() {
    undisturbed(|| {
        for pause in [0, 5, 20, 60] {
            let dir = tempfile::tempdir().unwrap();
            let [base, disk, clone] = ["base", "disk", "clone"].map(|name| dir.path().join(name));
            open::create(&base, &CreateOptions::new(SIZE as u64)).unwrap();
            fill(&base, 1);
            Base::seal(&base).unwrap().clone_to(&disk).unwrap();
            fill(&disk, 2);
            let sealed = Base::seal(&base).unwrap();
            std::thread::scope(|scope| {
                let commit = scope.spawn(|| commit(&disk, &mut |_, _| true));
                std::thread::sleep(Duration::from_millis(pause));
                sealed.clone_to(&clone).unwrap();
                drop(sealed);
                let refused = commit.join().unwrap().unwrap_err();
                let right = matches!(refused.kind(), ErrorKind::Sealed | ErrorKind::InUse);
                assert!(right, "{refused}");
            });
            shows(&clone, 1);
            shows(&disk, 2);
        }
    });
}

/// What is kept aside goes when its time is over, whoever opens the disk: a plan that was made a moment
/// before was refused as one of another tree.
#[test]
fn a_plan_outlives_what_is_kept_aside() {
    undisturbed(|| {
        // Longer than it takes to make the plans on a busy host.
        let age = Duration::from_secs(3);
        let made = [false, true].map(|merges| {
            let disk = Disk::new();
            let wishes = DeleteWishes { keeping: Keeping(age), ..DeleteWishes::default() };
            let delete = snapshot::plan_delete_as(&disk.path, "c", wishes).unwrap();
            delete.execute(&mut |_, _| true).unwrap();
            let plan = match merges {
                true => merge::plan_merge(&disk.path, "b", Wishes::default()),
                false => snapshot::plan_forget(&disk.path),
            };
            let plan = plan.unwrap();
            assert!(plan.forgets.is_some(), "it was still there");
            (disk, plan)
        });
        std::thread::sleep(age);
        for (disk, plan) in made {
            plan.execute(&mut |_, _| true).unwrap();
            shows(&disk.path, 3);
        }
    });
}
