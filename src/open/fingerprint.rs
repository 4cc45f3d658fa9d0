//! Knowing a base again by its files, where its label does not tell all: a raw file, a foreign
//! format and a qcow2 image of version 2 cannot vouch for their contents, and QEMU's commit writes
//! into a base without taking away the mark by which its header vouches for them.
//!
//! A clone remembers the length, the times and a digest of its base's files. While length and times
//! are the same, nothing else is read: every write sets them, and they are taken only when they are
//! old enough that the next write gets others. (Of a base that vouches for itself only the time of
//! the last write counts, and what this program changes in its header leaves that as it was.)
//!
//! Where the times differ, the digest decides. Up to [`BUDGET`] bytes of data it speaks for all of
//! them, wherever they stand between holes, so that a file that was only touched or copied is the
//! same file. Of more data it speaks for where they stand (the first [`MAX_EXTENTS`] stretches) and
//! for [`PARTS`] parts of them, spread evenly: such a base is taken to be the same only where the
//! time of its last write is the same too. What cannot be noticed is a write behind which somebody
//! sets the old time again and misses all the parts, and a write to a block device, which has no
//! times, that misses them.

use std::fs::{self, File, FileTimes, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::block::is_zero;
use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{BaseStamp, FileStamp};
use crate::open::{Format, data_file, foreign};
use crate::storage::{FileStorage, Storage};

/// The most bytes of a file's data that are all read.
const BUDGET: u64 = 8 << 20;
/// How many parts are read of a file that has more.
const PARTS: u64 = 64;
/// The most stretches of data that are asked for in each file.
const MAX_EXTENTS: usize = 4096;
/// Bytes of a part.
const PART: u64 = 16 << 10;
/// Bytes that are left out of a whole digest where they are all zero.
const BLOCK: u64 = 4096;
/// How coarse a host's clock for file times is.
const TICK: Duration = Duration::from_millis(20);
/// The same where a file's times say only whole seconds.
const COARSE_TICK: Duration = Duration::from_millis(2100);

/// How a base compares with what is remembered of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing speaks against it being the same.
    Same,
    /// It is longer or shorter.
    Length,
    /// Its contents are others.
    Contents,
    /// It was written, or touched, and what was compared does not speak for all contents.
    Unsure,
}

/// What a clone should remember of `layer`, whose header vouches for the contents or does not.
///
/// # Errors
/// [`ErrorKind::InUse`] where it is being written.
pub(crate) fn of(layer: &Layer, vouched: bool) -> Result<BaseStamp> {
    /// How often it is looked again: another command may just be marking the layer, and when it is done
    /// the file has its time back.
    const LOOKS: usize = 20;
    for _ in 1..LOOKS {
        match look(layer, vouched) {
            Err(e) if e.kind() == ErrorKind::InUse => thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    look(layer, vouched)
}

fn look(layer: &Layer, vouched: bool) -> Result<BaseStamp> {
    let files = Files::of(layer)?;
    let mut seen = files.seen()?;
    if seen.wait_for_tick(vouched) {
        // Another write may have come meanwhile, which would get a time of its own.
        seen = files.seen()?;
    }
    let (whole, digest) = files.digest()?;
    if files.seen()? != seen {
        let message = "is being written by another program: a clone needs a base that stays";
        return Err(Error::new(ErrorKind::InUse, message).at_path(&layer.path));
    }
    let Seen { len, modified, changed, .. } = seen;
    Ok(BaseStamp { len, modified, changed, whole, follows: false, digest })
}

/// The same as a layer says it of itself.
pub(crate) fn file_stamp(layer: &Layer, stamp: &BaseStamp) -> Result<FileStamp> {
    let inode = layer.file.identity()?.1;
    let BaseStamp { len, modified, whole, digest, .. } = *stamp;
    Ok(FileStamp { len, modified, inode, whole, digest })
}

/// Whether the files of `layer`, which vouches for itself, are as it says. A copy of a file has
/// another time and is the same all the same, as far as it was compared.
pub(crate) fn is_as(layer: &Layer, stamp: &FileStamp) -> Result<bool> {
    let files = Files::of(layer)?;
    let seen = files.seen()?;
    if seen.len != stamp.len {
        return Ok(false);
    }
    if seen.modified == stamp.modified && !seen.device {
        return Ok(true);
    }
    let (whole, digest) = files.digest()?;
    let copied = layer.file.identity()?.1 != stamp.inode;
    Ok((whole, digest) == (stamp.whole, stamp.digest) && (whole || copied))
}

/// Compares `layer` with what is remembered of it.
pub(crate) fn compare(layer: &Layer, vouched: bool, known: &BaseStamp) -> Result<Verdict> {
    let files = Files::of(layer)?;
    let seen = files.seen()?;
    if seen.len != known.len {
        return Ok(Verdict::Length);
    }
    let same_write = seen.modified == known.modified;
    if same_write && !seen.device && (vouched || seen.changed == known.changed) {
        return Ok(Verdict::Same);
    }
    let (whole, digest) = files.digest()?;
    Ok(match digest == known.digest && whole == known.whole {
        false => Verdict::Contents,
        true if whole || same_write => Verdict::Same,
        true => Verdict::Unsure,
    })
}

/// Whether the files of `layer` hold what is remembered of them, whatever their times say.
pub(crate) fn has_contents(layer: &Layer, known: &BaseStamp) -> Result<bool> {
    let files = Files::of(layer)?;
    Ok(files.seen()?.len == known.len && files.digest()? == (known.whole, known.digest))
}

/// When the files of `layer` were last written, in nanoseconds since 1970.
pub(crate) fn modified(layer: &Layer) -> Result<i64> {
    Ok(Files::of(layer)?.seen()?.modified)
}

/// Runs what changes the file at `path` and not what it shows, and gives it the time of its last
/// write back: its clones go on taking it for what it is.
pub fn keeping_time<T>(path: &Path, change: impl FnOnce() -> Result<T>) -> Result<T> {
    let failed = |e| Error::io("could not be examined", e).at_path(path);
    let before = fs::metadata(path).and_then(|meta| meta.modified()).map_err(failed)?;
    let done = change()?;
    let times = FileTimes::new().set_modified(before);
    // Where that fails, its clones ask the user what to make of it.
    let _ = File::open(path).and_then(|file| file.set_times(times));
    Ok(done)
}

/// A time for people.
pub(crate) fn time(nanoseconds: i64) -> String {
    let stamp = jiff::Timestamp::from_nanosecond(nanoseconds.into());
    stamp.map_or("at an unknown time".to_owned(), |t| {
        t.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
    })
}

/// What the host says of files together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    len: u64,
    modified: i64,
    changed: i64,
    device: bool,
    /// Whether the times have more than seconds.
    fine: bool,
}

impl Seen {
    fn add(&mut self, meta: &Metadata, len: u64) {
        self.len = self.len.saturating_add(len);
        if meta.file_type().is_block_device() {
            self.device = true;
            return;
        }
        let nanoseconds = |s: i64, ns: i64| s.saturating_mul(1_000_000_000).saturating_add(ns);
        self.modified = self.modified.max(nanoseconds(meta.mtime(), meta.mtime_nsec()));
        self.changed = self.changed.max(nanoseconds(meta.ctime(), meta.ctime_nsec()));
        self.fine |= meta.ctime_nsec() != 0 || meta.mtime_nsec() != 0;
    }

    /// Waits until the next write gets another time than the last one; whether it waited.
    fn wait_for_tick(&self, vouched: bool) -> bool {
        let tick = if self.fine { TICK } else { COARSE_TICK };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let last = if vouched { self.modified } else { self.modified.max(self.changed) };
        let last = Duration::from_nanos(last.max(0) as u64);
        // A time in the future will not pass soon.
        let wait = (last + tick).saturating_sub(now).min(tick);
        if !wait.is_zero() && !self.device {
            thread::sleep(wait);
        }
        !wait.is_zero()
    }
}

/// The files that hold a layer.
struct Files {
    files: Vec<Arc<FileStorage>>,
    /// Bytes in front of the first one that say who the layer is, not what it shows.
    header: u64,
}

impl Files {
    fn of(layer: &Layer) -> Result<Files> {
        let mut files = vec![layer.file.clone()];
        let mut header = 0;
        match layer.format {
            Format::Qcow2 => {
                header = layer.image.cluster().bytes();
                files.extend(data_file::beside(layer)?);
            }
            Format::Vmdk => files.extend(foreign::further_files(layer)?),
            _ => {}
        }
        Ok(Files { files, header })
    }

    fn seen(&self) -> Result<Seen> {
        let mut seen = Seen { len: 0, modified: 0, changed: 0, device: false, fine: false };
        for file in &self.files {
            let meta = file.file().metadata();
            let meta =
                meta.map_err(|e| Error::io("could not be examined", e).at_path(file.path()))?;
            seen.add(&meta, file.len()?);
        }
        Ok(seen)
    }

    /// The digest of all files, and whether it speaks for all contents.
    fn digest(&self) -> Result<(bool, [u8; 16])> {
        let mut hash = Sha256::new();
        let (mut whole, mut skip) = (true, self.header);
        for file in &self.files {
            let map = Stretches::of(&**file, std::mem::take(&mut skip))?;
            hash.update(map.len.to_be_bytes());
            if map.complete && map.data <= BUDGET {
                hash_all(&**file, &map, &mut hash)?;
            } else {
                whole = false;
                hash_parts(&**file, &map, &mut hash)?;
            }
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&hash.finalize()[..16]);
        Ok((whole, digest))
    }
}

/// Where a file's data stand.
struct Stretches {
    len: u64,
    /// Where the part that is looked at begins: what is before it is no block's.
    from: u64,
    /// Begin and end of each stretch, in order.
    found: Vec<(u64, u64)>,
    /// Bytes of data in all that were found.
    data: u64,
    /// Whether all were found.
    complete: bool,
}

impl Stretches {
    /// Those from `at` on.
    fn of(storage: &dyn Storage, mut at: u64) -> Result<Stretches> {
        let len = storage.len()?;
        let mut all = Stretches { len, from: at, found: Vec::new(), data: 0, complete: true };
        while let Some((start, end)) = storage.next_data(at)? {
            if all.found.len() == MAX_EXTENTS || end <= start {
                all.complete = false;
                break;
            }
            all.found.push((start, end));
            all.data += end - start;
            at = end;
        }
        Ok(all)
    }

    /// The place in the file of the byte `number` of the data.
    fn place(&self, mut number: u64) -> Option<(u64, u64)> {
        for (start, end) in &self.found {
            if number < end - start {
                return Some((start + number, *end));
            }
            number -= end - start;
        }
        None
    }
}

/// All blocks that are not zero, each with its place: what is a hole makes no difference.
fn hash_all(storage: &dyn Storage, map: &Stretches, hash: &mut Sha256) -> Result<()> {
    let mut bytes = vec![0; PART as usize];
    // A block that holds the end of one stretch and the begin of the next is read once.
    let mut done = 0;
    for (start, end) in &map.found {
        let mut at = (start - start % BLOCK).max(done).max(map.from);
        while at < *end {
            let part = if at % BLOCK == 0 { PART } else { BLOCK - at % BLOCK };
            let to = end.next_multiple_of(BLOCK).min(at + part).min(map.len);
            let part = &mut bytes[..(to - at) as usize];
            storage.read_exact_at(at, part)?;
            for (number, block) in part.chunks(BLOCK as usize).enumerate() {
                if !is_zero(block) {
                    hash.update((at + number as u64 * BLOCK).to_be_bytes());
                    hash.update(block);
                }
            }
            (at, done) = (to, to);
        }
    }
    Ok(())
}

/// Where the data stand, and parts of them.
fn hash_parts(storage: &dyn Storage, map: &Stretches, hash: &mut Sha256) -> Result<()> {
    for (start, end) in &map.found {
        hash.update(start.to_be_bytes());
        hash.update(end.to_be_bytes());
    }
    let mut bytes = vec![0; PART as usize];
    for part in 0..PARTS {
        let number = (u128::from(map.data) * u128::from(part) / u128::from(PARTS)) as u64;
        let Some((at, end)) = map.place(number) else { break };
        let part = &mut bytes[..(end - at).min(PART) as usize];
        storage.read_exact_at(at, part)?;
        hash.update(part);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(
        dir: &tempfile::TempDir,
        name: &str,
        len: u64,
        data: &[(u64, &[u8])],
    ) -> Arc<FileStorage> {
        let file = FileStorage::create(&dir.path().join(name)).unwrap();
        file.set_len(len).unwrap();
        data.iter().for_each(|(at, bytes)| file.write_all_at(*at, bytes).unwrap());
        Arc::new(file)
    }

    fn digest(file: &Arc<FileStorage>) -> (bool, [u8; 16]) {
        Files { files: vec![file.clone()], header: 0 }.digest().unwrap()
    }

    #[test]
    fn a_small_file_is_known_by_all_its_bytes_whatever_is_a_hole() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, data: &[(u64, &[u8])]| digest(&file(&dir, name, 1 << 20, data));
        let one = of("one", &[(5000, b"contents"), (700_000, b"more")]);
        assert!(one.0);
        let dense = of("dense", &[(0, &[0; 1 << 20]), (5000, b"contents"), (700_000, b"more")]);
        assert_eq!(one, dense);
        assert_ne!(one, of("moved", &[(5001, b"contents"), (700_000, b"more")]));
        assert_ne!(one, of("other", &[(5000, b"contents"), (700_000, b"mora")]));
        assert_ne!(one, of("less", &[(5000, b"contents")]));
    }

    #[test]
    fn what_a_small_header_says_is_no_part_of_the_contents() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, header: &[u8], contents: &[u8]| {
            let file = file(&dir, name, 1 << 20, &[(0, header), (512, contents), (9000, b"more")]);
            Files { files: vec![file], header: 512 }.digest().unwrap()
        };
        let one = of("one", b"header", b"contents");
        assert_eq!(one, of("two", b"another", b"contents"));
        assert_ne!(one, of("three", b"header", b"Contents"));
    }

    #[test]
    fn a_large_file_is_known_by_parts_at_a_bounded_cost() {
        let dir = tempfile::tempdir().unwrap();
        let data = vec![7; 12 << 20];
        let far = (1 << 40) - (12 << 20);
        let large = file(&dir, "large", 1 << 40, &[(0, &data), (far, &data)]);
        let (whole, first) = digest(&large);
        assert!(!whole);
        large.write_all_at(far, b"in a part").unwrap();
        let (_, second) = digest(&large);
        assert_ne!(first, second);
        large.write_all_at(1 << 30, b"elsewhere").unwrap();
        assert_ne!(second, digest(&large).1, "it has another stretch of data");
    }
}
