//! A guest's physical memory: what lies where.
//!
//! RAM fills addresses from 0, leaves a hole below 4 GiB for devices, and goes on above it.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::error::{Error, Result};
use crate::virtio::Memory;

/// Where the hole for devices begins.
pub const HOLE_START: u64 = 0xd000_0000;
/// Where RAM goes on after the hole.
pub const HOLE_END: u64 = 1 << 32;
/// The first address that a PC's firmware keeps for itself.
pub const FIRMWARE_START: u64 = 0x9_fc00;
/// Where RAM goes on after firmware and option ROMs, and kernels begin.
pub const HIGH_START: u64 = 0x10_0000;

/// The least RAM in bytes that a guest can be given.
pub const MIN_SIZE: u64 = 16 << 20;

/// Physical ranges of RAM, for a guest with `size` bytes.
fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(HOLE_START);
    let high = size - low;
    let mut ranges = vec![(0, low)];
    if high > 0 {
        ranges.push((HOLE_END, high));
    }
    ranges
}

/// RAM of `size` bytes, all zeroes.
pub fn allocate(size: u64) -> Result<Memory> {
    if size < MIN_SIZE || !size.is_multiple_of(4096) {
        return Err(Error::invalid(format!(
            "a guest cannot have {size} bytes of memory: it needs whole 4 KiB pages, \
             {} MiB at least",
            MIN_SIZE >> 20
        )));
    }
    let ranges: Option<Vec<_>> = ranges(size)
        .into_iter()
        .map(|(base, len)| Some((GuestAddress(base), usize::try_from(len).ok()?)))
        .collect();
    let refused = |why: String| {
        Error::invalid(format!(
            "the host cannot give the guest {} MiB of memory: {why}; ask for less with --memory",
            size >> 20
        ))
    };
    let ranges = ranges.ok_or_else(|| refused("too large".into()))?;
    Memory::from_ranges(&ranges).map_err(|error| refused(error.to_string()))
}

/// The end of RAM below the hole.
pub fn low_end(memory: &Memory) -> u64 {
    memory.iter().next().map_or(0, |region| region.len())
}

/// RAM as the firmware's memory map tells it: (first address, length in bytes).
pub fn usable(memory: &Memory) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, FIRMWARE_START), (HIGH_START, low_end(memory) - HIGH_START)];
    usable.extend(memory.iter().skip(1).map(|region| (region.start_addr().0, region.len())));
    usable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_room_for_devices_below_four_gigabytes() {
        assert_eq!(ranges(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ranges(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(ranges(HOLE_START + 4096), [(0, HOLE_START), (HOLE_END, 4096)]);
        assert!(allocate(MIN_SIZE - 4096).is_err());
        assert!(allocate(MIN_SIZE + 1).is_err());
        assert!(allocate(!4095).is_err());
        let memory = allocate(MIN_SIZE).unwrap();
        assert_eq!(usable(&memory), [(0, FIRMWARE_START), (HIGH_START, MIN_SIZE - HIGH_START)]);
    }
}
