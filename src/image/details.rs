//! What a format says about a layer besides its map: for people and scripts, nothing relies on it.

/// Properties of a layer. `None` where the format has no such thing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details {
    /// The format's version.
    pub version: Option<u32>,
    /// How compressed clusters are compressed, as qemu-img names it.
    pub compression: Option<&'static str>,
    /// The width of a refcount.
    pub refcount_bits: Option<u32>,
    /// Whether other programs may write refcounts late.
    pub lazy_refcounts: Option<bool>,
    /// Whether clusters have subclusters.
    pub extended_l2: Option<bool>,
    /// Whether the image was not closed well.
    pub dirty: Option<bool>,
    /// Whether a program found the image corrupt.
    pub corrupt: Option<bool>,
    /// How the data are encrypted, as qemu-img names it.
    pub encryption: Option<&'static str>,
    /// The name of the file that the data stand in, where it is another.
    pub data_file: Option<String>,
    /// Snapshots that the file itself holds.
    pub internal_snapshots: Option<u32>,
}
