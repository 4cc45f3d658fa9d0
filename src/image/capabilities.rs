//! What some formats can do and others cannot, each as a trait of its own.
//!
//! A format says by [`Image::capabilities`] which it has. Who wants one asks for it there, or calls the
//! method of the same name on the image, which knows what holds for a format without it.

use super::{Bitmap, Check, Extent, Image, Repair};
use crate::addr::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// The capabilities of a layer; those that its format lacks are `None`.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct Capabilities<'a> {
    /// It records which parts of the disk were written.
    pub bitmaps: Option<&'a dyn Bitmaps>,
    /// It holds tables that can be proved right.
    pub check: Option<&'a dyn Checked>,
    /// It stores compressed clusters.
    pub compress: Option<&'a dyn Compress>,
    /// Parent and child know each other by fingerprints.
    pub fingerprint: Option<&'a dyn Fingerprint>,
    /// It can tell where its bytes stand.
    pub placed: Option<&'a dyn Placed>,
    /// It gives space back to the host.
    pub space: Option<&'a dyn Space>,
}

/// A layer whose tables can be proved right.
pub trait Checked {
    /// Proves the layer right, or says what is wrong and mends what `repair` allows. Nothing else
    /// may use the layer while it is mended.
    ///
    /// # Errors
    /// Only where the check itself cannot go on.
    fn check(&self, repair: Repair) -> Result<Check>;
}

/// A layer that stores compressed clusters.
pub trait Compress {
    /// The compressed form of one whole cluster at `at`; `bytes` are the cluster, or its part up to
    /// the disk's end. `None` where that would save nothing. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where this layer does not compress.
    fn pack(&self, at: GuestOffset, bytes: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Stores what [`pack`](Compress::pack) made of the cluster at `at`. `false`, and nothing done,
    /// where there is no place that the format can tell. Two writers of one cluster are kept apart
    /// by the caller.
    fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool>;

    /// Both at once; `false`, and nothing done, where compressing would save nothing.
    fn write_compressed(&self, at: GuestOffset, bytes: &[u8]) -> Result<bool> {
        let packed = self.pack(at, bytes)?;
        packed.map_or(Ok(false), |packed| self.write_packed(at, &packed))
    }
}

/// A layer with records of which parts of the disk were written.
pub trait Bitmaps {
    /// The records, with all that was written up to now. Those whose last writer did not store them say
    /// nothing and are left out.
    fn bitmaps(&self) -> Result<Vec<Bitmap>>;

    /// Makes the layer's bitmaps say also what `more` say: those of the same name take it in, in their
    /// own granularity; others come to be. Durable; no guest byte changes. Nothing else may write the
    /// layer meanwhile.
    fn add_to_bitmaps(&self, more: &[Bitmap]) -> Result<()>;

    /// Makes `all` the layer's bitmaps, and no others, in one step.
    fn replace_bitmaps(&self, all: &[Bitmap]) -> Result<()>;
}

/// A layer that gives space back to the host.
pub trait Space {
    /// Gives the host's space back that nothing refers to. Others may use the layer meanwhile.
    fn give_back(&self) -> Result<()>;

    /// Bytes of the host's space that [`give_back`](Space::give_back) would give back.
    fn unused(&self) -> Result<u64>;

    /// Cuts the file after the last byte in use. The caller keeps all others out.
    fn shorten(&self) -> Result<()>;
}

/// A layer of a format whose parents and children know each other by fingerprints.
pub trait Fingerprint {
    /// What a child of this layer records to know it again.
    fn fingerprint(&self) -> Option<String>;

    /// The fingerprints that the layer below may have; empty where any will do.
    fn parent_fingerprints(&self) -> Vec<String>;
}

/// A layer that can tell where its bytes stand.
pub trait Placed {
    /// For a layer in several files: which of them `host` stands in, as the layer names it, and
    /// where in it. `None` for the layer's own file.
    fn place(&self, host: HostOffset) -> Option<(&str, HostOffset)> {
        let _ = host;
        None
    }

    /// Where the bytes from `at` of a [`Mapping::Data`](super::Mapping::Data) extent stand, for who can
    /// do without a copy of them; `None` where they are not stored as the guest sees them.
    fn stored(&self, extent: &Extent, at: GuestOffset) -> Option<(&dyn Storage, u64)> {
        let _ = (extent, at);
        None
    }

    /// Whether bytes are stored for an extent that [`Image::narrow`] returned, where that is known
    /// apart from whether it reads as zeroes. For those who look for holes.
    fn is_stored(&self, extent: &Extent) -> Result<Option<bool>> {
        let _ = extent;
        Ok(None)
    }
}

/// What holds for a layer of any format.
#[doc(hidden)]
impl<'i> dyn Image + 'i {
    /// As [`Checked::check`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where there is nothing to be checked.
    pub fn check(&self, repair: Repair) -> Result<Check> {
        let none = || Error::unsupported("this format holds nothing that could be checked");
        self.capabilities().check.ok_or_else(none)?.check(repair)
    }

    fn compress(&self) -> Result<&dyn Compress> {
        let none = || Error::unsupported("this format does not compress");
        self.capabilities().compress.ok_or_else(none)
    }

    /// As [`Compress::pack`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the format does not compress.
    pub fn pack(&self, at: GuestOffset, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        self.compress()?.pack(at, bytes)
    }

    /// As [`Compress::write_packed`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the format does not compress.
    pub fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool> {
        self.compress()?.write_packed(at, packed)
    }

    /// As [`Bitmaps::bitmaps`]; none where the format has none.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        self.capabilities().bitmaps.map_or(Ok(Vec::new()), |layer| layer.bitmaps())
    }

    /// As [`Bitmaps::add_to_bitmaps`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the format has none, and there
    /// are some.
    pub fn add_to_bitmaps(&self, more: &[Bitmap]) -> Result<()> {
        match self.capabilities().bitmaps {
            Some(layer) => layer.add_to_bitmaps(more),
            None => no_bitmaps(more),
        }
    }

    /// As [`Bitmaps::replace_bitmaps`].
    ///
    /// # Errors
    /// As [`add_to_bitmaps`](#method.add_to_bitmaps).
    pub fn replace_bitmaps(&self, all: &[Bitmap]) -> Result<()> {
        match self.capabilities().bitmaps {
            Some(layer) => layer.replace_bitmaps(all),
            None => no_bitmaps(all),
        }
    }

    /// As [`Space::give_back`]; nothing where the format keeps no space for itself.
    pub fn give_back(&self) -> Result<()> {
        self.capabilities().space.map_or(Ok(()), |layer| layer.give_back())
    }

    /// As [`Space::unused`].
    pub fn unused(&self) -> Result<u64> {
        self.capabilities().space.map_or(Ok(0), |layer| layer.unused())
    }

    /// As [`Space::shorten`].
    pub fn shorten(&self) -> Result<()> {
        self.capabilities().space.map_or(Ok(()), |layer| layer.shorten())
    }

    /// As [`Fingerprint::fingerprint`].
    pub fn fingerprint(&self) -> Option<String> {
        self.capabilities().fingerprint?.fingerprint()
    }

    /// As [`Fingerprint::parent_fingerprints`].
    pub fn parent_fingerprints(&self) -> Vec<String> {
        let layer = self.capabilities().fingerprint;
        layer.map_or_else(Vec::new, |layer| layer.parent_fingerprints())
    }

    /// As [`Placed::place`].
    pub fn place(&self, host: HostOffset) -> Option<(&str, HostOffset)> {
        self.capabilities().placed?.place(host)
    }

    /// As [`Placed::stored`].
    pub fn stored(&self, extent: &Extent, at: GuestOffset) -> Option<(&dyn Storage, u64)> {
        self.capabilities().placed?.stored(extent, at)
    }

    /// As [`Placed::is_stored`].
    pub fn is_stored(&self, extent: &Extent) -> Result<Option<bool>> {
        self.capabilities().placed.map_or(Ok(None), |layer| layer.is_stored(extent))
    }
}

fn no_bitmaps(some: &[Bitmap]) -> Result<()> {
    if some.is_empty() { Ok(()) } else { Err(Error::unsupported("this format has no bitmaps")) }
}
