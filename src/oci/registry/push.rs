//! A disk into a registry, as an image: what is there already is not sent again.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Told;
use super::client::{Access, Manifest, Registry};
use super::download::in_parallel;
use super::name::Name;
use crate::error::{Error, ErrorKind, Result};
use crate::oci::changes::Changes;
use crate::oci::digest::Digest;
use crate::oci::export::Exporting;
use crate::oci::store::Store;
use crate::oci::target::{MANIFEST, Scratch, Target};

/// Tries to send one blob.
const TRIES: u32 = 3;

/// What was sent.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// The manifest's digest.
    pub digest: String,
    /// Blobs that it has.
    pub blobs: usize,
    /// Those of them that were sent; the others were there.
    pub sent: usize,
    /// Those of them that another repository of the registry had.
    pub mounted: usize,
}

/// Sends a disk as the image of that name.
///
/// # Errors
/// [`ErrorKind::Denied`] where the registry does not know who sends it, or does not let him.
pub fn push(
    exporting: &Exporting<'_>,
    access: &Access,
    changes: &Changes,
    told: &Told<'_>,
) -> Result<Pushed> {
    let name = access.name();
    tagged(name)?;
    let registry = Registry::new(access, true)?;
    let dir = exporting.store.map_or_else(std::env::temp_dir, |store| store.dir().to_owned());
    let work = Scratch(dir.join(format!(".vdisk-push-{}", std::process::id())));
    let target = Target::passing(&work.0)?;
    let made = exporting.image(&target, changes, &mut |_| told(0, 0))?;
    let raw = std::fs::read(target.blob(made.manifest.0))
        .map_err(|e| Error::io("cannot be read", e).at_path(&work.0))?;
    let sending = Sending { registry: &registry, name, store: exporting.store, told };
    let blobs: Vec<Blob> = made
        .blobs
        .iter()
        .map(|(digest, size)| Blob { digest: *digest, size: *size, path: target.blob(*digest) })
        .collect();
    let (sent, mounted) = sending.blobs(&blobs)?;
    let manifest = Manifest { raw, media_type: MANIFEST.to_owned() };
    registry.put_manifest(&name.reference(), &manifest)?;
    Ok(Pushed { digest: made.manifest.0.to_string(), blobs: blobs.len(), sent, mounted })
}

/// Who pushes chooses a tag: the digest comes of what is pushed.
pub(super) fn tagged(name: &Name) -> Result<()> {
    match name.digest {
        Some(_) => Err(Error::invalid("is pushed to a tag: its digest follows from what it is")),
        None => Ok(()),
    }
}

/// A blob that is to be there.
pub(super) struct Blob {
    pub digest: Digest,
    pub size: u64,
    pub path: std::path::PathBuf,
}

pub(super) struct Sending<'a> {
    pub registry: &'a Registry,
    pub name: &'a Name,
    pub store: Option<&'a Store>,
    pub told: &'a Told<'a>,
}

impl Sending<'_> {
    /// Sends those of the blobs that are not there; returns how many were sent and mounted.
    pub(super) fn blobs(&self, blobs: &[Blob]) -> Result<(usize, usize)> {
        let mut seen = HashSet::new();
        let unique: Vec<&Blob> = blobs.iter().filter(|b| seen.insert(b.digest)).collect();
        let total = unique.iter().map(|b| b.size).sum();
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let (sent, mounted) = (AtomicU64::new(0), AtomicU64::new(0));
        let more = |bytes: u64| {
            let all = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            (self.told)(all, total) && !stop.load(Ordering::Relaxed)
        };
        let add = |count: &AtomicU64| {
            count.fetch_add(1, Ordering::Relaxed);
        };
        in_parallel(&unique, &stop, |blob| {
            if self.registry.has(blob.digest)? {
                more(blob.size);
            } else if self.mounted(blob.digest)? {
                more(blob.size);
                add(&mounted);
            } else {
                self.send(blob, &more)?;
                add(&sent);
            }
            Ok(())
        })?;
        let number = |count: AtomicU64| count.into_inner() as usize;
        Ok((number(sent), number(mounted)))
    }

    /// Takes a blob over from a repository of the same registry that an image in the store came from.
    fn mounted(&self, digest: Digest) -> Result<bool> {
        let Some(store) = self.store else { return Ok(false) };
        let text = digest.to_string();
        let mut tried = HashSet::new();
        for image in store.images()? {
            let has = image.layers.iter().any(|l| l.digest.as_ref() == Some(&text));
            let Ok(from) = Name::parse(&image.name) else { continue };
            let near = from.host == self.name.host && from.path != self.name.path;
            if has
                && near
                && tried.insert(from.path.clone())
                && self.registry.mount(digest, &from.path)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn send(&self, blob: &Blob, more: &(dyn Fn(u64) -> bool + Sync)) -> Result<()> {
        let mut tries = 0;
        loop {
            let content = || -> Result<(Box<dyn Read + '_>, u64)> {
                let failed = |e| Error::io("cannot be read", e).at_path(&blob.path);
                let file = File::open(&blob.path).map_err(failed)?;
                // A try that failed counts once.
                let more: Box<dyn Fn(u64) -> bool> =
                    if tries == 0 { Box::new(more) } else { Box::new(|_| more(0)) };
                Ok((Box::new(Counted { file, more }), blob.size))
            };
            match self.registry.send(blob.digest, &content) {
                Err(e) if e.kind() == ErrorKind::Io && tries + 1 < TRIES => tries += 1,
                done => return done,
            }
        }
    }
}

/// A file that says how far it was read.
struct Counted<'a> {
    file: File,
    more: Box<dyn Fn(u64) -> bool + 'a>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        match (self.more)(read as u64) {
            true => Ok(read),
            false => {
                let stopped = Error::new(ErrorKind::Interrupted, "interrupted");
                Err(std::io::Error::other(stopped))
            }
        }
    }
}
