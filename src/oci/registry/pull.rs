//! An image from a registry into the store.

use super::Told;
use super::client::{Access, Registry};
use super::disk::is_disk;
use super::download::{Wanted, download};
use crate::error::{Error, Result};
use crate::oci::digest::Digest;
use crate::oci::import::{ImportOptions, Imported, stored};
use crate::oci::manifest::{DEEPEST, Image, MAX_JSON, MAX_LAYERS, Manifest, Platform};
use crate::oci::store::{Locked, Store};

/// How an image is pulled.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// What the image is to run on, where there are several.
    pub platform: Platform,
    /// The size of its disk.
    pub import: ImportOptions,
}

/// An image all of whose blobs are in the store, and that is not in it yet.
pub struct Fetched<'a> {
    store: &'a Store,
    name: String,
    image: Image,
    import: ImportOptions,
    total: u64,
    _kept: Locked,
}

/// Brings an image's blobs into the store. Those that are there already are not fetched again, and an
/// interrupted pull goes on from where it was.
///
/// # Errors
/// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) where the registry lies about sizes or digests.
pub fn fetch<'a>(
    store: &'a Store,
    access: &Access,
    how: &PullOptions,
    told: &Told<'_>,
) -> Result<Fetched<'a>> {
    let (registry, name) = (Registry::new(access, false)?, access.name());
    let image = image(&registry, &name.reference(), &how.platform)?;
    let kept = store.keep_blobs()?;
    let wanted: Vec<Wanted> = image
        .layers
        .iter()
        .filter_map(|l| Some((l.digest?, l.size)))
        .map(|(digest, size)| Wanted { digest, size, target: store.blob(digest) })
        .collect();
    download(&registry, &wanted, told)?;
    let total = wanted.iter().map(|w| w.size).sum();
    let (name, import) = (name.to_string(), how.import);
    Ok(Fetched { store, name, image, import, total, _kept: kept })
}

impl Fetched<'_> {
    /// Makes it an image of the store, under its whole name: it is there when all of it is. Asks nobody.
    ///
    /// # Errors
    /// Where a layer is none.
    pub fn import(self, told: &Told<'_>) -> Result<Imported> {
        let total = self.total;
        stored(self.store, &self.image, &self.name, self.import, &mut |_, _| told(total, total))
    }
}

fn image(registry: &Registry, reference: &str, platform: &Platform) -> Result<Image> {
    let mut reference = reference.to_owned();
    for _ in 0..DEEPEST {
        let found = registry.manifest(&reference)?;
        match Manifest::read(&found.raw, &found.media_type)? {
            Manifest::Index(index) => {
                let all: Vec<_> = index.manifests().iter().collect();
                let chosen = platform.choose(&all)?;
                reference = Digest::parse(chosen.digest().as_ref())?.to_string();
            }
            Manifest::Image(manifest) if is_disk(&manifest) => {
                return Err(Error::invalid("is a disk and no image: --to DIR says where it goes"));
            }
            Manifest::Image(manifest) => {
                if manifest.layers().len() > MAX_LAYERS || manifest.config().size() > MAX_JSON {
                    return Err(Error::corrupt("the manifest is not believable"));
                }
                let config = registry.small(Digest::parse(manifest.config().digest().as_ref())?)?;
                return Image::new(&manifest, found.raw, config);
            }
        }
    }
    Err(Error::corrupt("indexes stand too deep in each other"))
}
