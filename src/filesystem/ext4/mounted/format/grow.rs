//! Makes a file system larger that nobody uses: one whose descriptors stand with their groups (meta_bg), so that
//! nothing moves (kernel: Documentation/filesystems/ext4/blockgroup.rst).
//!
//! New groups are written where nothing is yet; then one commit makes them part of the file system. A crash leaves it as
//! it was, or as it is to be, and at most copies of the superblock that are behind.

use std::io::IoSlice;
use std::sync::Arc;

use crate::block::{BlockDevice, BlockStatus};
use crate::error::{Error, Result};
use crate::filesystem::ext4::bytes::{le16, put, put16, put32};
use crate::filesystem::ext4::checksum::checksum;
use crate::filesystem::ext4::mounted::format::{
    BLOCK, BLOCKS_PER_GROUP, DESCRIPTOR, Geometry, INODE_SIZE, write_group, write_superblocks,
};
use crate::filesystem::ext4::mounted::group::BLOCK_UNINIT;
use crate::filesystem::ext4::mounted::group::bitmap;
use crate::filesystem::ext4::mounted::{Mounted, Options, RO_COMPAT_CHECKSUMS, Tx};
use crate::filesystem::ext4::superblock::{self, Superblock};

const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const INCOMPAT_64BIT: u32 = 0x80;
/// Extents that are asked for at once.
const EXTENTS: usize = 1024;

/// Fails where the file system that is all of `device` cannot be made larger here.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
pub fn growable(device: &Arc<dyn BlockDevice>) -> Result<()> {
    let options = Options { read_only: true, ..Options::default() };
    fits(&Mounted::open(device.clone(), 0, u64::MAX, options)?.sb)
}

fn fits(sb: &Superblock) -> Result<()> {
    let as_made_here = sb.block_size as u64 == BLOCK
        && sb.blocks_per_group == BLOCKS_PER_GROUP
        && sb.inode_size as u64 == INODE_SIZE
        && sb.descriptor_size as u64 == DESCRIPTOR
        && sb.first_data_block == 0
        && sb.has_meta_groups_alone()
        && sb.compat & COMPAT_SPARSE_SUPER2 == 0
        && sb.incompat & INCOMPAT_64BIT != 0
        && sb.ro_compat & RO_COMPAT_CHECKSUMS != 0;
    match as_made_here {
        true => Ok(()),
        false => Err(Error::unsupported(
            "ext4: only a file system that vdisk made grows here: mount the disk and run resize2fs in it",
        )),
    }
}

/// Makes the file system that is all of `device` as large as that is; returns its size in bytes. One that is as large
/// already stays as it is.
///
/// # Errors
/// As [`growable`].
pub fn grow(device: &Arc<dyn BlockDevice>) -> Result<u64> {
    let fs = Mounted::open(device.clone(), 0, u64::MAX, Options::default())?;
    fits(&fs.sb)?;
    let old = fs.sb.blocks;
    let new = Geometry::grown(fs.part.len(), fs.sb.inodes_per_group.into())?;
    if new.blocks <= old {
        fs.close()?;
        return Ok(old * BLOCK);
    }
    // What is there beyond its old end was not its own.
    clear(device.as_ref(), old * BLOCK, new.blocks * BLOCK)?;
    let groups = fs.new_groups(device.as_ref(), &new)?;
    fs.part.flush()?;
    fs.change(|tx| tx.take_in(&groups, &new))?;
    fs.close()?;
    let mut raw = vec![0; superblock::LEN];
    fs.part.read(0, superblock::AT, &mut raw)?;
    write_superblocks(&fs, raw, &new)?;
    fs.part.flush()?;
    Ok(new.blocks * BLOCK)
}

/// Makes what holds data between two places read as zeroes.
fn clear(device: &dyn BlockDevice, from: u64, to: u64) -> Result<()> {
    let mut at = from;
    while at < to {
        let extents = device.extents(at, to - at, EXTENTS)?;
        for extent in extents.iter().filter(|e| e.status == BlockStatus::Data) {
            device.write_zeroes(extent.offset, extent.len, true)?;
        }
        let Some(last) = extents.last() else { return Ok(()) };
        at = last.offset + last.len;
    }
    Ok(())
}

/// A group that is to be, and what its descriptor says.
struct NewGroup {
    number: u64,
    descriptor: Vec<u8>,
}

impl Mounted {
    /// The groups beyond the old ones. What of their descriptors stands beyond the old end is written.
    fn new_groups(&self, device: &dyn BlockDevice, new: &Geometry) -> Result<Vec<NewGroup>> {
        let (per, old) = (BLOCK / DESCRIPTOR, self.sb.blocks);
        let mut groups = Vec::new();
        for number in self.sb.groups()..new.groups {
            let mut descriptor = vec![0; DESCRIPTOR as usize];
            write_group(device, new, &self.sb, number, &mut descriptor)?;
            if le16(&descriptor, 0x12) & BLOCK_UNINIT == 0 {
                let place = number * BLOCKS_PER_GROUP + self.sb.base_blocks(number);
                let mut bits = vec![0; BLOCK as usize];
                self.part.read(place, 0, &mut bits)?;
                let sum = checksum(self.sb.seed, &bits);
                put16(&mut descriptor, 0x18, sum as u16);
                put16(&mut descriptor, 0x38, (sum >> 16) as u16);
            }
            self.seal_descriptor(number as u32, &mut descriptor);
            groups.push(NewGroup { number, descriptor });
        }
        for some in groups.chunk_by(|a, b| a.number / per == b.number / per) {
            let Some(first) = some.first() else { continue };
            let (place, _) = self.sb.descriptor(first.number as u32).unwrap_or_default();
            if place >= old {
                let mut block = vec![0; BLOCK as usize];
                for group in some {
                    put(&mut block, (group.number % per * DESCRIPTOR) as usize, &group.descriptor);
                }
                device.write_at(place * BLOCK, &[IoSlice::new(&block)])?;
            }
        }
        Ok(groups)
    }
}

impl Tx<'_> {
    /// Makes the groups part of the file system, and the last one that it had as long as it can be.
    fn take_in(&mut self, groups: &[NewGroup], new: &Geometry) -> Result<()> {
        let sb = self.fs.sb.clone();
        let last = sb.groups() - 1;
        let had = sb.blocks - last * BLOCKS_PER_GROUP;
        self.lengthen(last as u32, had, new.blocks_in(last))?;
        for group in groups {
            let free = u64::from(le16(&group.descriptor, 0xc));
            self.st.counts.free_blocks += free;
            self.st.counts.free_inodes += sb.inodes_per_group;
            let (place, at) = sb.descriptor(group.number as u32).unwrap_or_default();
            if place < sb.blocks {
                put(self.edit(place)?, at, &group.descriptor);
            }
        }
        let (block, at) = (superblock::AT / BLOCK, (superblock::AT % BLOCK) as usize);
        let raw = self.edit(block)?;
        put32(raw, at, (new.groups * u64::from(sb.inodes_per_group)) as u32);
        put32(raw, at + 0x4, new.blocks as u32);
        put32(raw, at + 0x150, (new.blocks >> 32) as u32);
        Ok(())
    }

    /// Gives a group that has `had` blocks as many as `has`.
    fn lengthen(&mut self, number: u32, had: u64, has: u64) -> Result<()> {
        if has <= had {
            return Ok(());
        }
        let mut group = self.group(number)?;
        self.ready_blocks(number, &mut group)?;
        bitmap::clear(self.edit(group.block_bitmap)?, had, has - had);
        group.free_blocks += (has - had) as u32;
        self.set_group(number, &group)?;
        self.st.counts.free_blocks += has - had;
        Ok(())
    }
}
