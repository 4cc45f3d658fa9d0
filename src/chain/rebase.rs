//! Putting a disk on another base, or on none.

use std::io::IoSliceMut;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::clone::Base;
use super::merge::Progress;
use super::open::{OpenOptions, open, open_image};
use super::snapshot::{open_head, unprotected};
use super::tree::same_file;
use super::{Chain, Format, gate, parent, queue, witness};
use crate::block::{BlockDevice, BlockExtent, BlockStatus};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Identity;

/// Bytes that are compared or copied at a time.
const CHUNK: u64 = 1 << 20;
/// How far ahead a disk is asked what it holds, in bytes and in extents.
const WINDOW: u64 = 1 << 30;
const AHEAD: usize = 64;

/// What becomes of the contents when a disk gets another base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// They stay: what the bases differ in is copied into the disk first.
    Keep,
    /// Only the name of the base changes: for a base that was moved, or is to be taken as it is.
    Trust,
}

/// Puts the disk at `path` on the base at `base`.
///
/// # Errors
/// [`ErrorKind::InUse`] names who holds the disk or writes to the base.
pub fn rebase(
    path: &Path,
    base: &Path,
    contents: Contents,
    progress: &mut Progress<'_>,
) -> Result<()> {
    drop(open_head(path)?);
    let base = Base::seal(base)?;
    base.refuse_below(path)?;
    if contents == Contents::Keep {
        let disk = open(path, &OpenOptions::writable())?;
        let new = open(base.path(), &OpenOptions { unprotected: true, ..OpenOptions::default() })?;
        adopt_differences(&disk, &new, progress)?;
        disk.flush()?;
    }
    let head = open_head(path)?;
    let mut identity = head.image.identity()?;
    identity.backing = Some(base.backing_for(path)?);
    if let Some(label) = &mut identity.label {
        label.parent = Some(base.parent());
    }
    head.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

/// Records what the layers below the disk at `path` are now: wherever one is not the one that the
/// layer above it was made on, or stands elsewhere. Returns what was recorded, for people.
///
/// # Errors
/// [`ErrorKind::InUse`] names who holds one of the layers.
pub fn accept_base(path: &Path) -> Result<Vec<String>> {
    let options = OpenOptions { accept_base: true, ..OpenOptions::default() };
    let chain = open(path, &options)?;
    let layers: Vec<PathBuf> = chain.all_layers().into_iter().map(|layer| layer.path).collect();
    drop(chain);
    let mut recorded = Vec::new();
    // From the base up: to record something in a layer changes that layer's file.
    for pair in layers.windows(2).rev() {
        let [child, below] = pair else { continue };
        recorded.extend(accept(child, below)?);
    }
    Ok(recorded)
}

/// Records in `child` what `below` is, unless it knows.
fn accept(child: &Path, below: &Path) -> Result<Option<String>> {
    let look = OpenOptions { unprotected: true, ..OpenOptions::default() };
    let upper = open_image(child, &look)?;
    let identity = upper.image.identity()?;
    if identity.label.is_none() {
        return Ok(None);
    }
    let lower = open_image(below, &OpenOptions { format: declared(&identity)?, ..look })?;
    let change = parent::change(&identity, &lower, &lower.image.identity()?)?;
    let named = identity.backing.as_ref().and_then(|b| gate::resolve(child, &b.name).ok());
    let moved = !named.is_some_and(|named| same_file(&named, below));
    drop((upper, lower));
    if change.is_none() && !moved {
        return Ok(None);
    }
    let base = Base::seal_as(below, declared(&identity)?)?;
    witness::keeping_time(child, || {
        let open = open_image(child, &unprotected())?;
        let mut identity = open.image.identity()?;
        identity.backing = Some(base.backing_for(child)?);
        if let Some(label) = &mut identity.label {
            label.parent = Some(base.parent());
        }
        open.image.set_identity(&identity).map_err(|e| e.at_path(child))
    })?;
    let what = change.map_or("it is where it was found now".to_owned(), |change| change.what);
    Ok(Some(format!("{}: '{}' is on it as it is now: {what}", below.display(), child.display())))
}

/// The format that a layer declares for the one below it.
fn declared(identity: &Identity) -> Result<Option<Format>> {
    let format = identity.backing.as_ref().and_then(|b| b.format.as_deref());
    format.map(Format::from_name).transpose()
}

/// Copies all that the disk at `path` shows of its base into the disk, which then stands alone.
pub fn flatten(path: &Path, progress: &mut Progress<'_>) -> Result<()> {
    drop(open_head(path)?);
    let disk = open(path, &OpenOptions::writable())?;
    let size = disk.size();
    // Found ahead of the threads that copy it, in order.
    let (mut at, mut found) = (0, Vec::new().into_iter());
    let next = || loop {
        let Some(extent) = found.next() else {
            if at >= size {
                return Ok(None);
            }
            let extents = disk.extents(at, (size - at).min(WINDOW), AHEAD)?;
            at = extents.last().map_or(size, |last| last.offset + last.len);
            found = pieces(extents).into_iter();
            continue;
        };
        return told(progress, extent.start, size).map(|()| Some(extent));
    };
    queue::run(queue::threads(), next, |piece: Range<u64>, _, _| {
        disk.adopt(piece.start, piece.end - piece.start)
    })?;
    disk.flush()?;
    let head = disk.head();
    let mut identity = head.image.identity()?;
    identity.backing = None;
    if let Some(label) = &mut identity.label {
        label.parent = None;
    }
    head.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

/// The parts of it that hold data, each for one thread.
fn pieces(extents: Vec<BlockExtent>) -> Vec<Range<u64>> {
    let data = extents.into_iter().filter(|extent| extent.status == BlockStatus::Data);
    data.flat_map(|extent| {
        let end = extent.offset + extent.len;
        // To a boundary: no cluster is two threads' matter.
        let starts = std::iter::successors(Some(extent.offset), move |at| {
            Some(at - at % CHUNK + CHUNK).filter(|at| *at < end)
        });
        starts.map(move |at| at..(at - at % CHUNK + CHUNK).min(end))
    })
    .collect()
}

fn told(progress: &mut Progress<'_>, done: u64, total: u64) -> Result<()> {
    if progress(done, total) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Interrupted, "interrupted; the disk is as it was"))
}

/// Copies into `disk` what it shows of its base wherever `new` shows something else.
fn adopt_differences(disk: &Chain, new: &Chain, progress: &mut Progress<'_>) -> Result<()> {
    let size = disk.size();
    let mut steps = (0..size).step_by(CHUNK as usize);
    let next = || {
        let Some(at) = steps.next() else { return Ok(None) };
        told(progress, at, size).map(|()| Some(at))
    };
    queue::run(queue::threads(), next, |at: u64, _, buf| {
        adopt_difference(disk, new, (at, (size - at).min(CHUNK)), buf)
    })
}

fn adopt_difference(
    disk: &Chain,
    new: &Chain,
    (at, len): (u64, u64),
    buf: &mut Vec<u8>,
) -> Result<()> {
    let shown = new.size().saturating_sub(at).min(len);
    if is_zero(disk, at, len)? && is_zero(new, at, shown)? {
        return Ok(());
    }
    buf.resize(2 * len as usize, 0);
    let (ours, theirs) = buf.split_at_mut(len as usize);
    disk.read_at(at, &mut [IoSliceMut::new(ours)])?;
    let (theirs_shown, past) = theirs.split_at_mut(shown as usize);
    new.read_at(at, &mut [IoSliceMut::new(theirs_shown)])?;
    past.fill(0);
    let step = disk.head().image.granularity().bytes().clamp(512, CHUNK) as usize;
    for (number, (a, b)) in ours.chunks(step).zip(theirs.chunks(step)).enumerate() {
        if a != b {
            disk.adopt(at + (number * step) as u64, a.len() as u64)?;
        }
    }
    Ok(())
}

fn is_zero(disk: &Chain, at: u64, len: u64) -> Result<bool> {
    if len == 0 {
        return Ok(true);
    }
    let first = disk.extents(at, len, 1)?;
    Ok(first.first().is_some_and(|e| e.status == BlockStatus::Zero && e.len >= len))
}
