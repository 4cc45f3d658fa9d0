//! Filling a new VDI image: blocks stand in the order in which they came.

use std::sync::Arc;

use super::{HEADER, Header};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::formats::fill::{Filling, Places};
use crate::storage::Storage;

/// The empty dynamic image in `storage`, to be filled.
pub fn fill(storage: Arc<dyn Storage>) -> Result<Filling> {
    let header = Header::parse(&fields::read(&storage, 0, HEADER, "the VDI header")?)?;
    if header.fixed || storage.len()? != header.data {
        return Err(Error::invalid("not a VDI image without blocks"));
    }
    let size = header.size;
    let blocks = Blocks { storage: Arc::clone(&storage), header, count: 0 };
    Ok(Filling::new(storage, size, Box::new(blocks)))
}

struct Blocks {
    storage: Arc<dyn Storage>,
    header: Header,
    /// Those that have a place.
    count: u32,
}

impl Places for Blocks {
    fn block(&self) -> Unit {
        self.header.block
    }

    fn place(&mut self, index: u64) -> Result<u64> {
        let bytes = self.header.block.bytes();
        let host = self.header.data + u64::from(self.count) * bytes;
        self.storage.set_len(host + bytes)?;
        self.storage.write_all_at(self.header.map + index * 4, &self.count.to_le_bytes())?;
        self.count += 1;
        Ok(host)
    }

    fn finish(&mut self) -> Result<()> {
        self.storage.write_all_at(0x184, &self.count.to_le_bytes())
    }
}
