//! Which clusters are taken by tables, and room for copies past everything in use.
//!
//! Nothing that the image refers to is written: copies go behind the end of the file. It knows no
//! table's meaning.

use std::collections::HashSet;

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::error::{Error, Result};
use crate::qcow2::check::counts::Counts;
use crate::qcow2::data::crypt;
use crate::qcow2::image::Image;

/// Copies may always take this much, in bytes, however small the file.
const SMALL: u64 = 4 << 20;

pub(super) struct Ground<'a> {
    image: &'a Image,
    cluster: Unit,
    /// Clusters of tables, by number.
    claimed: HashSet<u64>,
    /// References that data entries make so far.
    uses: Counts,
    /// The largest refcount that this width can say.
    max: u64,
    /// The first cluster past everything.
    next: u64,
    /// Bytes that may still be copied.
    left: u64,
    /// Bytes of the file before any copy.
    file_len: u64,
    /// A cluster of zeroes, and how often it is referred to.
    zeroes: Option<(u64, u64)>,
}

impl<'a> Ground<'a> {
    pub fn new(image: &'a Image, max: u64) -> Result<Ground<'a>> {
        let (file_len, cluster) = (image.storage.len()?, image.shape.cluster);
        Ok(Ground {
            image,
            cluster,
            claimed: HashSet::new(),
            uses: Counts::default(),
            max,
            next: cluster.count(file_len),
            left: file_len.saturating_add(SMALL),
            file_len,
            zeroes: None,
        })
    }

    /// The first cluster, by number, that nothing was ever put in.
    pub fn end(&self) -> u64 {
        self.next
    }

    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Whether a table of `len` bytes can stand at `offset`: on a cluster boundary and in the file.
    pub fn holds(&self, offset: u64, len: u64) -> bool {
        let end = offset.checked_add(len);
        self.cluster.aligned(offset) && offset != 0 && end.is_some_and(|end| end <= self.file_len)
    }

    fn numbers(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let end = offset.saturating_add(len).min(self.file_len);
        self.cluster.index(offset)..self.cluster.count(end)
    }

    /// Takes the clusters of a table for it alone. Whether no other table has any of them; if one
    /// has, nothing is taken.
    pub fn claim(&mut self, offset: u64, len: u64) -> bool {
        let alone = !self.is_claimed(offset, len);
        if alone {
            self.claimed.extend(self.numbers(offset, len));
        }
        alone
    }

    /// Whether a table stands in one of these clusters.
    pub fn is_claimed(&self, offset: u64, len: u64) -> bool {
        self.numbers(offset, len).any(|number| self.claimed.contains(&number))
    }

    /// Counts `times` references of data to these clusters. Whether they can be: no table stands
    /// there, and no refcount overflows.
    pub fn refer(&mut self, offset: u64, len: u64, times: u32) -> bool {
        let fits = |number| self.uses.get(number) + u64::from(times) <= self.max;
        let free = !self.is_claimed(offset, len) && self.numbers(offset, len).all(fits);
        if free {
            for number in self.numbers(offset, len) {
                self.uses.add(number, times);
            }
        }
        free
    }

    /// Bytes of the file as they were before any copy; what lies past its end is zero.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        let have = self.file_len.saturating_sub(offset).min(len) as usize;
        if have > 0 {
            let read = self.image.storage.read_exact_at(offset, &mut bytes[..have]);
            read.map_err(|e| e.at_offset(offset))?;
        }
        Ok(bytes)
    }

    /// Room for `len` bytes, in clusters of its own.
    fn room(&mut self, len: u64) -> Result<u64> {
        let clusters = self.cluster.count(len);
        let bytes = clusters << self.cluster.bits();
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            Error::corrupt(
                "so much of the image is referred to more than once that its repair would double it",
            )
        })?;
        let offset = self.next << self.cluster.bits();
        self.next += clusters;
        if offset.saturating_add(bytes) > 1 << 56 {
            return Err(Error::corrupt("no room is left below 2^56 bytes").at_offset(offset));
        }
        Ok(offset)
    }

    /// Writes a table to a place of its own, and returns that.
    pub fn place(&mut self, bytes: &[u8]) -> Result<u64> {
        let offset = self.room(bytes.len() as u64)?;
        let mut whole = bytes.to_vec();
        whole.resize(self.cluster.ceil(bytes.len() as u64) as usize, 0);
        self.image.storage.write_all_at(offset, &whole)?;
        Ok(offset)
    }

    /// A cluster of zeroes for one more reference.
    pub fn zeroes(&mut self) -> Result<u64> {
        let (place, times) = match self.zeroes {
            Some((place, times)) if times < self.max => (place, times),
            _ => (self.place(&vec![0; self.cluster.bytes() as usize])?, 0),
        };
        self.zeroes = Some((place, times + 1));
        Ok(place)
    }

    /// Copies a cluster of guest data to a place of its own, and returns that. What is encrypted by
    /// its place in the file is encrypted anew.
    pub fn copy_data(&mut self, host: u64) -> Result<u64> {
        let len = self.cluster.bytes();
        if self.image.header().crypt_method != crypt::LUKS {
            let bytes = self.read(host, len)?;
            return self.place(&bytes);
        }
        self.image.data.check_unlocked()?;
        let mut bytes = vec![0; len as usize];
        let bufs = &mut [std::io::IoSliceMut::new(&mut bytes)];
        self.image.data.read(HostOffset(host), GuestOffset(0), bufs)?;
        let offset = self.room(len)?;
        let bufs = &[std::io::IoSlice::new(&bytes)];
        self.image.data.write(HostOffset(offset), GuestOffset(0), bufs)?;
        Ok(offset)
    }
}
