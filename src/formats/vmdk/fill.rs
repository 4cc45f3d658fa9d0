//! Filling a new VMDK of one sparse file: grains at its end, plain or compressed behind a marker, as
//! both directories' tables then say.

use std::io::Write as _;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::sparse::{Header, SECTOR};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields::{self, Fields};
use crate::formats::fill::{Filling, Places};
use crate::storage::Storage;

/// The image in `storage`, which has no grain, to be filled.
pub fn fill(storage: Arc<dyn Storage>) -> Result<Filling> {
    let header = Header::read(&storage)?;
    let head = fields::read(&storage, 0, SECTOR.bytes(), "the VMDK header")?;
    let place = Fields::new(&head, 0).le64(48)?;
    let redundant = SECTOR.start(place).filter(|at| *at != 0 && header.capacity != 0);
    let redundant = redundant.ok_or_else(|| Error::invalid("not a VMDK of one sparse file"))?;
    let size = header.capacity;
    let end = storage.len()?;
    let grains = Grains { storage: Arc::clone(&storage), header, redundant, end };
    Ok(Filling::new(storage, size, Box::new(grains)))
}

struct Grains {
    storage: Arc<dyn Storage>,
    header: Header,
    /// Where the second directory stands.
    redundant: u64,
    /// Where the next grain will.
    end: u64,
}

impl Grains {
    /// Writes down that a grain stands at the end of the file.
    fn enter(&self, index: u64) -> Result<()> {
        let sector = u32::try_from(SECTOR.index(self.end))
            .map_err(|_| Error::unsupported("the file outgrows the format"))?;
        let entries = u64::from(self.header.entries);
        for directory in [self.header.directory, self.redundant] {
            let mut table = [0; 4];
            self.storage.read_exact_at(directory + index / entries * 4, &mut table)?;
            let table = u64::from(u32::from_le_bytes(table)) * SECTOR.bytes();
            let entry = table + index % entries * 4;
            self.storage.write_all_at(entry, &sector.to_le_bytes())?;
        }
        Ok(())
    }
}

impl Places for Grains {
    fn block(&self) -> Unit {
        self.header.grain
    }

    fn place(&mut self, index: u64) -> Result<u64> {
        if self.header.compressed() {
            return Err(Error::unsupported("this image takes whole grains, compressed"));
        }
        let host = self.end;
        self.storage.set_len(host + self.header.grain.bytes())?;
        self.enter(index)?;
        self.end += self.header.grain.bytes();
        Ok(host)
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
        self.storage.write_all_at(self.end, &packed)?;
        self.enter(index)?;
        self.end += packed.len() as u64;
        Ok(())
    }
}
