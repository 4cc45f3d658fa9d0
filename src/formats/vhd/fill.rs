//! Filling a new dynamic VHD: each block behind the one that came before, its bitmap in front of it.

use std::sync::Arc;

use super::footer::{FOOTER, Footer, Header, Kind, SECTOR, SizeBy};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::formats::fill::{Filling, Places};
use crate::storage::Storage;

/// The empty dynamic image in `storage`, to be filled.
pub fn fill(storage: Arc<dyn Storage>) -> Result<Filling> {
    let bytes = fields::read(&storage, 0, FOOTER, "the VHD header")?;
    let footer = Footer::parse(&bytes, 0, SizeBy::Creator)?;
    if footer.kind != Kind::Dynamic {
        return Err(Error::invalid("not a dynamic VHD"));
    }
    let header = Header::read(&storage, &footer)?;
    let end = storage.len()?.saturating_sub(FOOTER);
    let blocks = Blocks { storage: Arc::clone(&storage), header, footer: bytes, end };
    Ok(Filling::new(storage, footer.size, Box::new(blocks)))
}

struct Blocks {
    storage: Arc<dyn Storage>,
    header: Header,
    footer: Vec<u8>,
    /// Where the footer stands, and the next block will.
    end: u64,
}

impl Places for Blocks {
    fn block(&self) -> Unit {
        self.header.block
    }

    fn place(&mut self, index: u64) -> Result<u64> {
        let Header { table, block, bitmap, .. } = &self.header;
        let sector = u32::try_from(SECTOR.index(self.end))
            .map_err(|_| Error::unsupported("the file outgrows the format"))?;
        let host = self.end + bitmap;
        // All of the block's sectors are in use, and read as zeroes: the footer was here.
        self.storage.set_len(self.end)?;
        self.storage.set_len(host + block.bytes() + FOOTER)?;
        self.storage.write_all_at(self.end, &vec![0xff; *bitmap as usize])?;
        self.storage.write_all_at(table + index * 4, &sector.to_be_bytes())?;
        self.end = host + block.bytes();
        Ok(host)
    }

    fn finish(&mut self) -> Result<()> {
        self.storage.write_all_at(self.end, &self.footer)
    }
}
