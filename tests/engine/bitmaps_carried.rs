//! Bitmaps through changes of the tree: the head's go with it, and say all that was written.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::internals::block::BlockDevice;
use vdisk::internals::change::live::Live;
use vdisk::internals::change::merge::{Wishes, plan_merge};
use vdisk::internals::change::plan::{Direction, Keeping};
use vdisk::internals::change::{self, commit, rebase, snapshot};
use vdisk::internals::family::tree::Family;
use vdisk::internals::open;
use vdisk::internals::qcow2::{CreateOptions, Image, OpenOptions};

use crate::internal::{WRITABLE, open_file};

const KIB: u64 = 1 << 10;
const SIZE: u64 = 8 << 20;
const CLUSTER: u64 = 64 * KIB;

/// A disk with a bitmap `b` of 4 KiB.
fn disk(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("disk.qcow2");
    open::create(&path, &CreateOptions::new(SIZE)).unwrap();
    image(&path).add_bitmap("b", Some(4 * KIB), true).unwrap();
    path
}

fn image(path: &Path) -> Image {
    Image::open(open_file(path), WRITABLE).unwrap()
}

/// Writes a whole number of clusters.
fn write(path: &Path, cluster: u64, clusters: u64) {
    let disk = change::open(path, &open::OpenOptions::writable()).unwrap();
    let bytes = vec![7; (clusters * CLUSTER) as usize];
    disk.write_at(cluster * CLUSTER, &[IoSlice::new(&bytes)]).unwrap();
    disk.flush().unwrap();
}

/// What a bitmap calls written, in clusters.
fn written(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let image = Image::open(open_file(path), OpenOptions::default()).unwrap();
    let ranges = image.bitmap_ranges(name).unwrap();
    ranges.iter().map(|r| (r.start / CLUSTER, r.end.div_ceil(CLUSTER))).collect()
}

fn layer(path: &Path, name: &str) -> PathBuf {
    Family::of(path).unwrap().snapshot(name).unwrap().path.clone()
}

/// Merges, copying; returns where to.
fn merge(path: &Path, name: &str) -> Direction {
    let wishes = Wishes { in_batches: true, ..Wishes::default() };
    let plan = plan_merge(path, name, wishes).unwrap();
    assert_eq!(plan.bitmaps, [""; 0]);
    plan.execute(&mut |_, _| true).unwrap();
    plan.direction.unwrap()
}

/// A merge upwards dropped the bitmaps of the layer that went, and a snapshot took them away from the
/// head: what was written since was recorded nowhere.
#[test]
fn a_bitmap_goes_with_the_head_through_snapshots_and_merges_either_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    write(&path, 1, 1);
    snapshot::create(&path, "one", "").unwrap();
    assert_eq!(written(&path, "b"), [(1, 2)], "the new head knows what was written before");
    write(&path, 20, 9);
    snapshot::create(&path, "two", "").unwrap();
    write(&path, 40, 2);
    assert_eq!(written(&layer(&path, "one"), "b"), [(1, 2)]);
    assert_eq!(written(&layer(&path, "two"), "b"), [(1, 2), (20, 29)]);
    let all = [(1, 2), (20, 29), (40, 42)];
    assert_eq!(written(&path, "b"), all);
    assert_eq!(merge(&path, "one"), Direction::Up);
    assert_eq!(written(&layer(&path, "two"), "b"), all[..2]);
    assert_eq!(merge(&path, "two"), Direction::Down);
    assert_eq!(written(&path, "b"), all);
    write(&path, 60, 1);
    assert_eq!(written(&path, "b"), [&all[..], &[(60, 61)]].concat());
    assert!(image(&path).check(vdisk::internals::qcow2::Repair::None).unwrap().is_clean());
}

/// Heads that QEMU or an older vdisk began have no bitmap, or one of their own: both records count. So does
/// a head that a way back began: what was undone was in the backups, and nothing knows of it. A bitmap that the
/// head did not have calls all of the disk written.
#[test]
fn bitmaps_of_both_layers_are_one_after_a_merge() {
    for (below, above, way) in [(1, 8, Direction::Up), (8, 1, Direction::Down)] {
        let dir = tempfile::tempdir().unwrap();
        let path = disk(&dir);
        image(&path).add_bitmap("below", None, true).unwrap();
        image(&path).add_bitmap("still", None, false).unwrap();
        write(&path, 10, below);
        snapshot::create(&path, "one", "").unwrap();
        for name in ["b", "below", "still"] {
            image(&path).remove_bitmap(name).unwrap();
        }
        image(&path).add_bitmap("b", Some(CLUSTER), true).unwrap();
        image(&path).add_bitmap("above", None, true).unwrap();
        write(&path, 30, above);
        assert_eq!(merge(&path, "one"), way);
        let (lower, upper) = ((10, 10 + below), (30, 30 + above));
        for (name, says) in [
            ("b", vec![lower, upper]),
            ("below", vec![(0, SIZE / CLUSTER)]),
            ("above", vec![upper]),
            ("still", vec![]),
        ] {
            assert_eq!(written(&path, name), says, "{name}, {way:?}");
        }
        let info = image(&path).bitmaps().unwrap();
        assert_eq!(info.iter().find(|i| i.name == "b").unwrap().granularity, CLUSTER);
        assert_eq!(info.iter().filter(|i| i.auto).count(), 3);
    }
}

/// The writes that a way back undid are in no bitmap: one that comes up from the layer below must not leave
/// them out of the next backup.
#[test]
fn a_bitmap_that_a_way_back_dropped_comes_up_with_all_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    write(&path, 10, 1);
    snapshot::create(&path, "one", "").unwrap();
    write(&path, 20, 1);
    snapshot::revert(&path, "one", None).unwrap();
    assert!(image(&path).bitmaps().unwrap().is_empty());
    write(&path, 30, 8);
    assert_eq!(merge(&path, "one"), Direction::Up);
    assert_eq!(written(&path, "b"), [(0, SIZE / CLUSTER)]);
}

#[test]
fn a_bitmap_goes_with_the_head_of_a_disk_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    write(&path, 1, 1);
    let chain = change::open(&path, &open::OpenOptions::writable()).unwrap();
    let live = Live::new(Arc::new(chain), &path).unwrap();
    let write = |cluster: u64| {
        let bytes = [IoSlice::new(&[5; CLUSTER as usize])];
        live.chain().write_at(cluster * CLUSTER, &bytes).unwrap();
    };
    write(5);
    live.snapshot("one", "", None).unwrap();
    write(9);
    live.snapshot("two", "", None).unwrap();
    write(13);
    let wishes = Wishes { in_use: true, in_batches: true, ..Wishes::default() };
    live.merge("one", wishes, None, None, &mut |_, _| true).unwrap();
    live.merge("two", wishes, None, None, &mut |_, _| true).unwrap();
    write(17);
    drop(live);
    assert_eq!(written(&path, "b"), [(1, 2), (5, 6), (9, 10), (13, 14), (17, 18)]);
}

#[test]
fn what_leaves_the_contents_alone_records_nothing_and_what_does_not_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    open::create(&base, &CreateOptions::new(SIZE)).unwrap();
    write(&base, 50, 3);
    let path = dir.path().join("disk.qcow2");
    vdisk::internals::change::Base::seal(&base).unwrap().clone_to(&path).unwrap();
    image(&path).add_bitmap("b", None, true).unwrap();
    write(&path, 2, 1);
    commit::commit(&path, &mut |_, _| true).unwrap();
    assert_eq!(written(&path, "b"), [(2, 3)], "a commit");
    rebase::flatten(&path, &mut |_, _| true).unwrap();
    assert_eq!(written(&path, "b"), [(2, 3)], "flattening");
    snapshot::create(&path, "one", "").unwrap();
    write(&path, 4, 1);
    let back = snapshot::plan_revert(&path, "one", None, Keeping::default()).unwrap();
    assert_eq!(back.bitmaps, ["b"]);
    let delete = snapshot::plan_delete(&path, "one", false, Keeping::default()).unwrap();
    assert_eq!(delete.bitmaps, ["b"]);
}

/// Its bitmaps are in use by itself from its first write on: that was taken for a crash, and the resize
/// refused.
#[test]
fn a_disk_that_was_just_written_is_resized_with_its_bitmaps() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    let chain = change::open(&path, &open::OpenOptions::writable()).unwrap();
    chain.write_at(0, &[std::io::IoSlice::new(&[7; 512])]).unwrap();
    chain.resize(chain.size() + CLUSTER).unwrap();
    drop(chain);
    assert_eq!(written(&path, "b"), [(0, 1)]);
}
