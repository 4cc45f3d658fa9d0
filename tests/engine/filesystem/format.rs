//! An empty file system made here is one to e2fsck, and the same everywhere.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vdisk::internals::block::BlockDevice;
use vdisk::internals::change::open;
use vdisk::internals::filesystem::ext4::mounted::{Format, Mounted, New, Options, ROOT, format};
use vdisk::internals::open::OpenOptions;
use vdisk::internals::open::create_raw;

const FORMAT: Format = Format { uuid: [7; 16], hash_seed: [9; 16], seconds: 1_700_000_000 };

fn disk(path: &Path, size: u64) -> Arc<dyn BlockDevice> {
    create_raw(path, size, Default::default()).unwrap();
    let writable = OpenOptions { read_only: false, ..OpenOptions::default() };
    Arc::new(open(path, &writable).unwrap())
}

fn is_clean(path: &Path, size: u64) {
    let out = Command::new("e2fsck").arg("-fn").arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{size}: {said}");
}

#[test]
fn an_empty_file_system_of_any_size_is_clean_and_holds_files() {
    let dir = tempfile::tempdir().unwrap();
    // One group and several, a last group that is left out, one that is short, one of descriptors of its own.
    let sizes = [
        16 << 20,
        (16 << 20) + 1,
        100 << 20,
        (128 << 20) + (1 << 20),
        200 << 20,
        600 << 20,
        (8 << 30) + (130 << 20),
        20u64 << 30,
        1 << 40,
    ];
    for size in sizes {
        let path = dir.path().join(format!("{size}.raw"));
        let device = disk(&path, size);
        format(&device, size, &FORMAT).unwrap();
        is_clean(&path, size);
        let fs = Mounted::open(device.clone(), 0, u64::MAX, Options::default()).unwrap();
        let before = fs.statistics();
        assert!(before.free * 4096 > size / 10 * 6, "{size}: {before:?}");
        let new = New { mode: 0x4000 | 0o755, ..New::default() };
        for directory in 0..70u32 {
            let name = format!("directory {directory}");
            let directory = fs.create(ROOT, name.as_bytes(), &new).unwrap();
            let new = New { mode: 0x8000 | 0o644, ..New::default() };
            let file = fs.create(directory, b"file", &new).unwrap();
            fs.write(file, 0, &vec![1; 100_000]).unwrap();
        }
        fs.close().unwrap();
        is_clean(&path, size);
    }
}

#[test]
fn what_is_too_small_for_a_file_system_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let device = disk(&dir.path().join("small.raw"), 8 << 20);
    let error = format(&device, 8 << 20, &FORMAT).unwrap_err();
    assert!(error.to_string().contains("16 MiB at least"), "{error}");
    assert!(format(&device, 32 << 20, &FORMAT).is_err());
}
