//! Refcounts in the bytes of a refcount block, 1 to 64 bits wide.
//!
//! Specification: qcow2, "Host cluster management".

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The numbers of a kind that `bytes` hold.
fn all<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> &[T] {
    <[T]>::ref_from_prefix(bytes).map_or(&[], |(all, _)| all)
}

/// The same, to be changed.
fn all_mut<T>(bytes: &mut [u8]) -> &mut [T]
where
    T: FromBytes + IntoBytes + KnownLayout + Unaligned,
{
    <[T]>::mut_from_prefix(bytes).map_or(&mut [], |(all, _)| all)
}

/// The largest value of a refcount of `1 << order` bits.
pub(in crate::qcow2) fn max_refcount(order: u32) -> u64 {
    if order >= 6 { u64::MAX } else { (1 << (1 << order)) - 1 }
}

/// Refcount number `index` in a block's bytes; entries narrower than a byte fill it from its
/// lowest bits.
pub(in crate::qcow2) fn get_in(bytes: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let bit = index << order;
            u64::from(bytes[bit / 8] >> (bit % 8)) & max_refcount(order)
        }
        3 => u64::from(bytes[index]),
        4 => all::<U16>(bytes)[index].get().into(),
        5 => all::<U32>(bytes)[index].get().into(),
        _ => all::<U64>(bytes)[index].get(),
    }
}

/// Fills `counts` with the refcounts from number `first` on; they lie within the block's bytes.
pub(in crate::qcow2) fn get_run(bytes: &[u8], order: u32, first: usize, counts: &mut [u64]) {
    if order == 4 {
        // The usual width, in steps that vectorise.
        for (count, found) in counts.iter_mut().zip(&all::<U16>(bytes)[first..]) {
            *count = found.get().into();
        }
        return;
    }
    for (number, count) in counts.iter_mut().enumerate() {
        *count = get_in(bytes, order, first + number);
    }
}

/// Sets refcount number `index`; `value` fits.
pub(in crate::qcow2) fn set_in(bytes: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let bit = index << order;
            let mask = (max_refcount(order) as u8) << (bit % 8);
            let byte = &mut bytes[bit / 8];
            *byte = *byte & !mask | (value as u8) << (bit % 8) & mask;
        }
        3 => bytes[index] = value as u8,
        4 => all_mut::<U16>(bytes)[index].set(value as u16),
        5 => all_mut::<U32>(bytes)[index].set(value as u32),
        _ => all_mut::<U64>(bytes)[index].set(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let mut bytes = [0xff; 64];
            set_in(&mut bytes, order, 3, 0);
            assert_eq!(get_in(&bytes, order, 3), 0);
            let mut run = [7; 4];
            get_run(&bytes, order, 2, &mut run);
            assert_eq!(run, [2, 3, 4, 5].map(|i| get_in(&bytes, order, i)));
            assert!([2, 4].iter().all(|i| get_in(&bytes, order, *i) == max_refcount(order)));
        }
    }
}
