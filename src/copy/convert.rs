//! Copying a flat disk into a new one: only what is not zero is written.
//!
//! Several threads read pieces, so that reads and compression overlap with writes.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::{BlockDevice, BlockExtent, BlockStatus, is_zero};
use crate::chain::{Chain, Layer};
use crate::copy::queue;
use crate::copy::queue::PIECE;
use crate::copy::room;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::raw;
use crate::image::{Bitmap, Image};
use crate::open::Format;
use crate::open::create::refuse_existing;
use crate::qcow2::{self, CreateOptions};
use crate::storage::{Draft, FileStorage, Storage, Unfinished};

/// How far ahead the source is asked where it stores anything.
const WINDOW: u64 = 64 << 20;
/// Zeroes are found in blocks of this many bytes.
const BLOCK: u64 = 4096;
/// Shorter stretches of zeroes are written along with what surrounds them.
const MIN_GAP: u64 = 64 << 10;

/// How to copy.
#[derive(Clone, Copy)]
pub struct Copying<'a> {
    /// Compress every cluster for which that saves space.
    pub compress: bool,
    /// The new disk's bitmaps, with what they say.
    pub bitmaps: &'a [Bitmap],
    /// Hears how many bytes of the disk are done, from many threads.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// What to make.
#[derive(Debug, Clone)]
pub enum Target {
    /// A raw file.
    Raw,
    /// A qcow2 file; its size is the source's.
    Qcow2(Box<CreateOptions>),
}

/// Copies the contents of `source` into a new file at `path`, which must not exist. The file gets
/// its name when it is whole and durable; until then nothing is there.
///
/// # Errors
/// [`ErrorKind::Exists`] where something has that name; [`ErrorKind::Unsupported`] for compression
/// into a format that has none.
pub fn convert(
    source: &dyn BlockDevice,
    path: &Path,
    target: &Target,
    how: &Copying<'_>,
) -> Result<()> {
    refuse_existing(path)?;
    let draft = Draft::new(path)?;
    fill(source, draft.file(), draft.storage(), target, how).map_err(|e| e.at_path(path))?;
    draft.publish()
}

/// Copies the contents of `source` over whatever stands on a block device, durably. What it holds
/// behind them stays, where the target is raw. Until all is there nobody finds a disk on it.
///
/// # Errors
/// [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace), and nothing written, where the device is too
/// small; of compressed clusters nobody knows that before.
pub fn convert_onto(
    source: &dyn BlockDevice,
    device: &Arc<FileStorage>,
    target: &Target,
    how: &Copying<'_>,
) -> Result<()> {
    check(source, target, how).map_err(|e| e.at_path(device.path()))?;
    let have = device.len()?;
    let needed = match target {
        Target::Raw => source.size(),
        Target::Qcow2(_) if how.compress => 0,
        Target::Qcow2(options) => {
            let most = room::needed(source, options, false)?;
            if most <= have { most } else { room::needed(source, options, true)? }
        }
    };
    if needed > have {
        let message = format!(
            "is a device of {have} bytes, and the copy takes {needed} at least: nothing was written"
        );
        return Err(Error::new(ErrorKind::NoSpace, message).at_path(device.path()));
    }
    let written = || {
        let bytes = Arc::new(Unfinished::begin(device.clone())?);
        fill(source, device, bytes.clone(), target, how)?;
        bytes.finish()
    };
    written().map_err(|e| e.at_path(device.path()))
}

/// Refuses what cannot be made, before anything is lost for it.
fn check(source: &dyn BlockDevice, target: &Target, how: &Copying<'_>) -> Result<()> {
    match target {
        Target::Raw if how.compress => Err(Error::unsupported("raw files are not compressed")),
        Target::Raw => Ok(()),
        Target::Qcow2(options) => {
            CreateOptions { size: source.size(), ..(**options).clone() }.check()
        }
    }
}

/// Makes the target in `bytes`, which are `file`'s, and copies into it.
fn fill(
    source: &dyn BlockDevice,
    file: &Arc<FileStorage>,
    bytes: Arc<dyn Storage>,
    target: &Target,
    how: &Copying<'_>,
) -> Result<()> {
    check(source, target, how)?;
    let size = source.size();
    let (format, image): (_, Arc<dyn Image>) = match target {
        Target::Raw => {
            file.set_len(size)?;
            (Format::Raw, Arc::new(raw::Image::open(bytes, false)?))
        }
        Target::Qcow2(options) => {
            let options = CreateOptions { size, ..(**options).clone() };
            (Format::Qcow2, Arc::new(qcow2::create(bytes, &options)?))
        }
    };
    let path = file.path().to_path_buf();
    let chain = Chain::new(Layer { path, format, image, file: file.clone() }, vec![], 0);
    copy_into(source, &chain, how)?;
    chain.flush()?;
    // The image writes its last tables when it is dropped: before a file gets its name.
    chain.head().image.add_to_bitmaps(how.bitmaps)
}

/// Copies the contents of `source` into `target`, which was just made and is at least as large. What
/// reads as zeroes is not written where the target reads so from the beginning. Not durable before
/// `target` is flushed.
pub fn copy_into(source: &dyn BlockDevice, target: &Chain, how: &Copying<'_>) -> Result<()> {
    if target.size() < source.size() {
        return Err(Error::invalid("the target of a copy is smaller than its source"));
    }
    let head = target.head().image;
    let cluster = head.cluster().bytes();
    let copy = Copy {
        source,
        target,
        compress: how.compress,
        writes_zeroes: !head.starts_zeroed(),
        gap: u64::from(target.block_size()).clamp(BLOCK, MIN_GAP),
        done: AtomicU64::new(0),
        progress: how.progress,
    };
    // Compression takes long: small pieces keep all threads at it.
    let mut pieces = Pieces::new(if how.compress { cluster } else { PIECE.max(cluster) });
    let next = || pieces.take(source);
    let read = |piece, buf: &mut Vec<u8>| copy.read(piece, buf);
    queue::run(queue::threads(), next, read, |(piece, found), buf| copy.write(&piece, found, buf))
}

/// One copy under way.
struct Copy<'a> {
    source: &'a dyn BlockDevice,
    target: &'a Chain,
    /// Every piece is a cluster, and compressed.
    compress: bool,
    /// What reads as zeroes is written: the target may hold anything.
    writes_zeroes: bool,
    /// Shorter runs of zeroes are written.
    gap: u64,
    done: AtomicU64,
    progress: &'a (dyn Fn(u64) + Sync),
}

/// What a piece has to write.
enum Found {
    /// The parts of its bytes that hold anything; the rest is zero.
    Runs(Vec<Range<usize>>),
    /// All its bytes as one cluster; compressed, where that makes it smaller.
    Cluster(Option<Vec<u8>>),
}

impl Copy<'_> {
    /// Reads a piece, and finds out what of it has to be written.
    fn read(&self, piece: Piece, buf: &mut Vec<u8>) -> Result<(Piece, Found)> {
        let Range { start, end } = piece.range;
        let len = (end - start) as usize;
        buf.resize(buf.len().max(len), 0);
        let bytes = buf.get_mut(..len).unwrap_or_default();
        if !bytes.is_empty() {
            self.source.read_at(start, &mut [IoSliceMut::new(bytes)])?;
        }
        let found = match self.compress {
            false => Found::Runs(data_runs(bytes, self.gap as usize)),
            true if is_zero(bytes) => Found::Runs(vec![]),
            true => Found::Cluster(self.target.pack(start, bytes)?),
        };
        Ok((piece, found))
    }

    fn write(&self, piece: &Piece, found: Found, buf: &[u8]) -> Result<()> {
        let Range { start, end } = piece.range;
        let mut zero_from = start - piece.skipped;
        match found {
            Found::Cluster(packed) => {
                self.zeroes(zero_from, start)?;
                let bytes = buf.get(..(end - start) as usize).unwrap_or_default();
                self.target.write_packed(start, bytes, packed.as_deref())?;
            }
            Found::Runs(runs) => {
                for run in runs {
                    let at = start + run.start as u64;
                    self.zeroes(zero_from, at)?;
                    zero_from = start + run.end as u64;
                    self.target.write_at(at, &[IoSlice::new(buf.get(run).unwrap_or_default())])?;
                }
                self.zeroes(zero_from, end)?;
            }
        }
        let len = end - start + piece.skipped;
        (self.progress)(self.done.fetch_add(len, Ordering::Relaxed) + len);
        Ok(())
    }

    fn zeroes(&self, from: u64, to: u64) -> Result<()> {
        if !self.writes_zeroes || from >= to {
            return Ok(());
        }
        self.target.write_zeroes(from, to - from, true)
    }
}

/// The runs of blocks that are not zero; runs that are less than `gap` apart are one.
fn data_runs(bytes: &[u8], gap: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    for block in bytes.chunks(BLOCK as usize) {
        let end = start + block.len();
        if !is_zero(block) {
            match runs.last_mut() {
                Some(run) if start - run.end < gap => run.end = end,
                _ => runs.push(start..end),
            }
        }
        start = end;
    }
    runs
}

/// Gives out the pieces of the source that are to be copied, in order.
struct Pieces {
    piece: u64,
    /// Where the next piece may begin.
    next: u64,
    /// How far the source was asked.
    asked: u64,
    window: u64,
    /// Data known ahead, from `next` to `asked`.
    ahead: std::collections::VecDeque<BlockExtent>,
}

/// What one thread copies next.
struct Piece {
    range: Range<u64>,
    /// Bytes before it that need no copy.
    skipped: u64,
}

impl Pieces {
    fn new(piece: u64) -> Pieces {
        Pieces { piece, next: 0, asked: 0, window: WINDOW, ahead: Default::default() }
    }

    fn take(&mut self, source: &dyn BlockDevice) -> Result<Option<Piece>> {
        let from = self.next;
        loop {
            while let Some(data) = self.ahead.front() {
                let end = data.offset + data.len;
                if end <= self.next {
                    self.ahead.pop_front();
                    continue;
                }
                // Pieces begin and end on boundaries of their size, and so of clusters.
                let start = data.offset.max(self.next);
                let start = (start - start % self.piece).max(self.next);
                let end = (start - start % self.piece + self.piece).min(source.size());
                self.next = end;
                return Ok(Some(Piece { range: start..end, skipped: start - from }));
            }
            if self.asked >= source.size() {
                let skipped = source.size().saturating_sub(from);
                self.next = source.size();
                let rest = Piece { range: self.next..self.next, skipped };
                return Ok((skipped > 0).then_some(rest));
            }
            self.ask(source)?;
        }
    }

    /// Asks the source for data in its next window; windows grow while nothing is found.
    fn ask(&mut self, source: &dyn BlockDevice) -> Result<()> {
        let end = self.asked.saturating_add(self.window).min(source.size());
        while self.asked < end {
            let found = source.extents(self.asked, end - self.asked, 1024)?;
            let Some(last) = found.last() else {
                return Err(Error::invalid("the source of a copy does not say what it holds"));
            };
            self.asked = last.offset + last.len;
            self.ahead.extend(found.iter().filter(|e| e.status == BlockStatus::Data));
        }
        self.window = if self.ahead.is_empty() { self.window.saturating_mul(2) } else { WINDOW };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_gaps_are_written_and_long_ones_are_not() {
        let mut bytes = vec![0; 10 * 4096 + 100];
        for at in [4096, 3 * 4096 + 7, 9 * 4096, 10 * 4096 + 99] {
            bytes[at] = 1;
        }
        assert_eq!(data_runs(&bytes, 8192), [4096..4 * 4096, 9 * 4096..10 * 4096 + 100]);
        assert_eq!(data_runs(&bytes, 4096).len(), 3);
        assert!(data_runs(&[0; 9999], 4096).is_empty());
    }
}
