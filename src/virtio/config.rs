//! What a block device says of itself: its feature bits, its configuration space (virtio 1.2, 5.2.3 and
//! 5.2.4) and its serial number.
//!
//! It describes a disk in numbers and knows no request.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::request::SECTOR;
use crate::block::BlockDevice;

/// Descriptors in a queue.
pub const QUEUE_SIZE: u16 = 256;
/// Data segments in one request: a queue's worth without header and status.
pub const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges in one discard or write zeroes request.
pub const MAX_RANGES: u32 = 32;
/// Sectors in one range of a discard or write zeroes request: 1 GiB, so that no single request
/// holds a queue for long.
pub const MAX_SECTORS: u32 = (1 << 30) / SECTOR as u32;

/// Length in bytes of what a disk answers to "get id".
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A disk's serial number as a guest reads it: at most 20 bytes, padded with zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id([u8; ID_BYTES]);

impl Id {
    /// The first 20 bytes of `text`.
    pub fn new(text: &str) -> Id {
        let mut bytes = [0; ID_BYTES];
        let len = text.len().min(ID_BYTES);
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        Id(bytes)
    }

    /// All 20 bytes.
    pub fn bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }
}

/// The configuration space (virtio 5.2.4, `virtio_blk_config`), as far as it is filled in.
#[derive(FromZeros, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BlkConfig {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// Length in bytes of the fields that are filled in.
pub(super) const CONFIG_LEN: usize = size_of::<BlkConfig>();
const _: () = assert!(CONFIG_LEN == 60);
/// Where the one field stands that a driver may write.
pub(super) const WRITEBACK: usize = std::mem::offset_of!(BlkConfig, writeback);
/// The largest physical block that guests handle well: file systems choose it as block size.
const MAX_PHYSICAL_BLOCK: u32 = 4096;

/// Whether `features` has the bit with this number.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// The feature bits that a device with this disk and this many queues offers.
pub(super) fn features(disk: &dyn BlockDevice, queues: u16) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
    ];
    if disk.read_only() {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    bits.into_iter().fold(0, |set, bit| set | 1 << bit)
}

/// The configuration space (virtio 5.2.4, `virtio_blk_config`).
///
/// Guests take `blk_size` for the logical block size, which partition tables are laid out by: it is
/// always a sector, and the disk's own unit is told as physical and optimal size.
pub(super) fn space(disk: &dyn BlockDevice, queues: u16) -> [u8; CONFIG_LEN] {
    let unit = disk.block_size().max(SECTOR as u32);
    let physical = unit.min(MAX_PHYSICAL_BLOCK);
    let sectors = |bytes: u32| bytes / SECTOR as u32;
    let config = BlkConfig {
        capacity: (disk.size() / SECTOR).into(),
        seg_max: MAX_SEGMENTS.into(),
        blk_size: (SECTOR as u32).into(),
        physical_block_exp: sectors(physical).ilog2() as u8,
        min_io_size: (sectors(physical) as u16).into(),
        opt_io_size: sectors(unit).into(),
        writeback: 1,
        num_queues: queues.into(),
        max_discard_sectors: MAX_SECTORS.into(),
        max_discard_seg: MAX_RANGES.into(),
        discard_sector_alignment: sectors(unit).into(),
        max_write_zeroes_sectors: MAX_SECTORS.into(),
        max_write_zeroes_seg: MAX_RANGES.into(),
        write_zeroes_may_unmap: 1,
        ..BlkConfig::new_zeroed()
    };
    zerocopy::transmute!(config)
}

/// Fills `data` with the bytes of `space` from `offset`, zeroes past its end.
pub(super) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset).ok().and_then(|start| space.get(start..)).unwrap_or(&[]);
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_past_the_configuration_space_gives_zeroes() {
        let space = [7u8; 4];
        let mut data = [1u8; 4];
        read(&space, 2, &mut data);
        assert_eq!(data, [7, 7, 0, 0]);
        read(&space, u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
