//! Putting a disk on another base, or on none.

use std::io::IoSliceMut;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::block::{BlockDevice, BlockExtent, BlockStatus};
use crate::chain::Chain;
use crate::change::base::clone::Base;
use crate::change::base::marks::Bases;
use crate::change::open::{open, take_head};
use crate::change::run::bitmaps;
use crate::change::run::layer::unprotected;
use crate::copy::queue;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Identity};
use crate::open::gate::same_file;
use crate::open::{Format, OpenOptions, fingerprint, gate, open_image, parent};
use crate::progress::Progress;
use crate::storage::{Turn, follow};

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

/// Puts the disk at `path` on the base at `base`, which is opened as `how` says.
///
/// # Errors
/// [`ErrorKind::InUse`] names who holds the disk or writes to the base.
pub fn rebase(
    path: &Path,
    base: &Path,
    how: &OpenOptions,
    contents: Contents,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let path = &follow(path)?;
    let _turn = Turn::take(path)?;
    drop(take_head(path)?);
    let base = Base::seal_with(base, how, std::slice::from_ref(path))?;
    base.refuse_below(path)?;
    if contents == Contents::Keep {
        let disk = open(path, &OpenOptions { same_contents: true, ..OpenOptions::writable() })?;
        let new = base.open()?;
        copy_differences(&disk, &new, progress)?;
        disk.flush()?;
    }
    let head = take_head(path)?;
    if contents == Contents::Trust {
        bitmaps::count_all(&*head.image).map_err(|e| e.at_path(path))?;
    }
    let mut identity = head.image.identity()?;
    let backing = base.backing_for(path)?;
    let reached = gate::reaches(path, &backing.name, base.path());
    if !reached {
        // Only its label shows whoever opens it next that it may go there.
        identity.label.get_or_insert_default();
    }
    let before = Bases::of(path)?;
    let disk = identity.label.as_ref().map_or(before.disk(), |label| label.disk);
    let parent = base.mark(disk, path)?;
    identity.backing = Some(backing);
    if let Some(label) = &mut identity.label {
        label.parent = Some(parent);
    }
    let done = head.image.set_identity(&identity).map_err(|e| e.at_path(path));
    drop(head);
    if done.is_ok() {
        base.used();
        before.leave(path);
    } else {
        base.unmark(disk, path);
    }
    done
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
    if !recorded.is_empty() && layers.len() > 1 {
        fingerprint::keeping_time(path, || {
            let head = open_image(path, &unprotected())?;
            bitmaps::count_all(&*head.image).map_err(|e| e.at_path(path))
        })?;
    }
    Ok(recorded)
}

/// Records in `child` what `below` is, unless it knows.
fn accept(child: &Path, below: &Path) -> Result<Option<String>> {
    let look = OpenOptions { unprotected: true, ..OpenOptions::default() };
    let upper = open_image(child, &look)?;
    let identity = upper.image.identity()?;
    let lower = open_image(below, &OpenOptions { format: declared(&identity)?, ..look })?;
    let under = lower.image.identity()?;
    // The user has just vouched for it, and would have to each time.
    let stranger = upper.format == Format::Qcow2
        && !identity.backing.as_ref().is_some_and(|b| gate::reaches(child, &b.name, below))
        && !parent::vouches(&identity, &lower, &under)?;
    if identity.label.is_none() && !stranger {
        return Ok(None);
    }
    let change = parent::change(&identity, &lower, &under)?;
    let named = identity.backing.as_ref().and_then(|b| gate::resolve(child, &b.name).ok());
    let moved = !named.is_some_and(|named| same_file(&named, below));
    drop((upper, lower));
    if change.is_none() && !moved && !stranger {
        return Ok(None);
    }
    let children = [child.to_path_buf()];
    let base = Base::seal_as(below, declared(&identity)?, &children)?;
    fingerprint::keeping_time(child, || {
        let open = open_image(child, &unprotected())?;
        let mut identity = open.image.identity()?;
        let disk = identity.label.as_ref().map_or(Id::nil(), |label| label.disk);
        let parent = base.mark_for(disk, child)?;
        identity.backing = Some(base.backing_for(child)?);
        identity.label.get_or_insert_default().parent = Some(parent);
        open.image.set_identity(&identity).map_err(|e| e.at_path(child))
    })?;
    base.used();
    let what = change.map_or_else(
        || if moved { "it is where it was found now" } else { "it may stand there" }.to_owned(),
        |change| change.what,
    );
    Ok(Some(format!("{}: '{}' is on it as it is now: {what}", below.display(), child.display())))
}

/// The format that a layer declares for the one below it.
fn declared(identity: &Identity) -> Result<Option<Format>> {
    let format = identity.backing.as_ref().and_then(|b| b.format.as_deref());
    format.map(Format::from_name).transpose()
}

/// Copies all that the disk at `path` shows of its base into the disk, which then stands alone.
pub fn flatten(path: &Path, progress: &mut Progress<'_>) -> Result<()> {
    let path = &follow(path)?;
    let _turn = Turn::take(path)?;
    drop(take_head(path)?);
    let disk = open(path, &OpenOptions { same_contents: true, ..OpenOptions::writable() })?;
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
    queue::unordered(queue::threads(), next, |piece: Range<u64>, _| {
        disk.copy_up(piece.start, piece.end - piece.start)
    })?;
    disk.flush()?;
    let before = Bases::of(path)?;
    let head = disk.head();
    let mut identity = head.image.identity()?;
    identity.backing = None;
    if let Some(label) = &mut identity.label {
        label.parent = None;
    }
    head.image.set_identity(&identity).map_err(|e| e.at_path(path))?;
    before.leave(path);
    Ok(())
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
fn copy_differences(disk: &Chain, new: &Chain, progress: &mut Progress<'_>) -> Result<()> {
    let size = disk.size();
    let mut steps = (0..size).step_by(CHUNK as usize);
    let next = || {
        let Some(at) = steps.next() else { return Ok(None) };
        told(progress, at, size).map(|()| Some(at))
    };
    queue::unordered(queue::threads(), next, |at: u64, buf| {
        copy_difference(disk, new, at..size.min(at + CHUNK), buf)
    })
}

fn copy_difference(disk: &Chain, new: &Chain, range: Range<u64>, buf: &mut Vec<u8>) -> Result<()> {
    let (at, len) = (range.start, range.end - range.start);
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
            disk.copy_up(at + (number * step) as u64, a.len() as u64)?;
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
