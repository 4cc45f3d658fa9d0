//! Persistent dirty bitmaps, kept by us and by QEMU in turn: QEMU reads them over NBD.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vdisk::ErrorKind;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::image::Image as _;
use vdisk::internals::open::Format;
use vdisk::internals::qcow2::{BitmapInfo, Image, OpenOptions};

use crate::internal::{WRITABLE, new_file, open_file, qemu_finds_it_clean, qemu_img};
use crate::require::{Need, have};

fn image(path: &Path) -> Image {
    Image::open(open_file(path), WRITABLE).unwrap()
}

fn info(path: &Path) -> Vec<BitmapInfo> {
    Image::open(open_file(path), OpenOptions::default()).unwrap().bitmaps().unwrap()
}

fn ranges(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let image = Image::open(open_file(path), OpenOptions::default()).unwrap();
    image.bitmap_ranges(name).unwrap().iter().map(|r| (r.start, r.end)).collect()
}

/// Writes `len` bytes at `at`, discards and zeroes behind it.
fn chain_write(path: &Path, at: u64, len: u64) {
    let layer = crate::crash::layer(Arc::new(image(path)), Format::Qcow2);
    let chain = Chain::new(layer, Vec::new(), 1 << 20);
    chain.write_at(at, &[std::io::IoSlice::new(&vec![7; len as usize])]).unwrap();
    chain.flush().unwrap();
}

fn qemu_io(path: &Path, command: &str) {
    let run = Command::new("qemu-io").args(["-c", command]).arg(path).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

/// What QEMU says is dirty: it merges the bitmap into a fresh one of another image and the ranges
/// are read from there.
fn qemu_ranges(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let copy = path.with_extension("copy");
    let size = Image::open(open_file(path), OpenOptions::default()).unwrap().size();
    let size = size.to_string();
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&copy).arg(size);
    assert!(create.status().unwrap().success());
    let source = path.display().to_string();
    for args in [&["--add", "-g", "4k"][..], &["--merge", name, "-b", &source, "-F", "qcow2"][..]] {
        let mut command = Command::new("qemu-img");
        let run = command.arg("bitmap").args(args).arg(&copy).arg("copy").output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    }
    ranges(&copy, "copy")
}

#[test]
fn bitmaps_record_the_writes_of_both() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for cluster in ["64k", "4k", "512"] {
        let path = new_file(&dir, &format!("cluster_size={cluster}"), 8 << 20);
        image(&path).add_bitmap("ours", Some(65536), true).unwrap();
        let add = ["bitmap", "--add", "-g", "64k", "--disable"];
        assert_eq!(named(&add, &path, "theirs").0, Some(0));
        qemu_finds_it_clean(&path);
        chain_write(&path, 1 << 20, 100);
        qemu_io(&path, "write 3M 64k");
        image(&path).enable_bitmap("theirs", true).unwrap();
        chain_write(&path, (5 << 20) - 1, 2);
        qemu_finds_it_clean(&path);
        let edge = ((5 << 20) - 65536, (5 << 20) + 65536);
        assert_eq!(ranges(&path, "theirs"), [edge]);
        let all = [(1 << 20, (1 << 20) + 65536), (3 << 20, (3 << 20) + 65536), edge];
        assert_eq!(ranges(&path, "ours"), all);
        assert_eq!(qemu_ranges(&path, "ours"), all);
        assert_eq!(info(&path).len(), 2);
        assert!(info(&path).iter().all(|b| b.auto && !b.in_use && b.granularity == 65536));
        image(&path).clear_bitmap("ours").unwrap();
        assert_eq!(qemu_ranges(&path, "ours"), []);
        let theirs = image(&path).bitmap_ranges("theirs").unwrap();
        image(&path).merge_bitmap("ours", &theirs).unwrap();
        assert_eq!(qemu_ranges(&path, "ours"), ranges(&path, "theirs"));
        qemu_finds_it_clean(&path);
        image(&path).remove_bitmap("ours").unwrap();
        qemu_finds_it_clean(&path);
        assert_eq!(named(&["bitmap", "--remove"], &path, "theirs").0, Some(0));
        qemu_finds_it_clean(&path);
        assert_eq!(info(&path), []);
    }
}

fn named(args: &[&str], path: &Path, name: &str) -> (Option<i32>, String) {
    let run = Command::new("qemu-img").args(args).arg(path).arg(name).output().unwrap();
    (run.status.code(), String::from_utf8_lossy(&run.stderr).into_owned())
}

#[test]
fn a_writer_that_stops_leaves_its_bitmaps_inconsistent() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = new_file(&dir, "cluster_size=64k", 8 << 20);
    image(&path).add_bitmap("b", None, true).unwrap();
    image(&path).add_bitmap("idle", None, false).unwrap();
    let before = std::fs::read(&path).unwrap();
    drop(image(&path));
    assert!(std::fs::read(&path).unwrap() == before, "opening it alone changes nothing");
    let stopped = image(&path);
    stopped.discard(vdisk::internals::addr::GuestOffset(0), 65536, false).unwrap();
    stopped.flush().unwrap();
    std::mem::forget(stopped);
    let found = info(&path);
    assert!(found[0].in_use && !found[1].in_use, "{found:?}");
    let (_, text) = qemu_img(&["info"], &path);
    assert!(text.contains("in-use"), "{text}");
    let error = image(&path).clear_bitmap("b").unwrap_err();
    assert_eq!(error.message(), "Bitmap 'b' is inconsistent and cannot be used");
    chain_write(&path, 0, 10);
    assert!(info(&path)[0].in_use, "it does not become right by itself");
    image(&path).remove_bitmap("b").unwrap();
    assert_eq!(image(&path).remove_bitmap("b").unwrap_err().kind(), ErrorKind::NotFound);
    qemu_finds_it_clean(&path);
    assert_eq!(info(&path).len(), 1);
}

#[test]
fn bitmaps_follow_the_size_of_the_disk() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = new_file(&dir, "cluster_size=4k", 1 << 20);
    image(&path).add_bitmap("b", Some(4096), true).unwrap();
    chain_write(&path, 0, 4096);
    chain_write(&path, (1 << 20) - 4096, 4096);
    for size in [600 << 20, 512 << 10] {
        image(&path).resize(size).unwrap();
        qemu_finds_it_clean(&path);
        assert_eq!(ranges(&path, "b"), qemu_ranges(&path, "b"));
        assert_eq!(ranges(&path, "b")[0], (0, 4096));
    }
    assert_eq!(ranges(&path, "b").len(), 1);
    chain_write(&path, (512 << 10) - 1, 1);
    assert_eq!(qemu_ranges(&path, "b"), [(0, 4096), ((512 << 10) - 4096, 512 << 10)]);
}
