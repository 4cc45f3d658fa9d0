//! The library as another program uses it: only by what `vdisk` itself names, never by its rooms.

use std::io::{IoSlice, IoSliceMut};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vdisk::{
    BlockDevice, Convert, CreateOptions, Disk, Error, ErrorKind, Files, Format, GuestOffset,
    MemoryStorage, OpenOptions, Result, Snapshots, Storage,
};

const SIZE: u64 = 8 << 20;

fn bytes_at(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    disk.read(offset, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_clone_holds_what_changed_and_its_base_is_sealed_until_it_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (base, clone) = (dir.path().join("base.qcow2"), dir.path().join("clone.qcow2"));
    let disk = Disk::create(&base, SIZE).unwrap();
    disk.write(1 << 20, b"of the base").unwrap();
    disk.close().unwrap();
    let disk = vdisk::create_clone(&base, &clone).unwrap();
    assert_eq!(bytes_at(&disk, 1 << 20, 11), b"of the base");
    disk.write((1 << 20) + 7, b"CLONE").unwrap();
    assert_eq!(bytes_at(&disk, 1 << 20, 12), b"of the CLONE");
    let info = disk.info().unwrap();
    assert_eq!((info.size, info.layers.len()), (SIZE, 2));
    assert_eq!(info.layers[0].backing.as_deref(), Some("base.qcow2"));
    assert!(disk.check().unwrap().is_clean());
    disk.close().unwrap();
    assert_eq!(Disk::open(&base).unwrap_err().kind(), ErrorKind::Sealed);
    assert_eq!(vdisk::unseal(&base).unwrap_err().kind(), ErrorKind::Sealed);
    std::fs::remove_file(&clone).unwrap();
    vdisk::unseal(&base).unwrap();
    Disk::open(&base).unwrap().write(0, b"again").unwrap();
}

#[test]
fn a_plan_tells_what_is_lost_before_it_is_and_undo_brings_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let disk = Disk::create(&path, SIZE).unwrap();
    disk.write(0, b"one").unwrap();
    disk.take_snapshot("first").unwrap();
    disk.write(0, b"two").unwrap();
    disk.close().unwrap();
    let snapshots = Snapshots::of(&path);
    snapshots.create("second", "by hand").unwrap();
    Disk::open(&path).unwrap().write(0, b"now").unwrap();
    let all = snapshots.list().unwrap();
    let names: Vec<_> = all.iter().map(|s| (s.name.as_str(), s.parent.as_deref())).collect();
    assert_eq!(names, [("first", None), ("second", Some("first"))]);
    assert!(all[1].is_current && !all[0].is_current && all[1].description == "by hand");
    let first = OpenOptions::new().snapshot("first").open(&path).unwrap();
    assert_eq!(bytes_at(&first, 0, 3), b"one");
    assert_eq!(first.write(0, b"x").unwrap_err().kind(), ErrorKind::ReadOnly);
    drop(first);

    let plan = snapshots.revert("first", None).unwrap();
    assert!(plan.dropped() > 0, "today's changes go");
    let held = Disk::open(&path).unwrap();
    assert_eq!(bytes_at(&held, 0, 3), b"now", "a plan alone does nothing");
    assert_eq!(plan.execute().unwrap_err().kind(), ErrorKind::InUse);
    drop(held);
    plan.execute().unwrap();
    assert_eq!(bytes_at(&Disk::open(&path).unwrap(), 0, 3), b"one");
    snapshots.undo(None).unwrap().execute().unwrap();
    assert_eq!(bytes_at(&Disk::open(&path).unwrap(), 0, 3), b"now");
    let stopped = snapshots.merge("first").unwrap();
    stopped.execute().unwrap();
    snapshots.rename("second", "last").unwrap();
    let names: Vec<_> = snapshots.list().unwrap().into_iter().map(|s| s.name).collect();
    assert_eq!(names, ["last"]);
    let missing = OpenOptions::new().snapshot("first").open(&path).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn what_is_written_to_an_ephemeral_disk_is_gone_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let made = CreateOptions::new(SIZE).format(Format::Raw).create(&path).unwrap();
    made.write(0, b"kept").unwrap();
    made.close().unwrap();
    let raw = OpenOptions::new().format(Format::Raw);
    let disk = raw.clone().ephemeral(true).open(&path).unwrap();
    disk.write(0, b"gone").unwrap();
    assert_eq!(bytes_at(&disk, 0, 4), b"gone");
    assert_eq!(disk.take_snapshot("s").unwrap_err().kind(), ErrorKind::ReadOnly);
    disk.close().unwrap();
    let disk = raw.open(&path).unwrap();
    assert_eq!(bytes_at(&disk, 0, 4), b"kept");
    assert_eq!(disk.take_snapshot("s").unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_disk_is_encrypted_under_its_passphrase_and_converted_out_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("secret.qcow2"), dir.path().join("copy.qcow2"));
    let disk = CreateOptions::new(SIZE).passphrase(b"open".to_vec()).create(&path).unwrap();
    disk.write(0, &[7; 1 << 20]).unwrap();
    disk.close().unwrap();
    let wrong = OpenOptions::new().passphrase(b"shut".to_vec()).open(&path).unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::Invalid);
    let right = OpenOptions::new().passphrase(b"open".to_vec()).read_only(true);
    let disk = right.open(&path).unwrap();
    let target = CreateOptions::new(0).zstd(true).cluster_size(128 << 10);
    Convert::to(target.clone()).compress(true).run(&disk, &copy).unwrap();
    let copied = Disk::open(&copy).unwrap();
    assert_eq!(bytes_at(&copied, 0, 1 << 20), [7; 1 << 20]);
    let info = copied.info().unwrap();
    assert!(info.layers[0].cluster_size == 128 << 10 && info.layers[0].allocated < 1 << 20);
    let again = Convert::to(target).run(&disk, &copy).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Exists);
    let odd = CreateOptions::new(SIZE).cluster_size(1000).create(dir.path().join("odd"));
    assert_eq!(odd.unwrap_err().kind(), ErrorKind::Invalid);
    let vdi = CreateOptions::new(SIZE).format(Format::Vdi).create(dir.path().join("x.vdi"));
    assert_eq!(vdi.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn files_of_a_snapshot_are_read_without_a_mount() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree/etc");
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join("motd"), "hello\n").unwrap();
    std::os::unix::fs::symlink("/etc/motd", dir.path().join("tree/link")).unwrap();
    let (raw, path) = (dir.path().join("fs.raw"), dir.path().join("fs.qcow2"));
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&dir.path().join("tree"), &raw])
        .arg("8M")
        .status();
    assert!(made.unwrap().success());
    let source = OpenOptions::new().format(Format::Raw).read_only(true).open(&raw).unwrap();
    Convert::to(CreateOptions::new(0)).run(&source, &path).unwrap();
    Snapshots::of(&path).create("then", "").unwrap();
    Disk::open(&path).unwrap().write_zeroes(0, 8 << 20, true).unwrap();
    let then = OpenOptions::new().snapshot("then").open(&path).unwrap();
    let files = Files::open(Arc::new(then), None).unwrap();
    assert_eq!(files.read("/etc/motd").unwrap(), b"hello\n");
    assert_eq!(files.read("link").unwrap(), b"hello\n");
    let etc = files.list("/etc").unwrap();
    assert!(etc.len() == 1 && etc[0].name == "motd" && etc[0].is_file() && etc[0].len == 6);
    assert!(files.list("/").unwrap().iter().any(|e| e.name == "link" && e.is_symlink()));
    assert_eq!(files.read("/etc/none").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(files.read("/etc").unwrap_err().kind(), ErrorKind::Invalid);
    let now = Disk::open(&path).unwrap();
    assert_eq!(Files::open(Arc::new(now), None).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// Memory whose syncs fail once that is asked for.
#[derive(Default)]
struct Failing {
    memory: MemoryStorage,
    fails: AtomicBool,
}

impl Storage for Failing {
    fn len(&self) -> Result<u64> {
        self.memory.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.memory.set_len(len)
    }
    fn is_fixed(&self) -> bool {
        self.memory.is_fixed()
    }
    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.memory.read_at(offset, bufs)
    }
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.memory.write_at(offset, bufs)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.memory.punch_hole(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.memory.write_zeroes(offset, len)
    }
    fn sync(&self) -> Result<()> {
        match self.fails.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::NoSpace, "asked for")),
            false => self.memory.sync(),
        }
    }
}

/// What was written and not flushed is lost silently by a drop: closing says so.
#[test]
fn closing_tells_what_dropping_could_only_lose() {
    for fails in [false, true] {
        let storage = Arc::new(Failing::default());
        let image = vdisk::create_image(storage.clone(), &CreateOptions::new(SIZE)).unwrap();
        let new = image.prepare(GuestOffset(0), 1 << 16).unwrap();
        new.write(0, &[IoSlice::new(&[5; 1 << 16])]).unwrap();
        new.commit().unwrap();
        storage.fails.store(fails, Ordering::SeqCst);
        assert_eq!(image.close().is_err(), fails);
        drop(image);
        storage.fails.store(false, Ordering::SeqCst);
        let again = vdisk::open_image(storage, true).unwrap();
        let extent = again.map(GuestOffset(0), 1 << 16).unwrap();
        let there = matches!(extent.mapping, vdisk::Mapping::Data { .. });
        assert_eq!(there, !fails, "what was not made durable is not pointed at");
    }
}
