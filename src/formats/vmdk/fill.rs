//! Writing a sparse extent of a VMDK: grains at its end, plain or compressed behind a marker, as the
//! tables of its directories then say.

use std::io::Write as _;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::sparse::{Header, SECTOR};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::formats::fill::Places;
use crate::storage::Storage;

/// Where the grains of one extent go.
pub(super) struct Grains {
    storage: Arc<dyn Storage>,
    header: Header,
    /// Where the next grain will.
    end: u64,
}

impl Grains {
    /// Behind what stands in `storage`, up to `end`.
    pub(super) fn new(storage: Arc<dyn Storage>, header: Header, end: u64) -> Grains {
        let unit = if header.compressed() { SECTOR } else { header.grain };
        Grains { storage, header, end: unit.ceil(end) }
    }

    fn sector(&self, host: u64) -> Result<u32> {
        u32::try_from(SECTOR.index(host))
            .map_err(|_| Error::unsupported("the file outgrows the format"))
    }
}

impl Places for Grains {
    fn block(&self) -> Unit {
        self.header.grain
    }

    fn place(&mut self) -> Result<u64> {
        if self.header.compressed() {
            return Err(Error::unsupported("this image takes whole grains, compressed"));
        }
        let host = self.end;
        self.sector(host)?;
        self.storage.renew(host..host + self.header.grain.bytes())?;
        self.end += self.header.grain.bytes();
        Ok(host)
    }

    /// Writes down in each directory's tables where a grain stands.
    fn enter(&mut self, index: u64, host: u64) -> Result<()> {
        let sector = self.sector(host)?;
        let entries = u64::from(self.header.entries);
        // The one that readers use is the last: it names no grain that the other does not.
        let both = [self.header.redundant, Some(self.header.directory)];
        for directory in both.into_iter().flatten() {
            let place = directory + index / entries * 4;
            let mut table = [0; 4];
            self.storage.read_exact_at(place, &mut table)?;
            let table = u64::from(u32::from_le_bytes(table)) * SECTOR.bytes();
            if table == 0 {
                let message = "the image lacks a grain table, which would have to be made";
                return Err(Error::unsupported(message).at_offset(place));
            }
            let entry = table + index % entries * 4;
            fields::within(entry, 4, self.storage.len()?, "a grain table")?;
            self.storage.write_all_at(entry, &sector.to_le_bytes())?;
        }
        Ok(())
    }

    fn place_compressed(&mut self, index: u64, bytes: &[u8]) -> Result<()> {
        if !self.header.compressed() {
            return Err(Error::unsupported("this subformat does not compress"));
        }
        // A marker of 12 bytes: the grain's first sector, and how many bytes follow.
        let mut packed = SECTOR.index(index * self.header.grain.bytes()).to_le_bytes().to_vec();
        packed.extend_from_slice(&[0; 4]);
        let mut encoder = ZlibEncoder::new(packed, Compression::default());
        let mut grain = bytes.to_vec();
        grain.resize(self.header.grain.bytes() as usize, 0);
        let done = encoder.write_all(&grain).and_then(|()| encoder.finish());
        let mut packed = done.map_err(|e| Error::invalid(format!("cannot be compressed: {e}")))?;
        let len = (packed.len() - 12) as u32;
        packed[8..12].copy_from_slice(&len.to_le_bytes());
        packed.resize(SECTOR.ceil(packed.len() as u64) as usize, 0);
        let host = self.end;
        self.storage.write_all_at(host, &packed)?;
        self.enter(index, host)?;
        self.end += packed.len() as u64;
        Ok(())
    }
}
