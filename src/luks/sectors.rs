//! Requests of any length on sectors that are encrypted whole.
//!
//! A write of a part of a sector reads the rest of it first. What is read and written, others fetch
//! and store; the callers' memory is never encrypted or decrypted in place.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{PoisonError, RwLock};

use super::Cipher;
use crate::addr::Unit;
use crate::block::{total, total_mut, window, window_mut};
use crate::error::{Error, Result};

/// The unit of encryption.
const SECTOR: Unit = Unit::from_bits(9);
/// Bytes that are encrypted or decrypted at a time.
const CHUNK: u64 = 1 << 20;

/// Fetches the stored bytes at an offset.
type Fetch<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<()>;
/// Stores bytes at an offset.
type Store<'a> = &'a dyn Fn(u64, &[u8]) -> Result<()>;

/// Where a request begins.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// In bytes, where it is stored.
    pub stored: u64,
    /// In bytes, what the numbers of its sectors are counted from.
    pub counted: u64,
}

/// Sectors under one cipher, for many threads at once.
pub struct Sectors {
    cipher: Cipher,
    /// Held exclusively by writes of parts of sectors, shared by all others: what such a write
    /// has read around its bytes must not go stale.
    whole: RwLock<()>,
}

impl Sectors {
    /// The sectors that `cipher` encrypts.
    pub fn new(cipher: Cipher) -> Sectors {
        Sectors { cipher, whole: RwLock::new(()) }
    }

    /// Reads and decrypts.
    pub fn read(&self, at: Place, bufs: &mut [IoSliceMut<'_>], fetch: Fetch<'_>) -> Result<()> {
        let mut done = 0;
        let len = total_mut(bufs);
        while done < len {
            let piece = Piece::cut(at, done, len)?;
            let mut bounce = vec![0; piece.padded as usize];
            fetch(piece.stored, &mut bounce)?;
            self.cipher.decrypt(piece.counted, &mut bounce)?;
            let mut from = &bounce[piece.skip as usize..];
            for buf in &mut window_mut(bufs, done, piece.len) {
                let (now, rest) = from.split_at(buf.len().min(from.len()));
                buf.copy_from_slice(now);
                from = rest;
            }
            done += piece.len;
        }
        Ok(())
    }

    /// Encrypts and writes.
    pub fn write(
        &self,
        at: Place,
        bufs: &[IoSlice<'_>],
        fetch: Fetch<'_>,
        store: Store<'_>,
    ) -> Result<()> {
        let len = total(bufs);
        let whole = SECTOR.aligned(at.stored) && SECTOR.aligned(len);
        let _shared = whole.then(|| self.whole.read().unwrap_or_else(PoisonError::into_inner));
        let _alone = (!whole).then(|| self.whole.write().unwrap_or_else(PoisonError::into_inner));
        let mut done = 0;
        while done < len {
            let piece = Piece::cut(at, done, len)?;
            let mut bounce = vec![0; piece.padded as usize];
            for sector in piece.partial() {
                let part = &mut bounce[sector as usize..(sector + SECTOR.bytes()) as usize];
                fetch(piece.stored + sector, part)?;
                self.cipher.decrypt(piece.counted + sector, part)?;
            }
            let mut to = piece.skip as usize;
            for buf in &window(bufs, done, piece.len) {
                bounce[to..to + buf.len()].copy_from_slice(buf);
                to += buf.len();
            }
            self.cipher.encrypt(piece.counted, &mut bounce)?;
            store(piece.stored, &bounce)?;
            done += piece.len;
        }
        Ok(())
    }
}

/// A part of a request that is encrypted at once, and the whole sectors around it.
struct Piece {
    /// The first sector: where it is stored, and what it is counted by.
    stored: u64,
    counted: u64,
    /// Bytes before the request's in the first sector.
    skip: u64,
    /// Bytes of the request.
    len: u64,
    /// Bytes of the sectors.
    padded: u64,
}

impl Piece {
    /// The next piece of a request of `len` bytes at `at`, of which `done` are done.
    fn cut(at: Place, done: u64, len: u64) -> Result<Piece> {
        let (stored, counted) = (at.stored + done, at.counted + done);
        let skip = SECTOR.within(stored);
        if SECTOR.within(counted) != skip {
            let message = "a sector's guest and host offset differ";
            return Err(Error::corrupt(message).at_offset(stored));
        }
        let len = (len - done).min(CHUNK - skip);
        let padded = SECTOR.ceil(skip + len);
        Ok(Piece { stored: stored - skip, counted: counted - skip, skip, len, padded })
    }

    /// The sectors, as offsets within the piece, of which the request has a part only.
    fn partial(&self) -> impl Iterator<Item = u64> {
        let end = self.skip + self.len;
        let first = (self.skip != 0).then_some(0);
        let last = (!SECTOR.aligned(end)).then(|| SECTOR.floor(end));
        first.into_iter().chain(last.filter(|at| first != Some(*at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{MemoryStorage, Storage};

    #[test]
    fn parts_of_sectors_leave_the_rest_of_them() {
        let sectors = Sectors::new(Cipher::legacy(b"secret").unwrap());
        let file = MemoryStorage::default();
        let fetch = |at: u64, bytes: &mut [u8]| file.read_exact_at(at, bytes);
        let store = |at: u64, bytes: &[u8]| file.write_all_at(at, bytes);
        let at = |skip: u64| Place { stored: 4096 + skip, counted: skip };
        let write = |skip: u64, bytes: &[u8]| {
            sectors.write(at(skip), &[IoSlice::new(bytes)], &fetch, &store).unwrap();
        };
        write(0, &[1; 2048]);
        write(300, &[2; 1000]);
        let mut got = [0; 2048];
        sectors.read(at(0), &mut [IoSliceMut::new(&mut got)], &fetch).unwrap();
        let want = |n: usize| if (300..1300).contains(&n) { 2 } else { 1 };
        assert!(got.iter().enumerate().all(|(n, b)| *b == want(n)));
        let mut part = [0; 8];
        sectors.read(at(1296), &mut [IoSliceMut::new(&mut part)], &fetch).unwrap();
        assert_eq!(part, [2, 2, 2, 2, 1, 1, 1, 1]);
    }
}
