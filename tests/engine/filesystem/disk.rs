//! A disk in memory that remembers its writes, and file systems on it that others judge.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use vdisk::internals::block::{BlockDevice, BlockExtent, BlockStatus};
use vdisk::{Error, Result};

/// One change of a disk.
#[derive(Debug, Clone)]
pub enum Event {
    Write(u64, Vec<u8>),
    Flush,
}

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    log: Vec<Event>,
    /// When each of them was made.
    times: Vec<Instant>,
    records: bool,
}

type Hook = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// A disk in memory, and what it does at a flush.
pub struct Disk(Mutex<Inner>, OnceLock<Hook>);

impl Disk {
    pub fn new(bytes: Vec<u8>) -> Disk {
        Disk(Mutex::new(Inner { bytes, ..Inner::default() }), OnceLock::new())
    }

    /// Does this at each flush from now on.
    pub fn at_flush(&self, hook: impl Fn() -> Result<()> + Send + Sync + 'static) {
        assert!(self.1.set(Box::new(hook)).is_ok(), "one hook is enough");
    }

    /// Remembers the changes from now on.
    pub fn record(&self) {
        let mut inner = self.0.lock().unwrap();
        inner.records = true;
        inner.log.clear();
        inner.times.clear();
    }

    /// How many writes it remembers that were made after `since`.
    pub fn writes_after(&self, since: Instant) -> usize {
        let inner = self.0.lock().unwrap();
        let made = inner.log.iter().zip(&inner.times).filter(|(_, time)| **time > since);
        made.filter(|(event, _)| matches!(event, Event::Write(..))).count()
    }

    /// How many changes it remembers.
    pub fn events(&self) -> usize {
        self.0.lock().unwrap().log.len()
    }

    pub fn log(&self) -> Vec<Event> {
        self.0.lock().unwrap().log.clone()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().bytes.clone()
    }
}

impl Inner {
    fn note(&mut self, event: Event) {
        if self.records {
            self.log.push(event);
            self.times.push(Instant::now());
        }
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().bytes.len() as u64
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let inner = self.0.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            let from = inner.bytes.get(at..at + buf.len());
            buf.copy_from_slice(from.ok_or_else(|| Error::invalid("past the end"))?);
            at += buf.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let mut inner = self.0.lock().unwrap();
        let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        let at = offset as usize;
        let to = inner.bytes.get_mut(at..at + all.len());
        to.ok_or_else(|| Error::invalid("past the end"))?.copy_from_slice(&all);
        inner.note(Event::Write(offset, all));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<()> {
        self.write_at(offset, &[IoSlice::new(&vec![0; len as usize])])
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.0.lock().unwrap().note(Event::Flush);
        self.1.get().map_or(Ok(()), |hook| hook())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<BlockExtent>> {
        Ok(vec![BlockExtent { offset, len, status: BlockStatus::Data }])
    }
}

/// The bytes of a new file system.
pub fn formatted(options: &str, size: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let run = Command::new("mke2fs")
        .args(["-q", "-F"])
        .args(options.split_whitespace())
        .arg(&path)
        .arg(size)
        .env("MKE2FS_SYNC", "0")
        .output()
        .expect("mke2fs runs");
    assert!(run.status.success(), "mke2fs {options}: {}", String::from_utf8_lossy(&run.stderr));
    fs::read(path).unwrap()
}

/// Runs `e2fsck` with `words` on an image; its exit status and what it said.
pub fn e2fsck(image: &Path, words: &str) -> (i32, String) {
    let run = Command::new("e2fsck").args(words.split_whitespace()).arg(image).output();
    let run = run.expect("e2fsck runs");
    let said = [run.stdout, run.stderr].concat();
    (run.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

/// Fails unless `e2fsck -fn` finds nothing to say of a file system.
pub fn is_clean(bytes: &[u8], what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, bytes).unwrap();
    let (code, said) = e2fsck(&path, "-fn");
    if code != 0 || said.contains("Fix?") || said.contains("IGNORED") {
        let kept = std::env::temp_dir().join("vdisk-broken-image");
        let _ = fs::copy(&path, &kept);
        panic!("{what}: e2fsck -fn ends with {code} ({}):\n{said}", kept.display());
    }
}
