//! Disks of another size: what an image shows past its old end is this file's promise.
//!
//! The header's size is published by one write, and at a moment when that write alone makes the
//! difference: a longer one after all that it uncovers is durable, a shorter one before anything past
//! it is given up. An interrupted change leaves the old disk or the new one. What it leaves besides
//! stands past the end, where nobody sees it, and goes when the disk grows, or is given its size again.
//!
//! While a change lasts, the size in memory is the longer of the two and the header's the one that a
//! crash leaves.

mod compact;
mod empty;
mod shrink;

use std::sync::atomic::Ordering;

use nix::libc::ENOTSUP;

use crate::addr::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::qcow2::create::Preallocation;
use crate::qcow2::guard::lock;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Freed, Image, Lost};
use crate::qcow2::step;

impl Image {
    /// See [`crate::image::Image::resize_over`].
    pub(in crate::qcow2) fn change_size(
        &self,
        size: u64,
        clear: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.check_resizable()?;
        // The caller zeroes the rest of the last cluster.
        self.data.check_unlocked()?;
        self.check_resizable_bitmaps(size)?;
        self.begin_change()?;
        if size > self.header().size { self.grow(size, clear) } else { self.shrink(size, clear) }
    }

    /// What the guest's disk may become: version 2 snapshots do not always say their disk's size.
    fn check_resizable(&self) -> Result<()> {
        let header = self.header();
        if header.snapshots > 0 && header.version < 3 {
            let message = "Can't resize a v2 image which has snapshots";
            return Err(Error::unsupported(message).with_os_error(ENOTSUP));
        }
        Ok(())
    }

    /// Gives a new image, which shows nothing yet and stands in nobody's way, its size.
    pub(in crate::qcow2) fn give_size(&self, size: u64) -> Result<()> {
        self.lengthen_data(size)?;
        self.lengthen_l1(size, size)?;
        self.publish_size(size)?;
        self.size.store(size, Ordering::Release);
        self.show_data_file(0)
    }

    fn grow(&self, size: u64, clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let old = self.header().size;
        self.clear_past_end(old, size)?;
        self.lengthen_data(size)?;
        self.lengthen_l1(size, old)?;
        self.size.store(size, Ordering::Release);
        let done = self
            .show_data_file(old)
            .and_then(|()| self.unseen(clear))
            .and_then(|()| self.write_back())
            .and_then(|()| self.publish_size(size));
        // If it failed, what was written past the end is out of sight again.
        self.size.store(self.header().size, Ordering::Release);
        done
    }

    /// Mappings are dropped last, and nothing is done where refcounts could not be changed afterwards.
    fn shrink(&self, size: u64, clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.write_back()?;
        lock(&self.refcounts).check_blocks()?;
        let old = self.header().size;
        self.publish_size(size)?;
        let from = self.shape.cluster.ceil(size);
        let done = self.unseen(clear).and_then(|()| match old.checked_sub(from) {
            None | Some(0) => Ok(()),
            Some(len) => self.discard_range(GuestOffset(from), len, true),
        });
        self.size.store(size, Ordering::Release);
        done?;
        self.clear_past_end(size, u64::MAX)?;
        if self.data.is_external() && size < old {
            self.data.shrink(size)?;
        }
        self.shorten_file()
    }

    /// Runs `clear`, which changes only what no disk shows now: no bitmap records it.
    fn unseen(&self, clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let tracking = self.tracking.swap(false, Ordering::AcqRel);
        let done = clear();
        self.tracking.store(tracking, Ordering::Release);
        done
    }

    /// Makes `size`, and bitmaps over as much, what the header says: durable with all that was
    /// written before.
    fn publish_size(&self, size: u64) -> Result<()> {
        if size == self.header().size {
            return Ok(());
        }
        match self.resized_bitmaps(size)? {
            None => self.update_header(|h| h.size = size),
            Some(bitmaps) => self.store_bitmaps(bitmaps, |h| h.size = size),
        }
    }

    /// Takes out what is mapped past the end of a disk of `size` bytes, as far as a disk of `seen`
    /// bytes would show it: what an interrupted change left there, or a snapshot's VM state.
    fn clear_past_end(&self, size: u64, seen: u64) -> Result<()> {
        let header = self.header();
        let entries = |size| header.l1_needed(size).unwrap_or(u64::MAX);
        let (first, last) = (entries(size), entries(seen).min(header.l1_size.into()));
        self.drop_tables(first as usize..last.max(first) as usize)?;
        let (from, to) = (self.shape.cluster.ceil(size), header.l2_coverage().ceil(size).min(seen));
        self.expose_table(from, to)
    }

    /// Makes an external data file as long as the disk: what a longer file holds there is seen by who
    /// reads it without the tables.
    fn lengthen_data(&self, size: u64) -> Result<()> {
        let file = self.data.storage();
        if self.data.is_external() && file.len()? < size { file.set_len(size) } else { Ok(()) }
    }

    /// Whatever a data file holds that is read without the tables is to be seen through them, too.
    fn show_data_file(&self, from: u64) -> Result<()> {
        if !self.data.is_raw() {
            return Ok(());
        }
        self.preallocate(self.shape.cluster.ceil(from), Preallocation::Metadata)
    }

    /// Makes the L1 table long enough for `size` bytes. Where it moves, the header says with that
    /// that the disk has `published` bytes.
    fn lengthen_l1(&self, size: u64, published: u64) -> Result<()> {
        let header = self.header();
        let needed = header.l1_needed(size).ok_or_else(|| Error::invalid("Image is too big"))?;
        if needed <= u64::from(header.l1_size) {
            return Ok(());
        }
        self.move_l1(&header, needed, published)
    }

    /// Moves the L1 table to a place with room for `entries`.
    fn move_l1(&self, old: &Header, entries: u64, published: u64) -> Result<()> {
        let cluster = self.shape.cluster;
        self.storage.about_to(step::L1_GROW[0]);
        let run = lock(&self.refcounts).allocate(cluster.count(entries * 8))?;
        // The clusters may have been used before: the old table's entries go over zeroes.
        if !run.zeroed {
            self.storage.write_zeroes(run.host.0, run.clusters << cluster.bits())?;
        }
        let only = lock(&self.writeback);
        let mut tables = loop {
            self.write_back_under(&only)?;
            let tables = self.tables.write();
            if tables.l1_is_written() {
                break tables;
            }
        };
        let bytes = tables.grown_l1(entries as usize);
        self.metadata(|| {
            self.storage.about_to(step::L1_GROW[1]);
            self.storage.write_all_at(run.host.0, &bytes)?;
            self.storage.sync()?;
            self.storage.about_to(step::L1_GROW[2]);
            self.update_header(|h| {
                h.l1_offset = run.host.0;
                h.l1_size = entries as u32;
                h.size = published;
            })
        })?;
        self.metadata_map.add(run.host.0, entries * 8);
        tables.replace_l1(run.host, entries as usize);
        drop(tables);
        if old.l1_size > 0 {
            let clusters = cluster.count(u64::from(old.l1_size) * 8);
            let host = HostOffset(old.l1_offset);
            self.free_later(Freed { host, clusters, what: Lost::Data });
        }
        Ok(())
    }
}
