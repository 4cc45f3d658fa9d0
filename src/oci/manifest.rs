//! What an image says of itself: its manifest, its configuration, and which of several is for whom (OCI image
//! specification, manifest.md, image-index.md and config.md).
//!
//! Knows no place where these are kept.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::Deserialize;

use super::digest::Digest;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a manifest, an index or a configuration at most.
pub const MAX_JSON: u64 = 4 << 20;
/// Indexes that may stand in each other.
pub const DEEPEST: usize = 8;
/// Layers of one image at most.
pub const MAX_LAYERS: usize = 500;

/// A layer of an image, as it is shipped.
#[derive(Debug, Clone)]
pub struct LayerBlob {
    /// Of the blob, as it is compressed; `None` where only the tar inside is known.
    pub digest: Option<Digest>,
    /// Of the tar.
    pub diff_id: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// How the blob is called, where it is not called by its digest.
    pub(super) name: String,
}

impl LayerBlob {
    /// A layer that is in no layout.
    pub fn unnamed(diff_id: Digest, size: u64) -> LayerBlob {
        LayerBlob { digest: None, diff_id, size, name: String::new() }
    }
}

/// An image: its configuration and its layers.
#[derive(Debug)]
pub struct Image {
    /// What the image says of itself, byte for byte.
    pub config_json: Vec<u8>,
    /// The manifest, byte for byte, where there is one.
    pub manifest_json: Option<Vec<u8>>,
    /// Its layers.
    pub layers: Vec<LayerBlob>,
    /// What it is called where it comes from.
    pub tag: Option<String>,
}

impl Image {
    /// The image of a manifest, `raw`, whose layers are called by their digests.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the configuration knows other layers.
    pub fn new(manifest: &ImageManifest, raw: Vec<u8>, config_json: Vec<u8>) -> Result<Image> {
        let config: ImageConfiguration = parse(&config_json, "a configuration")?;
        let mut blobs = Vec::new();
        for layer in manifest.layers() {
            let digest = Digest::parse(layer.digest().as_ref())?;
            blobs.push((Some(digest), layer.size(), blob_name(digest)));
        }
        image(&config, config_json, Some(raw), blobs)
    }
}

/// A manifest: of an image, or of several.
pub enum Manifest {
    /// Of one image.
    Image(Box<ImageManifest>),
    /// Of images for several platforms.
    Index(Box<ImageIndex>),
}

impl Manifest {
    /// Reads one of the kind that was said, or that it says itself.
    pub fn read(raw: &[u8], said: &str) -> Result<Manifest> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Kind {
            schema_version: u32,
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let kind: Kind = parse(raw, "a manifest")?;
        if kind.schema_version != 2 {
            return Err(Error::unsupported("a manifest of schema 1: its image is to be made anew"));
        }
        let known = |media: &str| media.ends_with("+json");
        let media = kind.media_type.filter(|m| known(m)).unwrap_or_else(|| said.to_owned());
        let index = media.ends_with("index.v1+json") || media.ends_with("manifest.list.v2+json");
        Ok(match index || (kind.manifests.is_some() && !media.ends_with("manifest.v1+json")) {
            true => Manifest::Index(Box::new(parse(raw, "an index")?)),
            false => Manifest::Image(Box::new(parse(raw, "a manifest")?)),
        })
    }
}

/// What an image runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    os: String,
    arch: String,
    variant: Option<String>,
}

impl Platform {
    /// This host's.
    pub fn host() -> Platform {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Platform { os: "linux".to_owned(), arch: arch.to_owned(), variant: None }
    }

    /// The processor, as images name it.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Reads `OS/ARCH[/VARIANT]`, or `ARCH` alone.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`].
    pub fn parse(text: &str) -> Result<Platform> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, arch, variant) = match parts[..] {
            [arch] => ("linux", arch, None),
            [os, arch] => (os, arch, None),
            [os, arch, variant] => (os, arch, Some(variant.to_owned())),
            _ => ("", "", None),
        };
        if os.is_empty() || arch.is_empty() {
            return Err(Error::invalid(format!("'{text}' is no platform: OS/ARCH[/VARIANT]")));
        }
        Ok(Platform { os: os.to_owned(), arch: arch.to_owned(), variant })
    }

    /// The one that is for it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] lists for which there are.
    pub fn choose<'d>(&self, all: &[&'d Descriptor]) -> Result<&'d Descriptor> {
        let fits = |d: &&&Descriptor| {
            d.platform().as_ref().is_none_or(|p| {
                let variant = self.variant.is_none() || *p.variant() == self.variant;
                p.os().to_string() == self.os
                    && p.architecture().to_string() == self.arch
                    && variant
            })
        };
        let chosen = all.iter().find(fits);
        chosen.copied().ok_or_else(|| {
            let there: Vec<String> = all
                .iter()
                .filter_map(|d| d.platform().as_ref())
                .map(|p| format!("{}/{}", p.os(), p.architecture()))
                .collect();
            let text = format!("there is no image for {self}, only for: {}", there.join(", "));
            Error::new(ErrorKind::NotFound, text)
        })
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.arch)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// An image of those blobs: the digest, where it is known, the size and the name of each.
pub fn image(
    config: &ImageConfiguration,
    config_json: Vec<u8>,
    manifest_json: Option<Vec<u8>>,
    blobs: Vec<(Option<Digest>, u64, String)>,
) -> Result<Image> {
    let ids = config.rootfs().diff_ids();
    if ids.len() != blobs.len() {
        return Err(Error::corrupt(format!(
            "the configuration knows {} layers, and there are {}",
            ids.len(),
            blobs.len()
        )));
    }
    if blobs.is_empty() || blobs.len() > MAX_LAYERS {
        return Err(Error::unsupported(format!(
            "an image of {} layers: from 1 to {MAX_LAYERS} can be used",
            blobs.len()
        )));
    }
    let layers = ids.iter().zip(blobs).map(|(id, (digest, size, name))| {
        Ok(LayerBlob { digest, diff_id: Digest::parse(id)?, size, name })
    });
    let layers = layers.collect::<Result<_>>()?;
    Ok(Image { config_json, manifest_json, layers, tag: None })
}

/// Reads `raw`, which is `what` for messages.
pub fn parse<'j, T: Deserialize<'j>>(raw: &'j [u8], what: &str) -> Result<T> {
    serde_json::from_slice(raw).map_err(|e| Error::corrupt(format!("{what} cannot be read: {e}")))
}

/// How a blob is called in a layout.
pub fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_is_read_and_chosen() {
        assert_eq!(Platform::parse("arm64").unwrap().to_string(), "linux/arm64");
        assert_eq!(Platform::parse("linux/arm/v7").unwrap().to_string(), "linux/arm/v7");
        assert!(Platform::parse("a/b/c/d").is_err() && Platform::parse("/x").is_err());
        let digest = Digest::of(b"");
        let entry = |arch: &str, variant: &str| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"{digest}",
                "platform":{{"os":"linux","architecture":"{arch}","variant":"{variant}"}}}}"#
            )
        };
        let raw = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{}]}}"#,
            entry("amd64", ""),
            entry("arm", "v6"),
            entry("arm", "v7")
        );
        let Manifest::Index(index) = Manifest::read(raw.as_bytes(), "").unwrap() else { panic!() };
        let all: Vec<&Descriptor> = index.manifests().iter().collect();
        let variant = |text: &str| {
            let chosen = Platform::parse(text).unwrap().choose(&all)?;
            Ok::<_, Error>(chosen.platform().as_ref().unwrap().variant().clone().unwrap())
        };
        assert!(variant("arm/v7").is_err());
        assert_eq!(variant("linux/arm/v7").unwrap(), "v7");
        assert_eq!(variant("linux/arm").unwrap(), "v6");
        assert!(variant("linux/s390x").unwrap_err().to_string().contains("linux/amd64"));
        assert!(Manifest::read(br#"{"schemaVersion":1}"#, "").is_err());
    }
}
