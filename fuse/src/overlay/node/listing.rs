//! What a directory of the overlay shows, in an order that does not change while names come and go.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

/// Places below this are those of `.` and `..`.
pub(crate) const FIRST: u64 = 3;

/// The names in a directory but `.` and `..`, by place.
#[derive(Default)]
pub(crate) struct Listing(pub(crate) BTreeMap<(u64, OsString), (u64, u32)>);

impl Listing {
    /// A place that stays the same; a signed number for the sake of seekdir(3).
    fn place(hash: u64) -> u64 {
        (hash >> 1).max(FIRST)
    }

    pub(crate) fn insert(&mut self, hash: u64, name: &OsStr, ino: u64, kind: u32) {
        self.0.insert((Self::place(hash), name.to_owned()), (ino, kind));
    }

    pub(crate) fn remove(&mut self, hash: u64, name: &OsStr) {
        self.0.remove(&(Self::place(hash), name.to_owned()));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
