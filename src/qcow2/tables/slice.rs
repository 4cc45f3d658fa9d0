//! Slices of L2 tables: looked at under the shared lock, and loaded when they are missing. What is
//! found wrong on the way is noted in the image.

use std::sync::atomic::Ordering;

use crate::addr::GuestOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::header::incompatible;
use crate::qcow2::image::Image;
use crate::qcow2::step;
use crate::qcow2::tables::entry::Entry;
use crate::qcow2::tables::{Place, Tables};

/// What a look at a slice of an L2 table found.
enum Slice<T> {
    Looked(T),
    /// It has to be loaded first.
    Missing(Missing),
}

/// A slice that is not cached.
pub(in crate::qcow2) struct Missing {
    offset: u64,
    len: u64,
    /// Of the cache, when it was missed.
    generation: u64,
}

impl Missing {
    /// The slice at `place`, which the cache of `tables` lacks now.
    pub fn new(tables: &Tables, place: Place) -> Missing {
        let (generation, len) = (tables.cache.generation(), tables.slice_bytes());
        Missing { offset: place.slice, len, generation }
    }
}

impl Image {
    /// The place and value of the L2 entry for `at`, its slice loaded. `None` without L2 table.
    pub(in crate::qcow2) fn load_entry(&self, at: GuestOffset) -> Result<Option<(Place, Entry)>> {
        self.with_slice(at, |tables, found| {
            Ok(found.map(|(place, slice)| (place, tables.entry_in(slice, place))))
        })
    }

    /// Runs `look` with the slice that holds the entry for `at`, under the shared lock.
    pub(in crate::qcow2) fn with_slice<T>(
        &self,
        at: GuestOffset,
        look: impl Fn(&Tables, Option<(Place, &[u8])>) -> Result<T>,
    ) -> Result<T> {
        loop {
            let missing = match self.try_slice(at, &look) {
                Ok(Slice::Looked(found)) => return Ok(found),
                Ok(Slice::Missing(missing)) => missing,
                Err(e) => return Err(self.note_corruption(e)),
            };
            self.load_slice(missing)?;
        }
    }

    fn try_slice<T>(
        &self,
        at: GuestOffset,
        look: &impl Fn(&Tables, Option<(Place, &[u8])>) -> Result<T>,
    ) -> Result<Slice<T>> {
        let tables = self.tables.read();
        let found = match tables.place(at)? {
            Some(place) => match tables.cache.get(place.slice) {
                Some(slice) => Some((place, slice)),
                None => return Ok(Slice::Missing(Missing::new(&tables, place))),
            },
            None => None,
        };
        look(&tables, found).map(Slice::Looked)
    }

    /// Passes an error on that metadata caused. Where that is wrong, the image says so from now on
    /// (qcow2, the corrupt bit), and is not written until a check has mended it: who goes on damages
    /// more.
    pub(in crate::qcow2) fn note_corruption(&self, error: Error) -> Error {
        let notes = !self.read_only && !self.mends && !self.poisoned.load(Ordering::Acquire);
        if error.kind() == ErrorKind::Corrupt && notes {
            if self.shape.version >= 3 {
                // The error that is reported is the one that was found.
                let _ = self.update_header(|h| h.incompatible |= incompatible::CORRUPT);
            }
            self.poisoned.store(true, Ordering::Release);
        }
        error
    }

    /// Reads a slice from the file and caches it, unless the cache let slices go meanwhile: then
    /// the bytes may be older than the file, and the caller looks again.
    pub(in crate::qcow2) fn load_slice(
        &self,
        Missing { offset, len, generation }: Missing,
    ) -> Result<()> {
        let mut bytes = vec![0; len as usize].into_boxed_slice();
        self.storage.about_to(step::L2_LOAD);
        self.storage.read_exact_at(offset, &mut bytes).map_err(|_| {
            Error::corrupt("an L2 table lies past the end of the file").at_offset(offset)
        })?;
        let mut tables = self.tables.write();
        if tables.cache.generation() == generation {
            tables.cache.insert(offset, bytes);
        }
        Ok(())
    }
}
