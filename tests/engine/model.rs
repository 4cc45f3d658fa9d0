//! A disk as a plain vector of bytes, and operations on both it and the real one.

use std::io::{IoSlice, IoSliceMut};

use vdisk::Result;
use vdisk::internals::block::BlockDevice;

use crate::dice::Dice;

/// One use of a disk. Places are fractions, so that one sequence fits disks of all sizes.
#[derive(Debug, Clone)]
pub enum Op {
    Write { at: u64, len: u64, fill: u64 },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Read { at: u64, len: u64 },
    Flush,
}

/// What the disk must read as.
#[derive(Debug, Clone, Default)]
pub struct Model {
    pub bytes: Vec<u8>,
}

/// The bytes of a write: they depend on their place, so that data that lands elsewhere is found.
pub fn pattern(at: u64, len: u64, fill: u64) -> Vec<u8> {
    (at..at + len).map(|i| ((i.wrapping_mul(31) ^ i >> 9 ^ fill) as u8) | 1).collect()
}

impl Model {
    pub fn new(size: u64) -> Model {
        Model { bytes: vec![0; size as usize] }
    }

    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Does `op` to `disk` and to the model, and compares what is read.
    pub fn apply(&mut self, disk: &dyn BlockDevice, op: &Op) -> Result<()> {
        crate::dice::operation();
        match *op {
            Op::Write { at, len, fill } => {
                let data = pattern(at, len, fill);
                let (front, back) = data.split_at(data.len() / 3);
                disk.write_at(at, &[IoSlice::new(front), IoSlice::new(back)])?;
                self.range(at, len).copy_from_slice(&data);
            }
            Op::Zero { at, len, unmap } => {
                disk.write_zeroes(at, len, unmap)?;
                self.range(at, len).fill(0);
            }
            Op::Discard { at, len } => {
                disk.discard(at, len)?;
                let now = read(disk, at, len)?;
                let old = self.range(at, len);
                let fair = old.iter().zip(&now).all(|(old, now)| now == old || *now == 0);
                assert!(fair, "after a discard of {len} at {at} other bytes show through");
                old.copy_from_slice(&now);
            }
            Op::Read { at, len } => self.compare_range(disk, at, len)?,
            Op::Flush => disk.flush()?,
        }
        Ok(())
    }

    fn range(&mut self, at: u64, len: u64) -> &mut [u8] {
        &mut self.bytes[at as usize..(at + len) as usize]
    }

    pub fn compare(&self, disk: &dyn BlockDevice) -> Result<()> {
        assert_eq!(disk.size(), self.size(), "the disk's size");
        self.compare_range(disk, 0, self.size())
    }

    fn compare_range(&self, disk: &dyn BlockDevice, at: u64, len: u64) -> Result<()> {
        let got = read(disk, at, len)?;
        let want = &self.bytes[at as usize..(at + len) as usize];
        if let Some(i) = first_difference(&got, want) {
            panic!("byte {} reads {:#04x}, not {:#04x}", at + i as u64, got[i], want[i]);
        }
        let extents = disk.extents(at, len, usize::MAX)?;
        let mut pos = at;
        for extent in &extents {
            assert_eq!(extent.offset, pos, "extents have no gaps");
            pos += extent.len;
            if extent.status == vdisk::internals::block::BlockStatus::Zero {
                let part = &want[(extent.offset - at) as usize..(pos - at) as usize];
                assert!(part.iter().all(|b| *b == 0), "{extent:?} is not zero");
            }
        }
        assert_eq!(pos, at + len, "extents cover the range");
        Ok(())
    }
}

pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

pub fn read(disk: &dyn BlockDevice, at: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; len as usize];
    let (front, back) = bytes.split_at_mut(len as usize / 2);
    disk.read_at(at, &mut [IoSliceMut::new(front), IoSliceMut::new(back)])?;
    Ok(bytes)
}

/// A random operation on a disk of `size` bytes; places and lengths like to be near multiples of
/// `unit`.
pub fn random_op(dice: &mut Dice, size: u64, unit: u64) -> Op {
    let kind = dice.below(100);
    let (at, len) = random_range(dice, size, unit);
    match kind {
        _ if len == 0 => Op::Flush,
        0..50 => Op::Write { at, len, fill: dice.next() },
        50..64 => Op::Zero { at, len, unmap: dice.once_in(2) },
        64..78 => Op::Discard { at, len },
        78..92 => Op::Read { at, len },
        _ => Op::Flush,
    }
}

/// A range within `size` bytes.
pub fn random_range(dice: &mut Dice, size: u64, unit: u64) -> (u64, u64) {
    let near = |dice: &mut Dice, of: u64| match dice.below(5) {
        0 | 1 => dice.below(of + 1) / unit * unit,
        2 => dice.below(of + 1) / 512 * 512,
        3 => (dice.below(of + 1) / unit * unit).saturating_sub(dice.below(3)),
        _ => dice.below(of + 1),
    };
    let at = near(dice, size);
    let most = match dice.below(8) {
        0 => size,
        1 | 2 => unit * 4,
        3 | 4 => unit * 2,
        _ => 4096,
    };
    let mut len = near(dice, most.min(size - at));
    if dice.once_in(10) {
        len = size - at;
    }
    (at, len.min(size - at))
}
