//! Images in files: an OCI layout in a directory or an archive, and what `docker save` writes (OCI image specification,
//! image-layout.md).
//!
//! Knows no disk and no file system. Files are opened below the layout's directory, and no link is followed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex};
use serde::Deserialize;

use super::digest::{Digest, Verified};
use super::manifest::{
    DEEPEST, Image, LayerBlob, MAX_JSON, Manifest, Platform, blob_name, image, parse,
};
use super::tar::{Archive, Kind};
use crate::error::{Error, ErrorKind, Result};

/// Where blobs are.
enum Place {
    /// A directory, in which the blobs are files.
    Directory,
    /// An archive, with where the contents of each file in it stand.
    Archive(Arc<File>, HashMap<String, Contents>),
}

#[derive(Clone, Copy)]
struct Contents {
    offset: u64,
    len: u64,
}

/// Images in files.
pub struct Layout {
    place: Place,
    path: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Layout {
    /// The layout in the directory `path`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none.
    pub fn directory(path: &Path) -> Result<Layout> {
        let layout = Layout { place: Place::Directory, path: path.to_owned() };
        layout.json("oci-layout")?;
        Ok(layout)
    }

    /// The images in the archive at `path`, of a layout or of `docker save`. It is not unpacked.
    pub fn archive(path: &Path) -> Result<Layout> {
        let mut file =
            File::open(path).map_err(|e| Error::io("cannot be opened", e).at_path(path))?;
        let mut places = HashMap::new();
        let mut links = Vec::new();
        let mut archive = Archive::new(std::io::BufReader::with_capacity(1 << 20, &file));
        while let Some(entry) = archive.next().map_err(|e| e.at_path(path))? {
            let name = normal(&String::from_utf8_lossy(&entry.path));
            match entry.kind {
                Kind::File => {
                    let at = Contents { offset: archive.position(), len: entry.size };
                    places.insert(name, at);
                }
                Kind::Symlink(target) | Kind::Link(target) => links.push((name, target)),
                _ => {}
            }
        }
        drop(archive);
        // Older ones name a layer that two images share by a link.
        for (name, target) in links {
            let target = String::from_utf8_lossy(&target).into_owned();
            let beside = Path::new(&name).parent().unwrap_or(Path::new("")).join(&target);
            let found = [normal(&beside.to_string_lossy()), normal(&target)];
            if let Some(at) = found.iter().find_map(|name| places.get(name).copied()) {
                places.insert(name, at);
            }
        }
        file.seek(SeekFrom::Start(0)).map_err(|e| Error::io("cannot be read", e).at_path(path))?;
        Ok(Layout { place: Place::Archive(Arc::new(file), places), path: path.to_owned() })
    }

    /// The image that `tag` names; without one the only one, or the one for this host's processor.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] lists the images that are there.
    pub fn image(&self, tag: Option<&str>) -> Result<Image> {
        let found = match self.has("index.json") {
            true => self.image_in_index(tag),
            false => self.saved(tag),
        };
        found.map_err(|e| e.at_path(&self.path))
    }

    fn image_in_index(&self, tag: Option<&str>) -> Result<Image> {
        const NAME: &str = "org.opencontainers.image.ref.name";
        let index: ImageIndex = parse(&self.json("index.json")?, "the index")?;
        let name = |d: &Descriptor| d.annotations().as_ref().and_then(|all| all.get(NAME)).cloned();
        let named = |d: &&Descriptor| match (tag, name(d)) {
            (None, _) => true,
            (Some(tag), Some(name)) => is_called(&name, tag),
            (Some(_), None) => false,
        };
        let fitting: Vec<&Descriptor> = index.manifests().iter().filter(named).collect();
        let list = || {
            let names: Vec<String> = index.manifests().iter().filter_map(name).collect();
            if names.is_empty() { "none has a name".to_owned() } else { names.join(", ") }
        };
        let chosen = match fitting[..] {
            [] => {
                let text = format!("holds no image '{}': {}", tag.unwrap_or("latest"), list());
                return Err(Error::new(ErrorKind::NotFound, text));
            }
            [one] => one,
            _ if fitting.iter().all(|d| d.platform().is_some()) => {
                Platform::host().choose(&fitting)?
            }
            _ => return Err(Error::invalid(format!("holds several images, name one: {}", list()))),
        };
        let mut image = self.manifest(chosen, 0)?;
        image.tag = name(chosen);
        Ok(image)
    }

    fn manifest(&self, descriptor: &Descriptor, depth: usize) -> Result<Image> {
        let raw = self.json_blob(descriptor)?;
        match Manifest::read(&raw, descriptor.media_type().as_ref())? {
            Manifest::Index(index) => {
                if depth >= DEEPEST {
                    return Err(Error::corrupt("indexes stand too deep in each other"));
                }
                let all: Vec<&Descriptor> = index.manifests().iter().collect();
                self.manifest(Platform::host().choose(&all)?, depth + 1)
            }
            Manifest::Image(manifest) => {
                let config_json = self.json_blob(manifest.config())?;
                Image::new(&manifest, raw, config_json)
            }
        }
    }

    /// What `docker save` wrote before it wrote layouts.
    fn saved(&self, tag: Option<&str>) -> Result<Image> {
        if !self.has("manifest.json") {
            return Err(Error::invalid(
                "holds neither an OCI layout nor what `docker save` writes",
            ));
        }
        let all: Vec<Saved> = parse(&self.json("manifest.json")?, "the manifest")?;
        let named = |saved: &&Saved| {
            tag.is_none_or(|tag| {
                let tags = saved.repo_tags.as_deref().unwrap_or_default();
                tags.iter().any(|t| is_called(t, tag))
            })
        };
        let fitting: Vec<&Saved> = all.iter().filter(named).collect();
        let tags = || {
            let tags = all.iter().flat_map(|s| s.repo_tags.clone().unwrap_or_default());
            tags.collect::<Vec<_>>().join(", ")
        };
        let saved = match fitting[..] {
            [one] => one,
            [] => {
                let text = format!("holds no image '{}': {}", tag.unwrap_or_default(), tags());
                return Err(Error::new(ErrorKind::NotFound, text));
            }
            _ => return Err(Error::invalid(format!("holds several images, name one: {}", tags()))),
        };
        let config_json = self.json(&saved.config)?;
        let config: ImageConfiguration = parse(&config_json, "a configuration")?;
        let mut blobs = Vec::new();
        for layer in &saved.layers {
            let size = self.len(layer)?;
            blobs.push((None, size, layer.clone()));
        }
        let mut image = image(&config, config_json, None, blobs)?;
        image.tag = saved.repo_tags.as_ref().and_then(|tags| tags.first().cloned());
        Ok(image)
    }

    /// A layer's blob, as it is shipped. Where it is not what it is said to be, its end is an error.
    pub fn layer(&self, layer: &LayerBlob) -> Result<Box<dyn Read + Send>> {
        let blob = self.open(&layer.name)?;
        Ok(match layer.digest {
            Some(digest) => Box::new(Verified::new(blob, "a layer", digest, layer.size)),
            None => blob,
        })
    }

    fn json_blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let digest = Digest::parse(descriptor.digest().as_ref())?;
        let raw = self.json(&blob_name(digest))?;
        match Digest::of(&raw) == digest {
            true => Ok(raw),
            false => {
                Err(Error::corrupt(format!("{digest} holds something else than its digest says")))
            }
        }
    }

    fn json(&self, name: &str) -> Result<Vec<u8>> {
        if self.len(name)? > MAX_JSON {
            return Err(Error::corrupt(format!("{name} is too long to be believed")));
        }
        let mut raw = Vec::new();
        let mut input = self.open(name)?.take(MAX_JSON);
        input.read_to_end(&mut raw).map_err(|e| Error::io(format!("{name} cannot be read"), e))?;
        Ok(raw)
    }

    fn has(&self, name: &str) -> bool {
        self.len(name).is_ok()
    }

    fn len(&self, name: &str) -> Result<u64> {
        match &self.place {
            Place::Directory => {
                let meta = self.file(name)?.metadata();
                Ok(meta.map_err(|e| Error::io(format!("{name} cannot be read"), e))?.len())
            }
            Place::Archive(_, places) => Ok(self.contents(places, name)?.len),
        }
    }

    fn contents(&self, places: &HashMap<String, Contents>, name: &str) -> Result<Contents> {
        places.get(&normal(name)).copied().ok_or_else(|| missing(name))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Read + Send>> {
        match &self.place {
            Place::Directory => Ok(Box::new(self.file(name)?)),
            Place::Archive(file, places) => {
                let Contents { offset, len } = self.contents(places, name)?;
                Ok(Box::new(Part {
                    file: file.clone(),
                    at: offset,
                    end: offset.saturating_add(len),
                }))
            }
        }
    }

    /// A file below the layout's directory.
    fn file(&self, name: &str) -> Result<File> {
        use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
        let io = |e: rustix::io::Errno| match e {
            rustix::io::Errno::NOENT => missing(name),
            e => Error::io(format!("{name} cannot be opened"), e.into()),
        };
        let root =
            open(&self.path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| Error::io("cannot be opened", e.into()))?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let file = File::from(openat2(&root, name, flags, Mode::empty(), resolve).map_err(io)?);
        match file.metadata() {
            Ok(meta) if meta.is_file() => Ok(file),
            Ok(_) => Err(Error::corrupt(format!("{name} is no regular file"))),
            Err(e) => Err(Error::io(format!("{name} cannot be read"), e)),
        }
    }
}

/// Whether an image of the full name `name` is meant by `word`: all of it, its end, or its tag.
fn is_called(name: &str, word: &str) -> bool {
    let before = name.strip_suffix(word);
    before.is_some_and(|before| before.is_empty() || before.ends_with(['/', ':']))
}

fn missing(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no {name} in it"))
}

/// A name in an archive, without what says nothing.
fn normal(name: &str) -> String {
    let mut names: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(names.pop()),
            part => names.push(part),
        }
    }
    names.join("/")
}

/// A stretch of a file.
struct Part {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = buffer.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let read = self.file.read_at(buffer.get_mut(..len).unwrap_or_default(), self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
