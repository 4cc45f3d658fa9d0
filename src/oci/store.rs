//! Where images are kept: the deltas of their layers, their configurations, and which layers each has.
//!
//! ```text
//! layers/CHAIN-SIZE.qcow2    a layer on those below it, sealed
//! images/NAME.json           an image: its layers and its configuration's digest
//! blobs/sha256/DIGEST        configurations, manifests and the layers' blobs, as they came
//! lock                       held by whoever changes something
//! ```
//! Nothing here says who stands on a layer: the layers' own labels do.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::layer::LayerId;
use super::part;
use crate::change::{Clone, unmark};
use crate::error::{Error, ErrorKind, Result};
use crate::family::clones_of;
use crate::family::standing::Standing;
use crate::open::disk::peek;
use crate::storage::Draft;
use crate::storage::name::{remove, sync_directory};

/// Bytes of a record or a configuration at most.
const MAX_JSON: u64 = 4 << 20;

/// A store of images.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// A layer of an image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLayer {
    /// The id of the chain up to it.
    pub chain_id: String,
    /// The digest of its tar.
    pub diff_id: String,
    /// The digest of the blob that it came as, where it came as one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name, with its tag.
    pub name: String,
    /// The size of its disk in bytes.
    pub disk_size: u64,
    /// The digest of its configuration.
    pub config: String,
    /// The digest of the manifest that it came with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// Its layers, the lowest first.
    pub layers: Vec<StoredLayer>,
}

impl Record {
    /// The ids of its layers, the lowest first.
    pub fn layer_ids(&self) -> Result<Vec<LayerId>> {
        let id = |layer: &StoredLayer| {
            Ok(LayerId { chain: Digest::parse(&layer.chain_id)?, size: self.disk_size })
        };
        self.layers.iter().map(id).collect()
    }
}

/// Something that can be removed from the store, or was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unused {
    /// Its file.
    pub path: PathBuf,
    /// Bytes of the host that it takes.
    pub bytes: u64,
}

/// Held while a store is changed.
pub struct Locked(#[allow(dead_code, reason = "held for its lifetime")] Flock<File>);

impl Store {
    /// The store at `dir`, which is made where it is not there.
    pub fn open(dir: &Path) -> Result<Store> {
        let failed = |e| Error::io("the store of images cannot be made", e).at_path(dir);
        for part in ["layers", "images", "blobs/sha256"] {
            let made = DirBuilder::new().recursive(true).mode(0o755).create(dir.join(part));
            made.map_err(failed)?;
        }
        Ok(Store { dir: dir.to_owned() })
    }

    /// The store that is meant where none is named: `VDISK_STORE`, root's, or the user's.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the user has no home.
    pub fn default_dir() -> Result<PathBuf> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(dir) = set("VDISK_STORE") {
            return Ok(dir);
        }
        if nix::unistd::geteuid().is_root() {
            return Ok(PathBuf::from("/var/lib/vdisk"));
        }
        let data = set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")));
        let none =
            || Error::new(ErrorKind::NotFound, "no place for images is known: --store names one");
        Ok(data.ok_or_else(none)?.join("vdisk"))
    }

    /// Keeps others from changing the store.
    pub fn lock(&self) -> Result<Locked> {
        self.flock("lock", FlockArg::LockExclusive)?.ok_or_else(|| Error::invalid("is locked"))
    }

    /// Keeps blobs that no image has yet from being pruned, while an image is brought.
    pub fn keep_blobs(&self) -> Result<Locked> {
        self.flock("blobs/lock", FlockArg::LockShared)?.ok_or_else(|| Error::invalid("is locked"))
    }

    /// A lock; `None` where it was not to be waited for.
    fn flock(&self, name: &str, how: FlockArg) -> Result<Option<Locked>> {
        let path = self.dir.join(name);
        let failed = |e| Error::io("cannot be locked", e).at_path(&path);
        let mut options = fs::OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match Flock::lock(file, how) {
            Ok(lock) => Ok(Some(Locked(lock))),
            Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(failed(e.into())),
        }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of layers.
    pub fn layers_dir(&self) -> PathBuf {
        self.dir.join("layers")
    }

    /// The file of a layer.
    pub fn layer(&self, id: LayerId) -> PathBuf {
        self.layers_dir().join(id.file_name())
    }

    /// The topmost layer of an image: its clones stand on that.
    pub fn top(&self, record: &Record) -> Result<PathBuf> {
        let top = record.layer_ids()?.pop();
        let top =
            top.ok_or_else(|| Error::corrupt(format!("image {} has no layers", record.name)))?;
        Ok(self.layer(top))
    }

    /// Where a blob is kept.
    pub fn blob(&self, digest: Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// A configuration or a manifest.
    pub fn json(&self, digest: &str) -> Result<Vec<u8>> {
        let digest = Digest::parse(digest)?;
        let path = self.blob(digest);
        let raw = read(&path)?;
        match Digest::of(&raw) == digest {
            true => Ok(raw),
            false => Err(Error::corrupt("is not what its digest says").at_path(path)),
        }
    }

    /// Keeps a configuration or a manifest; returns its digest.
    pub fn keep_json(&self, raw: &[u8]) -> Result<Digest> {
        let digest = Digest::of(raw);
        self.keep(digest, &mut &raw[..])?;
        Ok(digest)
    }

    /// Keeps a blob, of which `input` fails where it is not what its digest says.
    pub fn keep(&self, digest: Digest, input: &mut dyn Read) -> Result<()> {
        let path = self.blob(digest);
        if path.exists() {
            return Ok(());
        }
        let draft = Draft::new(&path)?;
        let mut file = draft.file().as_ref().file();
        std::io::copy(input, &mut file).map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => Error::corrupt(e.to_string()),
            _ => Error::io("a blob could not be copied", e).at_path(&path),
        })?;
        match draft.publish() {
            Err(e) if e.kind() == ErrorKind::Exists => Ok(()),
            done => done,
        }
    }

    /// All images, by name.
    pub fn images(&self) -> Result<Vec<Record>> {
        let mut found = Vec::new();
        for path in list(&self.dir.join("images"))? {
            if path.extension().is_some_and(|e| e == "json") {
                found.push(record(&path)?);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The image of that name; without a tag, `latest` is meant.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn image(&self, name: &str) -> Result<Record> {
        let name = full_name(name)?;
        // What was pulled without a registry's name came from the usual one.
        let usual = ["", "docker.io/library/", "docker.io/"];
        let found = usual.iter().map(|front| record(&self.record_path(&format!("{front}{name}"))));
        let missing =
            |found: &Result<Record>| found.as_ref().is_err_and(|e| e.kind() == ErrorKind::NotFound);
        match found.into_iter().find(|found| !missing(found)) {
            None => {
                let text = format!("there is no image {name} in {}", self.dir.display());
                Err(Error::new(ErrorKind::NotFound, text))
            }
            Some(found) => found,
        }
    }

    /// Makes `record` the image of its name, in one step.
    pub fn put(&self, record: &Record) -> Result<()> {
        let path = self.record_path(&record.name);
        let raw = serde_json::to_vec_pretty(record)
            .map_err(|e| Error::invalid(format!("the image's record cannot be written: {e}")))?;
        let draft = Draft::new(&path)?;
        let mut file = draft.file().as_ref().file();
        std::io::Write::write_all(&mut file, &raw)
            .map_err(|e| Error::io("could not be written", e).at_path(&path))?;
        draft.replace()
    }

    /// Forgets an image; its layers stay until [`prune`](Store::prune).
    pub fn forget(&self, name: &str) -> Result<Record> {
        let record = self.image(name)?;
        let path = self.record_path(&record.name);
        remove(&path)?;
        sync_directory(&path)?;
        Ok(record)
    }

    fn record_path(&self, name: &str) -> PathBuf {
        let mut file = String::new();
        for byte in name.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                    file.push(byte as char)
                }
                _ => file += &format!("%{byte:02x}"),
            }
        }
        self.dir.join("images").join(file + ".json")
    }

    /// Removes the layers on which no image and no clone stands, and blobs that no image has; with `pretend`, only says
    /// which. Layers whose clones are not found where they were made stay.
    pub fn prune(&self, pretend: bool) -> Result<Vec<Unused>> {
        let images = self.images()?;
        let mut kept: HashSet<PathBuf> = HashSet::new();
        let mut blobs: HashSet<String> = HashSet::new();
        for image in &images {
            kept.extend(image.layer_ids()?.into_iter().map(|id| self.layer(id)));
            blobs.insert(image.config.clone());
            blobs.extend(image.manifest.clone());
            blobs.extend(image.layers.iter().filter_map(|layer| layer.digest.clone()));
        }
        let mut unused = self.prune_layers(kept, pretend)?;
        // What is being brought is nobody's yet.
        let Some(_alone) = self.flock("blobs/lock", FlockArg::LockExclusiveNonblock)? else {
            return Ok(unused);
        };
        let dir = self.dir.join("blobs/sha256");
        let mut gone = part::left_behind(&dir)?;
        for path in list(&dir)? {
            let name = path.file_name().map(|n| format!("sha256:{}", n.to_string_lossy()));
            if name.is_some_and(|name| !blobs.contains(&name)) {
                gone.push(path);
            }
        }
        for path in gone {
            unused.push(size_of(&path)?);
            if !pretend {
                remove(&path)?;
            }
        }
        Ok(unused)
    }

    fn prune_layers(&self, kept: HashSet<PathBuf>, pretend: bool) -> Result<Vec<Unused>> {
        let mut unused: Vec<Unused> = Vec::new();
        let mut left: Vec<PathBuf> =
            list(&self.layers_dir())?.into_iter().filter(|path| !kept.contains(path)).collect();
        // From the top down: what stood on a layer may be gone only now.
        loop {
            let gone = |path: &PathBuf| unused.iter().any(|u| u.path == *path);
            let mut next = None;
            for path in &left {
                if stands_alone(path, &gone)? {
                    next = Some(path.clone());
                    break;
                }
            }
            let Some(path) = next else { return Ok(unused) };
            left.retain(|other| *other != path);
            unused.push(size_of(&path)?);
            if !pretend {
                take_away(&path)?;
            }
        }
    }
}

/// Whether nobody stands on the layer at `path`, but for those that are `gone`.
fn stands_alone(path: &Path, gone: &dyn Fn(&PathBuf) -> bool) -> Result<bool> {
    let Some(label) = peek(path)?.and_then(|peek| peek.identity.label) else { return Ok(false) };
    let standing = Standing::by_label(path, &label, None).with(clones_of(path)?);
    // What stood here beside it and is not there was pruned, and the prune did not come to its end.
    let lost = |clone: &PathBuf| {
        gone(clone) || clone.parent() == path.parent() && LayerId::is_file_name(clone)
    };
    Ok(!standing.more && standing.found.iter().all(gone) && standing.lost.iter().all(lost))
}

/// Removes the file of a layer, and its mark in the layer below.
fn take_away(path: &Path) -> Result<()> {
    let identity = peek(path)?.map(|peek| peek.identity).unwrap_or_default();
    remove(path)?;
    sync_directory(path)?;
    if let (Some(label), Some(backing)) = (identity.label, identity.backing) {
        let below = path.with_file_name(backing.name);
        unmark(&below, &Clone { disk: label.disk, path })?;
    }
    Ok(())
}

/// A name with its tag.
///
/// # Errors
/// [`ErrorKind::Invalid`] for what no registry would take.
pub fn full_name(name: &str) -> Result<String> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"-_./:@".contains(&b);
    if name.is_empty() || !name.bytes().all(fine) || name.starts_with(['/', '.', '-', ':']) {
        return Err(Error::invalid(format!("'{name}' cannot be the name of an image")));
    }
    let last = name.rsplit('/').next().unwrap_or(name);
    Ok(if last.contains(':') || last.contains('@') {
        name.to_owned()
    } else {
        format!("{name}:latest")
    })
}

fn record(path: &Path) -> Result<Record> {
    let raw = read(path)?;
    serde_json::from_slice(&raw).map_err(|e| {
        Error::corrupt(format!("the image's record cannot be read: {e}")).at_path(path)
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |e| Error::io("cannot be read", e).at_path(path);
    let mut raw = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_JSON).read_to_end(&mut raw).map_err(failed)?;
    Ok(raw)
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io("cannot be listed", e).at_path(dir);
    let entries = fs::read_dir(dir).map_err(failed)?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if !hidden {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn size_of(path: &Path) -> Result<Unused> {
    use std::os::unix::fs::MetadataExt;
    let meta =
        fs::symlink_metadata(path).map_err(|e| Error::io("cannot be read", e).at_path(path))?;
    Ok(Unused { path: path.to_owned(), bytes: meta.blocks() * 512 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_tag_is_the_latest() {
        assert_eq!(full_name("debian").unwrap(), "debian:latest");
        assert_eq!(full_name("localhost:5000/a/b").unwrap(), "localhost:5000/a/b:latest");
        assert_eq!(full_name("localhost:5000/a/b:1").unwrap(), "localhost:5000/a/b:1");
        for bad in ["", "../x", "/x", "a b", "-x", "a\0"] {
            assert!(full_name(bad).is_err(), "{bad}");
        }
    }
}
