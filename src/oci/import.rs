//! An image into the store: each of its layers a delta on those below, made once.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use oci_spec::image::{Arch, ImageConfigurationBuilder, Os, RootFsBuilder};
use sha2::{Digest as _, Sha256};

use super::digest::{Digest, Verified};
use super::layer::{self, LayerId};
use super::layout::Layout;
use super::manifest::{Image, LayerBlob};
use super::store::{Record, Store, StoredLayer, full_name};
use super::tar::{Ahead, Gather, gather, plain};
use crate::error::{Error, Result};

/// Bytes that are written at once.
const PIECE: usize = 256 << 10;

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An OCI layout in a directory, and the image's tag in it.
    Layout(PathBuf, Option<String>),
    /// An archive of a layout, or of `docker save`, and the image's tag in it.
    Archive(PathBuf, Option<String>),
    /// The tar of a root file system, compressed or not.
    Tar(PathBuf),
    /// The same, from standard input.
    Stdin,
    /// A root file system in a directory; all files are root's where that is said.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Whether all files are root's, whoever has them here.
        root_owns: bool,
    },
}

/// How an image is imported.
#[derive(Debug, Clone, Copy)]
pub struct ImportOptions {
    /// The size of its disk in bytes.
    pub size: u64,
}

impl Default for ImportOptions {
    /// 10 GiB.
    fn default() -> ImportOptions {
        ImportOptions { size: 10 << 30 }
    }
}

/// What was imported.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The image.
    pub record: Record,
    /// Layers that were not there before.
    pub new: usize,
}

/// What is told while it goes on: the number of the layer, from 0, and bytes of its files; `false` stops it.
pub type Progress<'a> = dyn FnMut(usize, u64) -> bool + 'a;

/// Imports an image as `name`, which takes the place of another of that name. What is interrupted leaves whole layers
/// and no image.
///
/// # Errors
/// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) where a digest lies, or a layer holds what none can; the others say what cannot be read.
pub fn import(
    store: &Store,
    source: &Source,
    name: &str,
    options: ImportOptions,
    progress: &mut Progress<'_>,
) -> Result<Imported> {
    let name = full_name(name)?;
    let _locked = store.lock()?;
    let importing = Importing { store, name, options };
    match source {
        Source::Layout(path, tag) => {
            importing.layout(&Layout::directory(path)?, tag.as_deref(), progress)
        }
        Source::Archive(path, tag) => {
            importing.layout(&Layout::archive(path)?, tag.as_deref(), progress)
        }
        Source::Tar(path) => {
            let file = File::open(path).map_err(|e| Error::io("cannot be opened", e).at_path(path));
            importing.root(file?, progress).map_err(|e| e.at_path(path))
        }
        Source::Stdin => {
            // It is gone through twice.
            let mut spool = spool(&store.layers_dir())?;
            let failed = |e| Error::io("standard input cannot be kept", e);
            std::io::copy(&mut std::io::stdin().lock(), &mut spool).map_err(failed)?;
            importing.root(spool, progress)
        }
        Source::Directory { path, root_owns } => {
            let mut spool = spool(&store.layers_dir())?;
            let how = Gather { root_owns: *root_owns, upper: false };
            let mut out = BufWriter::with_capacity(PIECE, &mut spool);
            gather(path, how, &mut out, &mut |bytes| progress(0, bytes))?;
            out.flush().map_err(|e| Error::io("the tar could not be written", e))?;
            drop(out);
            importing.root(spool, progress)
        }
    }
}

/// Makes the image `name` of one all of whose blobs are in the store.
pub fn stored(
    store: &Store,
    image: &Image,
    name: &str,
    options: ImportOptions,
    progress: &mut Progress<'_>,
) -> Result<Imported> {
    let name = full_name(name)?;
    let _locked = store.lock()?;
    let importing = Importing { store, name, options };
    importing.all(image, &|blob| importing.kept(blob), progress)
}

/// A file without a name.
fn spool(dir: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600);
    options.open(dir).map_err(|e| Error::io("no file can be made", e).at_path(dir))
}

struct Importing<'a> {
    store: &'a Store,
    name: String,
    options: ImportOptions,
}

impl Importing<'_> {
    fn layout(
        &self,
        layout: &Layout,
        tag: Option<&str>,
        progress: &mut Progress<'_>,
    ) -> Result<Imported> {
        let image = layout.image(tag)?;
        for blob in &image.layers {
            if let Some(digest) = blob.digest {
                self.store.keep(digest, &mut layout.layer(blob)?)?;
            }
        }
        let open = |blob: &LayerBlob| match blob.digest {
            Some(_) => self.kept(blob),
            None => layout.layer(blob),
        };
        self.all(&image, &open, progress)
    }

    /// A layer's blob in the store.
    fn kept(&self, blob: &LayerBlob) -> Result<Box<dyn Read + Send>> {
        let digest = blob.digest.ok_or_else(|| Error::invalid("a layer has no digest"))?;
        let path = self.store.blob(digest);
        let file =
            File::open(&path).map_err(|e| Error::io("cannot be opened", e).at_path(&path))?;
        Ok(Box::new(file))
    }

    fn all(
        &self,
        image: &Image,
        open: &dyn Fn(&LayerBlob) -> Result<Box<dyn Read + Send>>,
        progress: &mut Progress<'_>,
    ) -> Result<Imported> {
        let mut below: Option<LayerId> = None;
        let (mut layers, mut new) = (Vec::new(), 0);
        for (number, blob) in image.layers.iter().enumerate() {
            let chain = Digest::chain(below.map(|id| id.chain), blob.diff_id);
            let id = LayerId { chain, size: self.options.size };
            if !self.store.layer(id).exists() {
                let tar =
                    Verified::new(plain(open(blob)?)?, "a layer's tar", blob.diff_id, u64::MAX);
                self.layer(id, below, tar, &mut |bytes| progress(number, bytes))?;
                new += 1;
            }
            layers.push(StoredLayer {
                chain_id: chain.to_string(),
                diff_id: blob.diff_id.to_string(),
                digest: blob.digest.map(|d| d.to_string()),
            });
            below = Some(id);
        }
        let config = self.store.keep_json(&image.config_json)?.to_string();
        let manifest =
            image.manifest_json.as_ref().map(|raw| self.store.keep_json(raw)).transpose()?;
        let record = Record {
            name: self.name.clone(),
            disk_size: self.options.size,
            config,
            manifest: manifest.map(|digest| digest.to_string()),
            layers,
        };
        self.store.put(&record)?;
        Ok(Imported { record, new })
    }

    fn layer(
        &self,
        id: LayerId,
        below: Option<LayerId>,
        tar: impl Read + Send + 'static,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        layer::make(&self.store.layers_dir(), id, below, Ahead::new(tar), go_on).map(drop)
    }

    /// The tar of a root file system becomes an image of one layer.
    fn root(&self, mut file: File, progress: &mut Progress<'_>) -> Result<Imported> {
        let failed = |e| Error::io("cannot be read", e);
        let again = |file: &mut File| {
            file.seek(SeekFrom::Start(0)).map_err(|e| {
                Error::io("cannot be read twice: give it as a file, or as - from standard input", e)
            })
        };
        again(&mut file)?;
        let diff_id = digest(plain(file.try_clone().map_err(failed)?)?)?;
        again(&mut file)?;
        let config = config(diff_id)?;
        let size = file.metadata().map_err(failed)?.len();
        let blob = LayerBlob::unnamed(diff_id, size);
        let image = Image {
            config_json: config
                .to_string()
                .map_err(|e| Error::invalid(e.to_string()))?
                .into_bytes(),
            manifest_json: None,
            layers: vec![blob],
            tag: None,
        };
        let open = |_: &LayerBlob| -> Result<Box<dyn Read + Send>> {
            Ok(Box::new(file.try_clone().map_err(failed)?))
        };
        self.all(&image, &open, progress)
    }
}

fn digest(mut input: impl Read) -> Result<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(Digest(hash.finalize().into())),
            Ok(read) => hash.update(buffer.get(..read).unwrap_or_default()),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("cannot be read", e)),
        }
    }
}

fn config(diff_id: Digest) -> Result<oci_spec::image::ImageConfiguration> {
    let failed = |e: oci_spec::OciSpecError| Error::invalid(e.to_string());
    let arch = match std::env::consts::ARCH {
        "x86_64" => Arch::Amd64,
        "aarch64" => Arch::ARM64,
        other => Arch::Other(other.to_owned()),
    };
    let rootfs = RootFsBuilder::default().typ("layers").diff_ids(vec![diff_id.to_string()]).build();
    ImageConfigurationBuilder::default()
        .architecture(arch)
        .os(Os::Linux)
        .rootfs(rootfs.map_err(failed)?)
        .build()
        .map_err(failed)
}
