//! A disk in a registry as it is: its files, compressed, as an artifact (OCI image specification, manifest.md, Guidelines
//! for Artifact Usage).
//!
//! The files keep their ids and their contents; where the links between them led to other directories, they lead to the
//! files beside them afterwards. What belongs to the disk and is no layer of its head (other branches) stays behind.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageManifest};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::Told;
use super::client::{Access, Manifest as Raw, Registry};
use super::download::{Wanted, download};
use super::name::Name;
use super::push::{Blob, Pushed, Sending, tagged};
use crate::block::is_zero;
use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Identity};
use crate::oci::digest::{Digest, Verified};
use crate::oci::manifest::{MAX_LAYERS, Manifest};
use crate::oci::target::{MANIFEST, Scratch, Target, blob, text};
use crate::open::{Format, OpenOptions, open_file, open_layers, peek};
use crate::storage::{Draft, Storage as _};

const ARTIFACT: &str = "application/vnd.vdisk.disk.v1";
const CONFIG: &str = "application/vnd.vdisk.disk.config.v1+json";
const LAYER: &str = "application/vnd.vdisk.layer.v1+zstd";
const TITLE: &str = "org.opencontainers.image.title";
const ID: &str = "io.vdisk.layer.id";
const CONTENT: &str = "io.vdisk.layer.content";
const LABEL: &str = "io.vdisk.layer.label";
const FORMAT: &str = "io.vdisk.layer.format";
const SIZE: &str = "io.vdisk.layer.size";
const DIGEST: &str = "io.vdisk.layer.digest";
/// As zstd's own command has it.
const LEVEL: i32 = 3;
/// Memory that the frames of a layer may ask for: two to the power of this.
const WINDOW: u32 = 27;
const PIECE: usize = 256 << 10;
/// Zeroes in stretches of this length are left out of a file.
const GRAIN: usize = 4096;

/// Sends the disk with all layers that its head stands on, as the artifact of that name. What the registry has already is not
/// sent, and frozen layers that the artifact of that name has are not even compressed again.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a layer that is neither qcow2 nor raw, or whose data is in another file.
pub fn push_disk(disk: &Chain, access: &Access, told: &Told<'_>) -> Result<Pushed> {
    let name = access.name();
    tagged(name)?;
    let mut layers = disk.all_layers();
    layers.reverse();
    let titles = titles(&layers)?;
    let registry = Registry::new(access, true)?;
    let known = known(&registry, name)?;
    let work = Scratch(std::env::temp_dir().join(format!(".vdisk-push-{}", std::process::id())));
    let target = Target::passing(&work.0)?;
    let (mut blobs, mut descriptors) = (Vec::new(), Vec::new());
    for (layer, title) in layers.iter().zip(&titles) {
        let mut notes = notes(layer, title)?;
        let same = known.iter().find(|known| is_same(known, &notes));
        if let Some(same) = same {
            let digest = Digest::parse(same.digest().as_ref())?;
            blobs.push(Blob { digest, size: same.size(), path: PathBuf::new() });
            descriptors
                .push(serde_json::to_value(same).map_err(|e| Error::invalid(e.to_string()))?);
            continue;
        }
        let (digest, size) = compress(layer, &target, &mut notes, told)?;
        blobs.push(Blob { digest, size, path: target.blob(digest) });
        let mut descriptor = blob(LAYER, digest, size);
        if let Some(descriptor) = descriptor.as_object_mut() {
            descriptor.insert("annotations".to_owned(), json!(notes));
        }
        descriptors.push(descriptor);
    }
    let config = json!({ "head": titles.last(), "size": crate::block::BlockDevice::size(disk) });
    let config = target.json(&config)?;
    blobs.push(Blob { digest: config.0, size: config.1, path: target.blob(config.0) });
    let raw = text(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": blob(CONFIG, config.0, config.1),
        "layers": descriptors,
    }))?;
    let sending = Sending { registry: &registry, name, store: None, told };
    let (sent, mounted) = sending.blobs(&blobs)?;
    let digest = Digest::of(&raw).to_string();
    registry.put_manifest(&name.reference(), &Raw { raw, media_type: MANIFEST.to_owned() })?;
    Ok(Pushed { digest, blobs: blobs.len(), sent, mounted })
}

/// What the files are called where they come out: as here, all in one directory.
fn titles(layers: &[Layer]) -> Result<Vec<String>> {
    let mut titles = Vec::new();
    for layer in layers {
        let refused = |what: &str| Err(Error::unsupported(what).at_path(&layer.path));
        let data = layer.image.details().and_then(|details| details.data_file);
        if !matches!(layer.format, Format::Qcow2 | Format::Raw) || data.is_some() {
            return refused("only qcow2 and raw files are sent as a disk: convert it");
        }
        let title = layer.path.file_name().and_then(|name| name.to_str());
        match title.filter(|title| is_title(title)) {
            Some(title) if !titles.iter().any(|other| other == title) => {
                titles.push(title.to_owned())
            }
            _ => return refused("has no name that its file can have beside the disk's others"),
        }
    }
    Ok(titles)
}

/// Whether it is the name of a file in a directory, and a believable one.
fn is_title(title: &str) -> bool {
    let fine = |c: char| c != '/' && !c.is_control();
    !title.is_empty() && title.len() <= 255 && !title.starts_with('.') && title.chars().all(fine)
}

/// The layers of the artifact that has the name now.
fn known(registry: &Registry, name: &Name) -> Result<Vec<Descriptor>> {
    let found = match registry.manifest(&name.reference()) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        found => found?,
    };
    match Manifest::read(&found.raw, &found.media_type) {
        Ok(Manifest::Image(manifest)) if is_disk(&manifest) => Ok(manifest.layers().clone()),
        _ => Ok(Vec::new()),
    }
}

/// Whether a manifest is a disk's.
pub fn is_disk(manifest: &ImageManifest) -> bool {
    manifest.config().media_type().as_ref() == CONFIG
}

type Notes = BTreeMap<String, String>;

/// What is said of a layer beside its bytes.
fn notes(layer: &Layer, title: &str) -> Result<Notes> {
    let identity = layer.image.identity()?;
    let mut notes = Notes::new();
    let mut note = |key: &str, value: String| notes.insert(key.to_owned(), value);
    note(TITLE, title.to_owned());
    note(FORMAT, layer.format.name().to_owned());
    if let Some(label) = &identity.label {
        note(ID, label.layer.to_string());
        if identity.vouched {
            note(CONTENT, label.content.to_string());
            note(LABEL, said(&identity)?);
        }
    }
    Ok(notes)
}

/// A digest of all that a layer says of itself.
fn said(identity: &Identity) -> Result<String> {
    let label = identity.label.as_ref().map(|label| label.encode()).transpose()?;
    let backing = identity.backing.as_ref().map(|b| b.name.clone()).unwrap_or_default();
    Ok(Digest::of(&[label.unwrap_or_default(), backing.into_bytes()].concat()).to_string())
}

/// Whether a layer that the registry has is the one here: frozen, of the same contents, and saying the same of itself.
fn is_same(known: &Descriptor, notes: &Notes) -> bool {
    let Some(theirs) = known.annotations() else { return false };
    let same = |key: &str| notes.get(key).is_some() && theirs.get(key) == notes.get(key);
    [TITLE, ID, CONTENT, LABEL, FORMAT].iter().all(|key| same(key))
}

/// Compresses a layer's file into the layout; notes what it is.
fn compress(
    layer: &Layer,
    target: &Target,
    notes: &mut Notes,
    told: &Told<'_>,
) -> Result<(Digest, u64)> {
    let failed = |e| Error::io("cannot be read", e).at_path(&layer.path);
    let file = layer.file.file();
    let size = layer.file.len()?;
    let mut hash = Sha256::new();
    let made = target.written(|out| {
        let broken = |e| Error::io("a layer could not be compressed", e);
        let mut encoder = zstd::stream::write::Encoder::new(out, LEVEL).map_err(broken)?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            let len = buffer.len().min(usize::try_from(size - at).unwrap_or(usize::MAX));
            let piece = buffer.get_mut(..len).unwrap_or_default();
            file.read_exact_at(piece, at).map_err(failed)?;
            hash.update(&*piece);
            std::io::Write::write_all(&mut encoder, piece).map_err(broken)?;
            at += len as u64;
            if !told(0, 0) {
                return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
            }
        }
        encoder.finish().map(drop).map_err(broken)
    })?;
    notes.insert(SIZE.to_owned(), size.to_string());
    notes.insert(DIGEST.to_owned(), Digest(hash.finalize().into()).to_string());
    Ok(made)
}

/// A layer that is to come.
struct Coming {
    wanted: Wanted,
    path: PathBuf,
    title: String,
    size: u64,
    digest: Digest,
    format: Format,
    notes: Notes,
}

/// Brings a disk into `dir`: its files under the names that they had. Those that are there already stay; the head comes
/// last. Returns the head's path.
///
/// # Errors
/// [`ErrorKind::Exists`] for another file of such a name; [`ErrorKind::Invalid`] for a name that is no disk's;
/// [`ErrorKind::Corrupt`] where sizes, digests or ids lie.
pub fn pull_disk(dir: &Path, access: &Access, told: &Told<'_>) -> Result<PathBuf> {
    let (registry, name) = (Registry::new(access, false)?, access.name());
    let found = registry.manifest(&name.reference())?;
    let manifest = match Manifest::read(&found.raw, &found.media_type)? {
        Manifest::Image(manifest) if is_disk(&manifest) => manifest,
        _ => {
            return Err(Error::invalid(format!(
                "{name} is an image and no disk: pull it without --to"
            )));
        }
    };
    let failed = |e| Error::io("could not be made", e).at_path(dir);
    fs::create_dir_all(dir).map_err(failed)?;
    let work = dir.join(".vdisk-pull");
    let coming = coming(&manifest, dir, &work)?;
    let missing: Vec<&Coming> =
        coming.iter().filter_map(|c| c.is_missing().transpose()).collect::<Result<_>>()?;
    if !missing.is_empty() {
        fs::create_dir_all(&work).map_err(failed)?;
        let wanted: Vec<Wanted> = missing.iter().map(|c| c.wanted.clone()).collect();
        download(&registry, &wanted, told)?;
    }
    let mut drafts = Vec::new();
    let mut below: Option<&Coming> = None;
    for one in &coming {
        if missing.iter().any(|m| m.path == one.path) {
            drafts.push(one.unpack(below, told)?);
        }
        below = Some(one);
    }
    // From the base up: the disk is there when its head is.
    drafts.into_iter().try_for_each(Draft::publish)?;
    if !missing.is_empty() {
        fs::remove_dir_all(&work).map_err(|e| Error::io("cannot be removed", e).at_path(&work))?;
    }
    let head = below.map(|head| head.path.clone()).unwrap_or_default();
    // What each layer says of the one below is looked at.
    open_layers(&head, &OpenOptions { read_only: true, ..OpenOptions::default() })?;
    Ok(head)
}

fn coming(manifest: &ImageManifest, dir: &Path, work: &Path) -> Result<Vec<Coming>> {
    let damaged =
        |what: &str| Error::corrupt(format!("the disk's manifest is not believable: {what}"));
    let layers = manifest.layers();
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(damaged("the number of layers"));
    }
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for layer in layers {
        let theirs = layer.annotations().clone().unwrap_or_default();
        let notes: Notes = theirs.into_iter().collect();
        let word = |key: &str| notes.get(key).cloned().ok_or_else(|| damaged(key));
        let title = word(TITLE)?;
        if !is_title(&title) || !seen.insert(title.clone()) {
            return Err(damaged("the name of a file"));
        }
        let format = match word(FORMAT)?.as_str() {
            "qcow2" => Format::Qcow2,
            "raw" => Format::Raw,
            _ => return Err(damaged(FORMAT)),
        };
        let digest = Digest::parse(layer.digest().as_ref())?;
        let target = work.join(digest.hex());
        all.push(Coming {
            wanted: Wanted { digest, size: layer.size(), target },
            path: dir.join(&title),
            size: word(SIZE)?.parse().map_err(|_| damaged(SIZE))?,
            digest: Digest::parse(&word(DIGEST)?)?,
            title,
            format,
            notes,
        });
    }
    Ok(all)
}

impl Coming {
    /// Itself where its file is not there yet.
    fn is_missing(&self) -> Result<Option<&Coming>> {
        if self.path.symlink_metadata().is_err() {
            return Ok(Some(self));
        }
        let identity = peek(&self.path)?.map(|peek| peek.identity).unwrap_or_default();
        let id = |id: crate::image::Id| Some(id.to_string());
        let same = identity.vouched
            && identity.label.as_ref().is_some_and(|label| {
                self.notes.get(ID).cloned() == id(label.layer)
                    && self.notes.get(CONTENT).cloned() == id(label.content)
            });
        match same {
            true => Ok(None),
            false => {
                let text = "is there, and is not the layer that the registry has under that name";
                Err(Error::new(ErrorKind::Exists, text).at_path(&self.path))
            }
        }
    }

    /// Its file, without a name yet, on the one `below`.
    fn unpack(&self, below: Option<&Coming>, told: &Told<'_>) -> Result<Draft> {
        let failed = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::InvalidData => Error::corrupt(e.to_string()).at_path(&self.path),
            _ => Error::io("could not be unpacked", e).at_path(&self.path),
        };
        let blob = File::open(&self.wanted.target).map_err(failed)?;
        let mut decoder = zstd::stream::read::Decoder::new(blob).map_err(failed)?;
        decoder.window_log_max(WINDOW).map_err(failed)?;
        let mut input = Verified::new(decoder, "a layer's file", self.digest, self.size);
        let draft = Draft::new(&self.path)?;
        let file = draft.file().file();
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        loop {
            let read = input.read(&mut buffer).map_err(failed)?;
            let piece = buffer.get(..read).unwrap_or_default();
            if read == 0 {
                break;
            }
            for (number, grain) in piece.chunks(GRAIN).enumerate() {
                if !is_zero(grain) {
                    file.write_all_at(grain, at + (number * GRAIN) as u64).map_err(failed)?;
                }
            }
            at += read as u64;
            if !told(0, 0) {
                return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
            }
        }
        if at != self.size {
            return Err(Error::corrupt("is not as long as its manifest says").at_path(&self.path));
        }
        file.set_len(at).map_err(failed)?;
        self.link(&draft, below)?;
        Ok(draft)
    }

    /// Makes it stand on the file beside it, and refuses one that says that it is another.
    fn link(&self, draft: &Draft, below: Option<&Coming>) -> Result<()> {
        let lie = |what: &str| Err(Error::corrupt(what).at_path(&self.path));
        if self.format == Format::Raw {
            return match below {
                None => Ok(()),
                Some(_) => lie("is raw, and cannot stand on another layer"),
            };
        }
        let options =
            OpenOptions { format: Some(self.format), unprotected: true, ..OpenOptions::writable() };
        let layer = open_file(&self.path, draft.file().clone(), &options)?;
        let mut identity = layer.image.identity()?;
        let id = identity.label.as_ref().map(|label| label.layer.to_string());
        if id.as_ref() != self.notes.get(ID) {
            return lie("is another layer than its manifest says");
        }
        let wanted = below.map(|below| below.title.as_str());
        match (&identity.backing, below) {
            (None, None) => return Ok(()),
            (Some(now), Some(_)) if Some(now.name.as_str()) == wanted => return Ok(()),
            (Some(_), Some(below)) => {
                let format = Some(below.format.name().to_owned());
                identity.backing = Some(Backing { name: below.title.clone(), format });
            }
            (None, Some(_)) => {
                return lie("stands on nothing, and another layer is said to be below");
            }
            (Some(_), None) => return lie("stands on a layer that is not there"),
        }
        layer.image.set_identity(&identity)?;
        layer.image.flush()
    }
}
