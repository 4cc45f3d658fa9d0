//! Lends guest memory to the vectored calls of a storage, so that no byte is copied on its way
//! between a guest and a file.
//!
//! It knows neither the guest nor the file: only memory that others may change at any time.

use std::io::{IoSlice, IoSliceMut};

use vm_memory::VolatileSlice;

/// The slices as buffers to be written to a file.
///
/// The guest may change the bytes while they are lent. Whoever reads them must take each byte as
/// found and believe nothing about it that it has not copied first.
pub fn io_slices<'a>(slices: &'a [VolatileSlice<'_>]) -> Vec<IoSlice<'a>> {
    slices
        .iter()
        .map(|slice| {
            // SAFETY: a VolatileSlice vouches that its range is mapped for as long as it lives,
            // and the result borrows it. Any bit pattern is a valid u8. Only the guest's processor
            // can change the bytes meanwhile; it is to this program what another process is to a
            // shared file mapping, and the block layer hands the bytes to the kernel or copies
            // them, so that a change shows as old or new bytes in the guest's own request.
            IoSlice::new(unsafe {
                std::slice::from_raw_parts(slice.ptr_guard().as_ptr(), slice.len())
            })
        })
        .collect()
}

/// The slices as buffers to be filled from a file; `None` when two of them share a byte, since
/// such buffers cannot be lent for writing.
pub fn io_slices_mut<'a>(slices: &'a [VolatileSlice<'_>]) -> Option<Vec<IoSliceMut<'a>>> {
    let mut ranges: Vec<(usize, usize)> =
        slices.iter().map(|s| (s.ptr_guard().as_ptr() as usize, s.len())).collect();
    ranges.sort_unstable();
    if ranges.windows(2).any(|pair| pair[1].0 - pair[0].0 < pair[0].1) {
        return None;
    }
    let lent = slices
        .iter()
        .map(|slice| {
            // SAFETY: as in `io_slices`; no two of these buffers overlap, as was checked above.
            IoSliceMut::new(unsafe {
                std::slice::from_raw_parts_mut(slice.ptr_guard_mut().as_ptr(), slice.len())
            })
        })
        .collect();
    Some(lent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lent_memory_is_the_memory_itself() {
        let mut bytes = [1u8, 2, 3, 4, 5, 6];
        let whole = VolatileSlice::from(&mut bytes[..]);
        let parts = [whole.subslice(0, 2).unwrap(), whole.subslice(4, 2).unwrap()];
        let mut lent = io_slices_mut(&parts).unwrap();
        lent[1].copy_from_slice(&[8, 9]);
        drop(lent);
        let read: Vec<u8> = io_slices(&parts).iter().flat_map(|b| b.to_vec()).collect();
        assert_eq!(read, [1, 2, 8, 9]);
    }

    #[test]
    fn overlapping_memory_is_not_lent_for_writing() {
        let mut bytes = [0u8; 8];
        let whole = VolatileSlice::from(&mut bytes[..]);
        let parts = [whole.subslice(4, 4).unwrap(), whole.subslice(0, 5).unwrap()];
        assert!(io_slices_mut(&parts).is_none());
        assert_eq!(io_slices(&parts).len(), 2);
    }
}
