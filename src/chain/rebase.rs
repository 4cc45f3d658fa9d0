//! Putting a disk on another base, or on none.

use std::io::IoSliceMut;
use std::path::{Path, PathBuf};

use super::clone::Base;
use super::merge::Progress;
use super::open::{OpenOptions, open, open_image};
use super::snapshot::{open_head, unprotected};
use super::tree::same_file;
use super::{Chain, Format, gate, parent, witness};
use crate::block::{BlockDevice, BlockStatus};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Identity;

/// Bytes that are compared or copied at a time.
const CHUNK: u64 = 1 << 20;

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
    let mut at = 0;
    while at < size {
        for extent in disk.extents(at, size - at, 64)? {
            if extent.status == BlockStatus::Data {
                adopt(&disk, extent.offset, extent.len, size, progress)?;
            }
            at = extent.offset + extent.len;
        }
    }
    disk.flush()?;
    let head = disk.head();
    let mut identity = head.image.identity()?;
    identity.backing = None;
    if let Some(label) = &mut identity.label {
        label.parent = None;
    }
    head.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

fn adopt(disk: &Chain, at: u64, len: u64, size: u64, progress: &mut Progress<'_>) -> Result<()> {
    for from in (at..at + len).step_by(CHUNK as usize) {
        disk.adopt(from, (at + len - from).min(CHUNK))?;
        if !progress(from, size) {
            return Err(Error::new(ErrorKind::Interrupted, "interrupted; the disk is as it was"));
        }
    }
    Ok(())
}

/// Copies into `disk` what it shows of its base wherever `new` shows something else.
fn adopt_differences(disk: &Chain, new: &Chain, progress: &mut Progress<'_>) -> Result<()> {
    let size = disk.size();
    let unit = disk.head().image.granularity();
    let (mut ours, mut theirs) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    for at in (0..size).step_by(CHUNK as usize) {
        let len = (size - at).min(CHUNK);
        if is_zero(disk, at, len)? && is_zero(new, at, len.min(new.size().saturating_sub(at)))? {
            continue;
        }
        let (ours, theirs) = (&mut ours[..len as usize], &mut theirs[..len as usize]);
        disk.read_at(at, &mut [IoSliceMut::new(ours)])?;
        theirs.fill(0);
        let shown = new.size().saturating_sub(at).min(len) as usize;
        if shown > 0 {
            new.read_at(at, &mut [IoSliceMut::new(&mut theirs[..shown])])?;
        }
        let step = unit.bytes().clamp(512, CHUNK) as usize;
        for (number, (a, b)) in ours.chunks(step).zip(theirs.chunks(step)).enumerate() {
            if a != b {
                disk.adopt(at + (number * step) as u64, a.len() as u64)?;
            }
        }
        if !progress(at, size) {
            return Err(Error::new(ErrorKind::Interrupted, "interrupted; the disk is as it was"));
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
