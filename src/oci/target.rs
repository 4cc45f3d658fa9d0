//! A layout that is written: blobs, and an index that names images (OCI image specification, image-layout.md).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar_core::EntryType;
use tar_core::builder::EntryBuilder;

use super::digest::Digest;
use crate::error::{Error, Result};
use crate::storage::name::sync_directory;

pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const NAME: &str = "org.opencontainers.image.ref.name";

/// A layer of the image that is made.
pub struct Descriptor {
    /// What kind of layer it is.
    pub media_type: String,
    /// Of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Of the tar in it.
    pub diff_id: Digest,
}

/// What names a blob.
pub fn blob(media: &str, digest: Digest, size: u64) -> Value {
    json!({ "mediaType": media, "digest": digest.to_string(), "size": size })
}

/// A layout that is written.
pub struct Target {
    dir: PathBuf,
    /// Whether it goes when it was used: blobs may be other names of a store's.
    passing: bool,
}

impl Target {
    pub fn begin(dir: &Path) -> Result<Target> {
        let failed = |e| Error::io("could not be made", e).at_path(dir);
        fs::create_dir_all(dir.join("blobs/sha256")).map_err(failed)?;
        let target = Target { dir: dir.to_owned(), passing: false };
        target.replace("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }))?;
        Ok(target)
    }

    pub fn blob(&self, digest: Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    pub fn scratch(&self) -> Scratch {
        Scratch(self.dir.join(format!(".vdisk-{}", std::process::id())))
    }

    /// Writes a blob as `write` writes it; returns its digest and its length.
    pub fn written(
        &self,
        write: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<(Digest, u64)> {
        let part = self.scratch();
        let failed = |e| Error::io("could not be written", e).at_path(&part.0);
        let mut file = Hashed::new(io::BufWriter::new(File::create(&part.0).map_err(failed)?));
        write(&mut file)?;
        let (file, digest, size) = file.finish();
        drop(file.into_inner().map_err(|e| failed(e.into_error()))?);
        fs::rename(&part.0, self.blob(digest)).map_err(failed)?;
        Ok((digest, size))
    }

    /// Writes a layer; `write` writes its tar.
    pub fn layer(&self, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<Descriptor> {
        let part = self.scratch();
        let failed = |e| Error::io("could not be written", e).at_path(&part.0);
        let file = Hashed::new(io::BufWriter::new(File::create(&part.0).map_err(failed)?));
        let mut tar = Hashed::new(GzEncoder::new(file, Compression::default()));
        write(&mut tar)?;
        let (gzip, diff_id, _) = tar.finish();
        let (file, digest, size) = gzip.finish().map_err(failed)?.finish();
        let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(&part.0, self.blob(digest)).map_err(failed)?;
        Ok(Descriptor { media_type: LAYER.to_owned(), digest, size, diff_id })
    }

    /// Takes a blob as it is; returns its length and what kind of layer it is.
    pub fn copy(&self, from: &Path, digest: Digest) -> Result<(u64, String)> {
        let failed = |e| Error::io("a layer could not be copied", e).at_path(from);
        let part = self.scratch();
        if !(self.passing && fs::hard_link(from, &part.0).is_ok()) {
            fs::copy(from, &part.0).map_err(failed)?;
        }
        let size = part.0.metadata().map_err(failed)?.len();
        let mut begin = [0; 4];
        let file = File::open(&part.0).map_err(failed)?;
        let read = std::os::unix::fs::FileExt::read_at(&file, &mut begin, 0).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        fs::rename(&part.0, self.blob(digest)).map_err(failed)?;
        let kind = match begin.get(..read).unwrap_or_default() {
            [0x1f, 0x8b, ..] => "+gzip",
            [0x28, 0xb5, 0x2f, 0xfd] => "+zstd",
            _ => "",
        };
        Ok((size, format!("application/vnd.oci.image.layer.v1.tar{kind}")))
    }

    /// Writes a value; returns its digest and its length.
    pub fn json(&self, value: &Value) -> Result<(Digest, u64)> {
        self.bytes(&text(value)?)
    }

    /// Writes a small blob.
    pub fn bytes(&self, raw: &[u8]) -> Result<(Digest, u64)> {
        let digest = Digest::of(raw);
        let failed = |e| Error::io("could not be written", e).at_path(&self.dir);
        let part = self.scratch();
        fs::write(&part.0, raw).map_err(failed)?;
        File::open(&part.0).and_then(|f| f.sync_all()).map_err(failed)?;
        fs::rename(&part.0, self.blob(digest)).map_err(failed)?;
        Ok((digest, raw.len() as u64))
    }

    /// A layout that is there for a while.
    pub fn passing(dir: &Path) -> Result<Target> {
        Ok(Target { passing: true, ..Target::begin(dir)? })
    }

    fn replace(&self, name: &str, value: &Value) -> Result<()> {
        let path = self.dir.join(name);
        let failed = |e| Error::io("could not be written", e).at_path(&path);
        let part = self.scratch();
        fs::write(&part.0, text(value)?).map_err(failed)?;
        File::open(&part.0).and_then(|f| f.sync_all()).map_err(failed)?;
        fs::rename(&part.0, &path).map_err(failed)?;
        sync_directory(&path)
    }

    /// Puts the image into the index, in the place of another of its name.
    pub fn publish(&self, entry: Value, tag: &str) -> Result<()> {
        sync_directory(&self.dir.join("blobs/sha256/x"))?;
        let path = self.dir.join("index.json");
        let mut index: Value = match fs::read(&path) {
            Ok(raw) => serde_json::from_slice(&raw).map_err(|e| {
                Error::corrupt(format!("the index cannot be read: {e}")).at_path(&path)
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [] })
            }
            Err(e) => return Err(Error::io("cannot be read", e).at_path(&path)),
        };
        let damaged = || Error::corrupt("the index is none").at_path(&path);
        let all = index.get_mut("manifests").and_then(Value::as_array_mut).ok_or_else(damaged)?;
        let named = |entry: &Value| {
            entry.get("annotations").and_then(|a| a.get(NAME)).and_then(Value::as_str) == Some(tag)
        };
        all.retain(|entry| !named(entry));
        all.push(entry);
        self.replace("index.json", &index)
    }
}

pub fn text(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::invalid(format!("no JSON: {e}")))
}

/// Puts a file into a tar.
pub fn add(out: &mut impl Write, dir: &Path, name: &str) -> io::Result<()> {
    let mut file = File::open(dir.join(name))?;
    let size = file.metadata()?.len();
    let mut entry = EntryBuilder::new_ustar();
    entry.path(name).entry_type(EntryType::Regular);
    entry.mode(0o644).and_then(|e| e.size(size)).map_err(io::Error::other)?;
    out.write_all(&entry.finish_bytes())?;
    io::copy(&mut file, out)?;
    let fill = size.next_multiple_of(512) - size;
    out.write_all(&[0; 512][..fill as usize])
}

/// What is removed when it goes, where it is still there.
pub struct Scratch(pub PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A writer that knows the digest of what went through it.
struct Hashed<W> {
    out: W,
    hash: Sha256,
    len: u64,
}

impl<W: Write> Hashed<W> {
    fn new(out: W) -> Hashed<W> {
        Hashed { out, hash: Sha256::new(), len: 0 }
    }

    fn finish(self) -> (W, Digest, u64) {
        (self.out, Digest(self.hash.finalize().into()), self.len)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or_default());
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
