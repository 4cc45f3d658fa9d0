//! Offsets with a side, and the arithmetic of clusters: the only shifts and masks.
//!
//! A guest offset counts bytes of the disk that a guest sees, a host offset counts bytes of one
//! file. Mixing them up corrupts disks, so they are different types.

use std::fmt;
use std::ops::{Add, Sub};

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The offset `bytes` further on, if it does not overflow.
            pub fn checked_add(self, bytes: u64) -> Option<$name> {
                self.0.checked_add(bytes).map($name)
            }
        }

        impl Add<u64> for $name {
            type Output = $name;
            fn add(self, bytes: u64) -> $name {
                $name(self.0 + bytes)
            }
        }

        impl Sub<$name> for $name {
            type Output = u64;
            fn sub(self, other: $name) -> u64 {
                self.0 - other.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset! {
    /// A byte of the disk that the guest sees.
    GuestOffset
}
offset! {
    /// A byte of one file on the host.
    HostOffset
}

/// A power-of-two unit: a cluster, a subcluster, a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    bits: u32,
}

impl Unit {
    /// The unit of `1 << bits` bytes; `bits` is below 64.
    pub const fn from_bits(bits: u32) -> Unit {
        assert!(bits < 64);
        Unit { bits }
    }

    /// The unit of `bytes` bytes, if that is a power of two.
    pub const fn from_bytes(bytes: u64) -> Option<Unit> {
        if bytes.is_power_of_two() { Some(Unit { bits: bytes.trailing_zeros() }) } else { None }
    }

    /// log2 of the size.
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// The number of the unit that holds byte `offset`.
    pub const fn index(self, offset: u64) -> u64 {
        offset >> self.bits
    }

    /// The first byte of unit number `index`; `None` past 64 bits.
    pub const fn start(self, index: u64) -> Option<u64> {
        index.checked_mul(1 << self.bits)
    }

    /// How far `offset` lies inside its unit.
    pub const fn within(self, offset: u64) -> u64 {
        offset & (self.bytes() - 1)
    }

    /// The start of the unit that holds `offset`.
    pub const fn floor(self, offset: u64) -> u64 {
        offset & !(self.bytes() - 1)
    }

    /// The first boundary at or after `offset`; saturates at the last boundary of 64 bits.
    pub const fn ceil(self, offset: u64) -> u64 {
        match offset.checked_add(self.bytes() - 1) {
            Some(sum) => self.floor(sum),
            None => self.floor(u64::MAX),
        }
    }

    /// How many units hold `bytes` bytes.
    pub const fn count(self, bytes: u64) -> u64 {
        (bytes >> self.bits) + if self.within(bytes) != 0 { 1 } else { 0 }
    }

    /// Whether `offset` is a boundary.
    pub const fn aligned(self, offset: u64) -> bool {
        self.within(offset) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_rounds_and_counts() {
        let unit = Unit::from_bytes(512).unwrap();
        assert_eq!((unit.floor(1023), unit.ceil(1023), unit.count(1023)), (512, 1024, 2));
        assert_eq!((unit.ceil(u64::MAX), unit.count(u64::MAX)), (u64::MAX - 511, 1 << 55));
        assert!(Unit::from_bytes(0).is_none() && Unit::from_bytes(3).is_none());
    }
}
