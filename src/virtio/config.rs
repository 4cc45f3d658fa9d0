//! What a block device offers: its feature bits and its configuration space (virtio 1.2, 5.2.3 and
//! 5.2.4).
//!
//! It describes a disk in numbers and knows no request.

use byteorder::{ByteOrder, LittleEndian};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

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

/// Length in bytes of the fields that are filled in.
pub(super) const CONFIG_LEN: usize = 60;
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
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
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
    let mut space = [0; CONFIG_LEN];
    LittleEndian::write_u64(&mut space[0..], disk.size() / SECTOR);
    LittleEndian::write_u32(&mut space[12..], MAX_SEGMENTS);
    LittleEndian::write_u32(&mut space[20..], SECTOR as u32);
    space[24] = sectors(physical).ilog2() as u8;
    LittleEndian::write_u16(&mut space[26..], sectors(physical) as u16);
    LittleEndian::write_u32(&mut space[28..], sectors(unit));
    LittleEndian::write_u16(&mut space[34..], queues);
    LittleEndian::write_u32(&mut space[36..], MAX_SECTORS);
    LittleEndian::write_u32(&mut space[40..], MAX_RANGES);
    LittleEndian::write_u32(&mut space[44..], sectors(unit));
    LittleEndian::write_u32(&mut space[48..], MAX_SECTORS);
    LittleEndian::write_u32(&mut space[52..], MAX_RANGES);
    space[56] = 1;
    space
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
