//! An image from a registry into the store.

use super::Told;
use super::client::{Options, Registry};
use super::disk::is_disk;
use super::download::{Wanted, download};
use super::name::Name;
use crate::error::{Error, Result};
use crate::oci::digest::Digest;
use crate::oci::import::{ImportOptions, Imported, stored};
use crate::oci::manifest::{DEEPEST, Image, MAX_JSON, MAX_LAYERS, Manifest, Platform};
use crate::oci::store::Store;

/// How an image is pulled.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// How the registry is spoken to.
    pub registry: Options,
    /// What the image is to run on, where there are several.
    pub platform: Platform,
    /// The size of its disk.
    pub import: ImportOptions,
}

/// Brings an image into the store, under its whole name. Blobs that are there already are not fetched again, and an
/// interrupted pull goes on from where it was. The image is there when all of it is.
///
/// # Errors
/// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) where the registry lies about sizes or digests.
pub fn pull(store: &Store, name: &Name, how: &PullOptions, told: &Told<'_>) -> Result<Imported> {
    let registry = Registry::new(name, &how.registry, false)?;
    let image = image(&registry, &name.reference(), &how.platform)?;
    let _kept = store.keep_blobs()?;
    let wanted: Vec<Wanted> = image
        .layers
        .iter()
        .filter_map(|l| Some((l.digest?, l.size)))
        .map(|(digest, size)| Wanted { digest, size, target: store.blob(digest) })
        .collect();
    download(&registry, &wanted, told)?;
    let total = wanted.iter().map(|w| w.size).sum();
    stored(store, &image, &name.to_string(), how.import, &mut |_, _| told(total, total))
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
