//! Bitmaps that stand on other tables get a place of their own; those that cannot be read go.

use super::Salvage;
use crate::error::Result;
use crate::qcow2::bitmap::bits::Bits;
use crate::qcow2::bitmap::directory::{self, Entry, IN_USE};
use crate::qcow2::header::extension::BITMAPS;
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::image::Image;
use crate::qcow2::tables::entry::OFFSET;
use crate::qcow2::tables::words::words_mut;

/// The bitmaps that are kept.
pub(super) struct Bitmaps {
    list: Vec<Entry>,
    /// Whether the directory has to be written.
    changed: bool,
}

impl Image {
    /// Whether each bitmap that means something can be read.
    pub(super) fn bitmaps_are_sound(&self, header: &Header) -> bool {
        let list = directory::read(&*self.storage, header);
        list.is_ok_and(|list| list.iter().all(|entry| self.bitmap_fits(entry)))
    }

    fn bitmap_fits(&self, entry: &Entry) -> bool {
        let bits = || Bits::read(&*self.storage, entry, self.shape.cluster, self.header().size);
        entry.is(IN_USE) || bits().is_ok()
    }
}

impl Salvage<'_> {
    /// Claims what the bitmaps stand in. Their clusters are nobody else's: what overlaps is copied
    /// at once.
    pub(super) fn claim_bitmaps(&mut self, header: &Header) -> Result<Bitmaps> {
        let mut found = Bitmaps { list: Vec::new(), changed: false };
        if header.extension(BITMAPS).is_none() {
            return Ok(found);
        }
        let Some((offset, len)) = directory::place(header) else {
            // Not valid, but counted as long as they are there.
            self.say("the bitmaps: removed, another program has written without them");
            found.changed = true;
            return Ok(found);
        };
        let list = directory::read(&*self.image.storage, header);
        let Some(list) = list.ok().filter(|_| self.ground.holds(offset, len)) else {
            self.say(&format!("the bitmaps: removed, their directory at {offset:#x} is damaged"));
            found.changed = true;
            return Ok(found);
        };
        found.changed = !self.ground.claim(offset, len);
        for entry in list {
            found.changed |= !self.claim_bitmap(entry, &mut found.list)?;
        }
        Ok(found)
    }

    /// Whether the bitmap stays as it is; it is added to `list` where it is kept.
    fn claim_bitmap(&mut self, mut entry: Entry, list: &mut Vec<Entry>) -> Result<bool> {
        let cluster = self.image.shape.cluster;
        let (at, len) = (entry.table_offset, u64::from(entry.table_size) * 8);
        let name = String::from_utf8_lossy(&entry.name).into_owned();
        if len > 0 && !self.ground.holds(at, len) || !self.image.bitmap_fits(&entry) {
            self.say(&format!("bitmap {name}: removed, its table at {at:#x} cannot be read"));
            return Ok(false);
        }
        let mut moves = len > 0 && !self.ground.claim(at, len);
        let mut table = self.ground.read(at, len)?;
        for word in words_mut(&mut table) {
            let value = word.get();
            let host = value & OFFSET;
            if value & !(OFFSET | 1) != 0 || host != 0 && (value & 1 != 0 || !cluster.aligned(host))
            {
                self.say(&format!("bitmap {name}: removed, its table at {at:#x} is damaged"));
                return Ok(false);
            }
            if host == 0
                || host < self.ground.file_len() && self.ground.claim(host, cluster.bytes())
            {
                continue;
            }
            let bytes = self.ground.read(host, cluster.bytes())?;
            word.set(self.ground.place(&bytes)?);
            moves = true;
        }
        if moves {
            self.say(&format!("bitmap {name}: it overlaps other tables: copied"));
            entry.table_offset = self.ground.place(&table)?;
        }
        list.push(entry);
        Ok(!moves)
    }

    /// Writes the directory anew where it moves or changes.
    pub(super) fn rewrite_bitmaps(&mut self, bitmaps: &Bitmaps, header: &mut Header) -> Result<()> {
        if !bitmaps.changed {
            return Ok(());
        }
        if bitmaps.list.is_empty() {
            header.set_extension(BITMAPS, None);
            header.autoclear &= !autoclear::BITMAPS;
            return Ok(());
        }
        let bytes = directory::encode(&bitmaps.list);
        let place = self.ground.place(&bytes)?;
        let data = directory::extension(bitmaps.list.len(), place, bytes.len() as u64);
        header.set_extension(BITMAPS, Some(data));
        Ok(())
    }
}
