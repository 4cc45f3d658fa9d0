//! Zeroing and discarding whole clusters and subclusters: changes of the mapping without data.
//!
//! Specification: qcow2, "Cluster mapping" (the zero flag) and "Extended L2 Entries".

use crate::addr::GuestOffset;
use crate::error::{Error, Result};
use crate::qcow2::image::{Image, Lost};
use crate::qcow2::tables::entry::{Entry, Kind};

/// What becomes of a piece of the disk that loses its data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    /// Zeroes; the host cluster stays where `keep`.
    Zero { keep: bool },
    /// Zeroes if it held anything, or if a lower layer could show through.
    Discarded,
    /// Whatever the layer below holds.
    Exposed,
}

impl Image {
    /// See [`crate::image::Image::zero`].
    pub(in crate::qcow2) fn zero_range(
        &self,
        at: GuestOffset,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        if self.shape.version < 3 {
            if !self.has_backing() && unmap {
                return self.clear_range(at, len, After::Exposed);
            }
            return Err(Error::unsupported("version 2 images have no zero clusters"));
        }
        self.clear_range(at, len, After::Zero { keep: !unmap })
    }

    /// See [`crate::image::Image::discard`].
    pub(in crate::qcow2) fn discard_range(
        &self,
        at: GuestOffset,
        len: u64,
        expose: bool,
    ) -> Result<()> {
        if self.shape.version < 3 && self.has_backing() && !expose {
            return Ok(());
        }
        let plain = expose || self.shape.version < 3;
        self.clear_range(at, len, if plain { After::Exposed } else { After::Discarded })
    }

    fn has_backing(&self) -> bool {
        crate::image::Image::backing(self).is_some()
    }

    fn clear_range(&self, at: GuestOffset, len: u64, after: After) -> Result<()> {
        let unit = self.shape.granularity();
        let size = crate::image::Image::size(self);
        let end = at.checked_add(len).map_or(u64::MAX, |e| e.0).min(size);
        if !unit.aligned(at.0) || !(unit.aligned(end) || end == size) {
            return Err(Error::invalid("only whole clusters are zeroed or discarded"));
        }
        let cluster = self.shape.cluster;
        let leaves_holes = match after {
            // Who keeps the space wants the zeroes said, too.
            After::Zero { keep } => !keep && !self.has_backing(),
            After::Discarded => !self.has_backing(),
            After::Exposed => true,
        };
        if self.data.is_raw() {
            // The data file shows the disk without the tables: it holds the zeroes as well.
            self.zero_data_file(at, end, after == After::Zero { keep: true })?;
        }
        let mut pos = at.0;
        while pos < end {
            if leaves_holes {
                let hole = self.hole(GuestOffset(pos), end - pos)?;
                if hole > 0 {
                    pos += hole;
                    continue;
                }
            }
            let base = cluster.floor(pos);
            let next = (base + cluster.bytes()).min(end);
            let to = if next == size { cluster.bytes() } else { next - base };
            self.clear_cluster(GuestOffset(base), pos - base, to, after)?;
            pos = next;
        }
        if self.data.is_external()
            && matches!(after, After::Zero { keep: false } | After::Discarded)
        {
            // Now, not when the tables are written: the guest may write there again at once, and
            // after a crash it finds zeroes either way. Space that cannot be given back is only
            // space.
            let _ = self.data.storage().punch_hole(at.0, end.saturating_sub(at.0));
        }
        Ok(())
    }

    /// Makes `at..end` zero in a data file that is read without the tables. Encrypted bytes there
    /// mean nothing without the key anyway.
    fn zero_data_file(&self, at: GuestOffset, end: u64, keep: bool) -> Result<()> {
        let (file, len) = (self.data.storage(), end.saturating_sub(at.0));
        if self.data.is_encrypted() || len == 0 {
            return Ok(());
        }
        if keep { file.write_zeroes(at.0, len) } else { file.punch_hole(at.0, len) }
    }

    /// Takes the entries out that map `from..to`, which begins on a cluster boundary and lies within
    /// one L2 table: also past the end of the disk.
    pub(in crate::qcow2) fn expose_table(&self, from: u64, to: u64) -> Result<()> {
        let cluster = self.shape.cluster.bytes();
        let mut at = from;
        while at < to {
            let Some((_, old)) = self.load_entry(GuestOffset(at))? else { return Ok(()) };
            if old != Entry::default() {
                self.clear_cluster(GuestOffset(at), 0, cluster, After::Exposed)?;
            }
            at = at.saturating_add(cluster);
        }
        Ok(())
    }

    /// How far no L2 table exists from `pos` on.
    fn hole(&self, pos: GuestOffset, len: u64) -> Result<u64> {
        let tables = self.tables.read();
        Ok(if tables.table(pos)?.is_none() { tables.unmapped(pos, len) } else { 0 })
    }

    fn clear_cluster(&self, at: GuestOffset, from: u64, to: u64, after: After) -> Result<()> {
        self.write_back_if_crowded()?;
        if let Some((_, old)) = self.load_entry(at)? {
            // Nothing to change: the table need not become this image's own.
            if self.cleared(old, from, to, after)? == old {
                return Ok(());
            }
        }
        self.ensure_table(at)?;
        self.change_entry(at, Lost::Discarded, |old| {
            self.cleared(old, from, to, after).unwrap_or(old)
        })
    }

    /// What `old` becomes when `from..to` of its cluster lose their data.
    fn cleared(&self, old: Entry, from: u64, to: u64, after: After) -> Result<Entry> {
        let shape = self.shape;
        let whole = from == 0 && to == shape.cluster.bytes();
        if old.is_compressed() && !whole {
            let message = "a part of a compressed cluster is zeroed by writing";
            return Err(Error::unsupported(message));
        }
        let empty = Entry::default();
        Ok(match after {
            After::Exposed if whole => empty,
            After::Exposed if shape.host(old).is_none() && old.bitmap == 0 => old,
            After::Exposed => shape.without(old, from, to),
            After::Discarded if whole => {
                let bare = shape.kind(old, 0)? == Kind::Unallocated && old.bitmap == 0;
                if bare && shape.host(old).is_none() && !self.has_backing() {
                    old
                } else {
                    shape.with_zero(empty, from, to, false)
                }
            }
            After::Discarded => shape.with_zero(old, from, to, true),
            After::Zero { keep } => {
                let keep = keep && old.exclusive() || !whole;
                shape.with_zero(old, from, to, keep)
            }
        })
    }
}
