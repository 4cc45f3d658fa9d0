//! What becomes of one L2 table: entries that cannot be read, and data that stands on tables.
//!
//! What could be read before reads the same afterwards. What could not reads as zeroes, never as
//! what a layer below holds: stale data would look like the guest's.

use super::ground::Ground;
use crate::error::Result;
use crate::qcow2::check::Check;
use crate::qcow2::check::walk::L2_RESERVED;
use crate::qcow2::tables::entry::{COPIED, Entry, OFFSET, Shape};

/// The bits of an extended entry's bitmap that say which subclusters are data.
const ALLOCATED: u64 = 0xffff_ffff;

pub(super) struct Entries<'a, 'b> {
    pub shape: Shape,
    /// Whether a layer stands below.
    pub backed: bool,
    pub ground: &'a mut Ground<'b>,
    pub check: &'a mut Check,
}

/// Where a table is referred to from.
#[derive(Clone, Copy)]
pub(super) struct User {
    /// How many L1 entries there are.
    pub times: u32,
    /// The guest offset that the table begins with, in the first table that has it.
    pub guest: u64,
}

impl Entries<'_, '_> {
    /// Mends the entries in a table's bytes. Whether any was changed.
    pub fn mend(&mut self, table: &mut [u8], user: User) -> Result<bool> {
        let mut changed = false;
        for index in 0..table.len() / self.shape.entry_bytes() as usize {
            let old = self.shape.get(table, index);
            if old == Entry::default() {
                continue;
            }
            let guest = user.guest.saturating_add((index as u64) << self.shape.cluster.bits());
            let new = self.mended(old, guest, user.times)?;
            if new != old {
                self.shape.put(table, index, new);
                changed = true;
            }
        }
        Ok(changed)
    }

    fn mended(&mut self, old: Entry, guest: u64, times: u32) -> Result<Entry> {
        if old.is_compressed() {
            return self.compressed(old, guest, times);
        }
        let mut new = Entry { descriptor: old.descriptor & !L2_RESERVED, bitmap: old.bitmap };
        if self.shape.extended {
            // Neither data nor zero is what both bits at once say: it could not be read.
            let both = new.bitmap & new.bitmap >> 32 & ALLOCATED;
            new.bitmap &= !both;
            new.descriptor &= !1;
            if both != 0 {
                self.lost(guest, "subclusters are both zero and data");
            }
        } else if self.shape.version < 3 && new.descriptor & 1 != 0 {
            return self.dead(guest, "an entry has a flag of version 3");
        }
        let Some(host) = self.shape.host(new).map(|host| host.0) else {
            if new.bitmap & ALLOCATED != 0 {
                self.lost(guest, "subclusters are data without a cluster");
                new.bitmap = new.bitmap & !ALLOCATED | (new.bitmap & ALLOCATED) << 32;
            }
            return Ok(new);
        };
        if self.shape.external {
            return Ok(self.external(new, guest, host));
        }
        let spare = self.shape.is_spare(new);
        if !self.shape.cluster.aligned(host) && !spare {
            return self.dead(guest, "a data cluster is not on a cluster boundary");
        }
        if !self.shape.cluster.aligned(host) || host >= self.ground.file_len() {
            // Nothing stands there: what lies past the end reads as zeroes.
            self.say(
                guest,
                &format!("the cluster at {host:#x} is let go: nothing is stored there"),
            );
            return self.unplaced(new);
        }
        if self.ground.refer(host, self.shape.cluster.bytes(), times) {
            return Ok(new);
        }
        if spare {
            return self.unplaced(new);
        }
        self.say(guest, &format!("the cluster at {host:#x} is used otherwise: copied"));
        new.descriptor = new.descriptor & !OFFSET | self.ground.copy_data(host)?;
        Ok(new)
    }

    /// The entry without its cluster, which reads as zeroes where it was data.
    fn unplaced(&mut self, entry: Entry) -> Result<Entry> {
        if self.shape.extended {
            let data = entry.bitmap & ALLOCATED;
            return Ok(Entry { descriptor: 0, bitmap: entry.bitmap & !ALLOCATED | data << 32 });
        }
        self.unread()
    }

    /// Data of a data file stands at its guest offset, and nowhere else.
    fn external(&mut self, new: Entry, guest: u64, host: u64) -> Entry {
        if self.shape.cluster.aligned(host) {
            return new;
        }
        self.say(guest, "the entry pointed elsewhere in the data file");
        Entry { descriptor: new.descriptor & !OFFSET | guest | COPIED, ..new }
    }

    /// What becomes of an entry whose data cannot be read.
    fn dead(&mut self, guest: u64, why: &str) -> Result<Entry> {
        self.lost(guest, why);
        self.unread()
    }

    /// An entry that reads as zeroes.
    pub fn unread(&mut self) -> Result<Entry> {
        Ok(match (self.shape.version, self.backed) {
            (3.., _) => {
                self.shape.with_zero(Entry::default(), 0, self.shape.cluster.bytes(), false)
            }
            (_, false) => Entry::default(),
            // Version 2 has no zero clusters.
            (_, true) => Entry { descriptor: self.ground.zeroes()?, bitmap: 0 },
        })
    }

    fn compressed(&mut self, old: Entry, guest: u64, times: u32) -> Result<Entry> {
        let new = Entry { descriptor: old.descriptor & !COPIED, bitmap: 0 };
        if self.shape.external {
            return self.dead(guest, "a data file holds no compressed clusters");
        }
        let (host, len) = self.shape.compressed(new.descriptor);
        let cluster = self.shape.cluster;
        // The last sector may reach past the end: its length is counted in sectors.
        let end = cluster.ceil(self.ground.file_len());
        let inside = host.0.checked_add(len).is_some_and(|to| to <= end);
        let have = len.min(self.ground.file_len().saturating_sub(host.0));
        if have == 0 {
            return self.dead(guest, "compressed bytes lie past the end of the file");
        }
        if inside && self.ground.refer(host.0, len, times) {
            return Ok(new);
        }
        let bytes = self.ground.read(host.0, have)?;
        let place = self.ground.place(&bytes)?;
        self.say(guest, &format!("the compressed bytes at {:#x} are copied", host.0));
        let moved = self.shape.with_compressed(crate::addr::HostOffset(place), have);
        Ok(moved.unwrap_or(old))
    }

    fn lost(&mut self, guest: u64, why: &str) {
        self.say(guest, &format!("{why}: it could not be read and reads as zeroes now"));
    }

    fn say(&mut self, guest: u64, what: &str) {
        self.check.corruptions_fixed += 1;
        self.check.say(format!("Repairing guest offset {guest:#x}: {what}"));
    }
}
