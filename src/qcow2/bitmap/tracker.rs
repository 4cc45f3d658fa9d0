//! What is kept in memory of bitmaps that record writes.

use super::bits::Bits;
use super::directory::Entry;

/// The bitmaps that this image keeps right while it is open.
#[derive(Default)]
pub(in crate::qcow2) struct Tracker {
    pub(super) bitmaps: Vec<Bitmap>,
    /// Whether the file says that they are in use.
    pub(super) marked: bool,
}

/// A bitmap with its bits.
pub(in crate::qcow2) struct Bitmap {
    pub(super) entry: Entry,
    /// `None`: as the file has them.
    pub(super) bits: Option<Bits>,
}
