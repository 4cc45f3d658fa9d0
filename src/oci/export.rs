//! A disk as an image for others: its layers as tars, in an OCI layout or an archive of one (OCI image specification,
//! image-layout.md).
//!
//! Layers that came with an image leave as they came; each delta above them becomes a layer, made from what it changed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::changes::Changes;
use super::digest::Digest;
use super::manifest::{Platform, parse};
use super::store::{Record, Store};
use super::tar::{Gather, gather, pack_all, pack_changes};
use super::target::{CONFIG, Descriptor, MANIFEST, NAME, Scratch, Target, add, blob, text};
use crate::addr::GuestOffset;
use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::ext4::compare::compare;
use crate::filesystem::ext4::mounted::{Mounted, Options};
use crate::filesystem::ext4::{Ext4, Moments};
use crate::filesystem::{self, Found};
use crate::image::Mapping;
use crate::open::disk::OpenOptions;
use crate::storage::name::sync_directory;

/// Told the bytes of contents of the layer that is written; `false` stops it.
pub type Progress<'a> = dyn FnMut(u64) -> bool + 'a;

/// A disk whose files are exported.
pub struct Exporting<'a> {
    /// The store whose images it may stand on.
    pub store: Option<&'a Store>,
    /// The disk.
    pub disk: &'a Chain,
    /// The partition that its files are in; `None` without a partition table.
    pub partition: Option<u32>,
}

/// Writes what an overlay's upper directory holds as a layer's tar: its whiteouts as other programs read them.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for what was moved in the overlay; [`ErrorKind::Interrupted`].
pub fn upper(directory: &Path, out: &mut dyn Write, progress: &mut Progress<'_>) -> Result<()> {
    let how = Gather { root_owns: false, upper: true };
    gather(directory, how, out, progress)
}

/// The blobs of an image that was made.
pub(super) struct Made {
    /// The manifest's digest and size.
    pub manifest: (Digest, u64),
    /// Those of the layers, and the configuration's.
    pub blobs: Vec<(Digest, u64)>,
}

impl Exporting<'_> {
    /// Writes all files of the disk as one tar.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] where `progress` asks to stop.
    pub fn tar(&self, out: &mut dyn Write, progress: &mut Progress<'_>) -> Result<()> {
        let mut all = self.disk.all_layers();
        let chain = chain(&mut all)?;
        pack_all(&self.files(chain)?, out, progress)
    }

    /// Writes the disk as the image `tag` into the layout at `dir`, which is made where there is none. Other images in
    /// it stay. The image is there when all of it is.
    pub fn layout(
        &self,
        dir: &Path,
        tag: &str,
        changes: &Changes,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let target = Target::begin(dir)?;
        let made = self.image(&target, changes, progress)?;
        let mut entry = blob(MANIFEST, made.manifest.0, made.manifest.1);
        if let Some(entry) = entry.as_object_mut() {
            entry.insert("annotations".to_owned(), json!({ NAME: tag }));
        }
        target.publish(entry, tag)
    }

    /// Writes the blobs of the image, its manifest the last.
    pub(super) fn image(
        &self,
        target: &Target,
        changes: &Changes,
        progress: &mut Progress<'_>,
    ) -> Result<Made> {
        let (layers, image) = self.layers(target, progress)?;
        let config = self.config(image.as_ref(), &layers, changes)?;
        let config = target.bytes(&config)?;
        let descriptors: Vec<Value> =
            layers.iter().map(|l| blob(&l.media_type, l.digest, l.size)).collect();
        let manifest = target.json(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": blob(CONFIG, config.0, config.1),
            "layers": descriptors,
        }))?;
        let blobs = layers.iter().map(|l| (l.digest, l.size)).chain([config]).collect();
        Ok(Made { manifest, blobs })
    }

    /// The same as an archive at `file`, which takes the place of another.
    pub fn archive(
        &self,
        file: &Path,
        tag: &str,
        changes: &Changes,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let dir = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let work = Scratch(dir.join(format!(".vdisk-export-{}", std::process::id())));
        self.layout(&work.0, tag, changes, progress)?;
        let part = Scratch(work.0.with_extension("tar"));
        let failed = |e| Error::io("could not be written", e).at_path(file);
        let mut out = io::BufWriter::new(File::create(&part.0).map_err(failed)?);
        for name in ["oci-layout", "index.json"] {
            add(&mut out, &work.0, name).map_err(failed)?;
        }
        let mut blobs: Vec<_> = fs::read_dir(work.0.join("blobs/sha256"))
            .and_then(|entries| entries.map(|e| e.map(|e| e.file_name())).collect())
            .map_err(failed)?;
        blobs.sort();
        for blob in blobs {
            let name = format!("blobs/sha256/{}", blob.to_string_lossy());
            add(&mut out, &work.0, &name).map_err(failed)?;
        }
        out.write_all(&[0; 1024]).map_err(failed)?;
        let out = out.into_inner().map_err(|e| failed(e.into_error()))?;
        out.sync_all().map_err(failed)?;
        fs::rename(&part.0, file).map_err(failed)?;
        sync_directory(file)
    }

    fn files(&self, chain: Chain) -> Result<Mounted> {
        let Found { offset, len, .. } = self.found(&chain)?;
        let options = Options { read_only: true, ..Options::default() };
        let len = if len == 0 { u64::MAX } else { len };
        Mounted::open(Arc::new(chain), offset, len, options)
    }

    fn found(&self, chain: &Chain) -> Result<Found> {
        let found = filesystem::find(chain, self.partition)?;
        match found.fs.driver {
            "ext4" => Ok(found),
            _ => Err(Error::unsupported(format!(
                "holds {}: only the files of ext2, ext3 and ext4 are exported",
                found.fs.name
            ))),
        }
    }

    /// The blobs of all layers, and the image that the lower ones came with.
    fn layers(
        &self,
        target: &Target,
        progress: &mut Progress<'_>,
    ) -> Result<(Vec<Descriptor>, Option<Record>)> {
        // From the base up.
        let mut all = self.disk.all_layers();
        all.reverse();
        let (image, stored) = self.image_below(&all)?;
        let mut layers = Vec::new();
        for number in 0..all.len() {
            let kept =
                image.as_ref().filter(|_| number < stored).and_then(|i| i.layers.get(number));
            if let (Some(layer), Some(store)) = (kept, self.store)
                && let Some(digest) = &layer.digest
            {
                let digest = Digest::parse(digest)?;
                let diff_id = Digest::parse(&layer.diff_id)?;
                let (size, media_type) = target.copy(&store.blob(digest), digest)?;
                layers.push(Descriptor { media_type, digest, size, diff_id });
            } else if let Some(layer) = self.made(&all, number, target, progress)? {
                layers.push(layer);
            }
        }
        Ok((layers, image))
    }

    /// The image in the store that the disk stands on, and how many of its layers are that image's.
    fn image_below(&self, all: &[Layer]) -> Result<(Option<Record>, usize)> {
        let Some(store) = self.store else { return Ok((None, 0)) };
        let dir = fs::canonicalize(store.layers_dir()).unwrap_or_default();
        let is_stored = |layer: &&Layer| {
            fs::canonicalize(&layer.path).is_ok_and(|path| path.parent() == Some(&dir))
        };
        let stored = all.iter().take_while(is_stored).count();
        let Some(top) = stored.checked_sub(1).and_then(|at| all.get(at)) else {
            return Ok((None, 0));
        };
        let mut images = store.images()?.into_iter();
        let same = |record: &Record| {
            store.top(record).is_ok_and(|path| path.file_name() == top.path.file_name())
        };
        match images.find(same) {
            Some(image) => Ok((Some(image), stored)),
            None => Ok((None, 0)),
        }
    }

    /// A layer of what the delta `number` changed; `None` where it changed no file.
    fn made(
        &self,
        all: &[Layer],
        number: usize,
        target: &Target,
        progress: &mut Progress<'_>,
    ) -> Result<Option<Descriptor>> {
        let up_to = |number: usize| -> Result<Chain> {
            let mut layers: Vec<Layer> = all.get(..=number).unwrap_or_default().to_vec();
            layers.reverse();
            chain(&mut layers)
        };
        let after = up_to(number)?;
        // A disk may have stood empty before somebody made a file system of it.
        if number + 1 < all.len() && self.is_blank(&after) {
            return Ok(None);
        }
        let before = number.checked_sub(1).map(up_to).transpose()?;
        let Some(before) = before.filter(|before| !self.is_blank(before)) else {
            let files = self.files(after)?;
            return target.layer(|out| pack_all(&files, out, progress)).map(Some);
        };
        let stop = || false;
        let open = |chain| -> Result<Ext4<'_>> {
            let Found { offset, len, .. } = self.found(chain)?;
            Ext4::open(chain, offset, if len == 0 { u64::MAX } else { len }, &stop)
        };
        let head = after.head().image;
        let written = |at: u64, len: u64| {
            let end = at.saturating_add(len).min(head.size());
            let mut at = at;
            while at < end {
                match head.map(GuestOffset(at), end - at) {
                    Ok(extent) if extent.mapping == Mapping::Unallocated => at += extent.len,
                    _ => return true,
                }
            }
            false
        };
        let (old, new) = (open(&before)?, open(&after)?);
        let moments = Moments { before: &old, after: &new, written: &written };
        let changes = compare(&moments)?;
        if changes.is_empty() {
            return Ok(None);
        }
        let files = self.files(up_to(number)?)?;
        target.layer(|out| pack_changes(&files, &changes, out, progress)).map(Some)
    }

    fn is_blank(&self, chain: &Chain) -> bool {
        self.found(chain).is_err_and(|e| e.kind() == ErrorKind::Unsupported)
    }

    /// What is run in the disk, as it says itself.
    fn own_config(&self) -> Result<Option<Value>> {
        for layer in self.disk.all_layers() {
            let label = layer.image.identity()?.label;
            if let Some(raw) = label.and_then(|label| label.config) {
                return parse(&raw, "the disk's configuration").map(Some);
            }
        }
        Ok(None)
    }

    fn config(
        &self,
        image: Option<&Record>,
        layers: &[Descriptor],
        changes: &Changes,
    ) -> Result<Vec<u8>> {
        let raw = match (image, self.store) {
            (Some(image), Some(store)) => Some(store.json(&image.config)?),
            _ => None,
        };
        let mut config: Value = match &raw {
            Some(raw) => parse(raw, "the image's configuration")?,
            None => json!({ "architecture": Platform::host().arch(), "os": "linux", "config": {} }),
        };
        let own = self.own_config()?;
        let known = image.map_or(0, |image| image.layers.len().min(layers.len()));
        // What is as it came leaves as it came.
        let as_it_came = own.as_ref().is_none_or(|own| config.get("config") == Some(own));
        let as_it_came = as_it_came && changes.is_empty() && known == layers.len();
        if let Some(raw) = raw.filter(|_| as_it_came) {
            return Ok(raw);
        }
        let damaged = || Error::corrupt("the image's configuration is no object");
        let all = config.as_object_mut().ok_or_else(damaged)?;
        let ids: Vec<String> = layers.iter().map(|l| l.diff_id.to_string()).collect();
        all.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": ids }));
        if let Some(history) = all.get_mut("history").and_then(Value::as_array_mut) {
            let more = layers.iter().skip(known).map(|_| json!({ "created_by": "vdisk export" }));
            history.extend(more);
        }
        if let Some(own) = own {
            all.insert("config".to_owned(), own);
        }
        let run = all.entry("config").or_insert_with(|| json!({}));
        if run.is_null() {
            *run = json!({});
        }
        changes.apply(run.as_object_mut().ok_or_else(damaged)?)?;
        text(&config)
    }
}

fn chain(layers: &mut Vec<Layer>) -> Result<Chain> {
    if layers.is_empty() {
        return Err(Error::invalid("there is no layer"));
    }
    let head = layers.remove(0);
    Ok(Chain::new(head, std::mem::take(layers), OpenOptions::CACHE))
}
