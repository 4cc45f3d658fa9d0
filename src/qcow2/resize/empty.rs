//! Emptying an image: it shows nothing but the layer below.
//!
//! Where nothing but the disk stands in the file, the image becomes what it was when it was made,
//! in a few writes, and the file as short as then. Meanwhile the dirty bit stands: what a crash leaves
//! is an empty disk whose refcounts the next opening for writing mends, or the disk as it was.

use crate::addr::GuestOffset;
use crate::error::Result;
use crate::image::Image as _;
use crate::qcow2::data::crypt::LUKS;
use crate::qcow2::guard::lock;
use crate::qcow2::header::Header;
use crate::qcow2::image::Image;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::refcount::bits::set_in;
use crate::qcow2::step;

impl Image {
    /// Takes everything out of the disk, durably. What the layer below holds shows instead; without
    /// one, zeroes.
    pub fn make_empty(&mut self) -> Result<()> {
        self.begin_change()?;
        self.write_back_all()?;
        let header = self.header();
        if self.holds_only_the_disk(&header)? {
            return self.reset(&header);
        }
        // No bitmap records it: what was written is in the layer below by now.
        self.discard_range(GuestOffset(0), self.size(), true)?;
        self.flush()
    }

    /// Whether the file can become that of a new image, with all its refcounts in one block.
    fn holds_only_the_disk(&self, header: &Header) -> Result<bool> {
        let clusters = header.cluster.count(u64::from(header.l1_size) * 8);
        let per_block = header.cluster.bytes() << 3 >> header.refcount_order;
        Ok(header.version >= 3
            && header.snapshots == 0
            && header.crypt_method != LUKS
            && !self.data.is_external()
            && clusters + 3 <= per_block
            && self.bitmaps()?.is_empty())
    }

    /// Makes the header, a refcount table of one block, and an empty L1 table all that there is.
    fn reset(&mut self, header: &Header) -> Result<()> {
        let cluster = header.cluster.bytes();
        let l1 = header.cluster.ceil(u64::from(header.l1_size) * 8);
        let (table, block, new_l1) = (cluster, 2 * cluster, 3 * cluster);
        let end = new_l1 + l1;
        self.set_dirty(true)?;
        self.metadata(|| {
            self.storage.about_to(step::L1_UPDATE);
            self.storage.write_zeroes(header.l1_offset, l1)?;
            // What nothing refers to any more is overwritten next.
            self.storage.sync()?;
            self.storage.about_to(step::EMPTY_IMAGE_PREPARE);
            self.storage.write_zeroes(cluster, end - cluster)?;
            self.storage.sync()?;
            self.storage.about_to(step::L1_UPDATE);
            self.storage.about_to(step::REFTABLE_UPDATE);
            self.update_header(|h| {
                h.l1_offset = new_l1;
                h.refcount_table_offset = table;
                h.refcount_table_clusters = 1;
            })?;
            self.storage.about_to(step::REFBLOCK_ALLOC);
            let mut counts = vec![0; cluster as usize];
            for number in 0..(end / cluster) as usize {
                set_in(&mut counts, header.refcount_order, number, 1);
            }
            self.storage.write_all_at(block, &counts)?;
            self.storage.write_all_at(table, &block.to_be_bytes())?;
            self.storage.sync()?;
            self.storage.set_len(end)?;
            self.data.shortened();
            let capacity = lock(&self.refcounts).capacity();
            let mut new = Refcounts::open(self.storage.clone(), &self.header(), capacity)?;
            new.metadata_map = self.metadata_map.clone();
            *lock(&self.refcounts) = new;
            self.reload_tables()
        })?;
        self.set_dirty(false)
    }
}
