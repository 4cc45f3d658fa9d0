//! Writing a VDI image: new blocks stand in the order in which they came.

use std::mem::offset_of;
use std::sync::Arc;

use super::{Header, RawHeader, Vdi};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::formats::fill::{self, Filling, Places};
use crate::storage::Storage;

/// Where the header counts the blocks that have a place.
const COUNT: u64 = offset_of!(RawHeader, blocks_allocated) as u64;

/// The image in `storage`, to be written.
pub fn fill(storage: Arc<dyn Storage>) -> Result<Filling> {
    let raw: RawHeader = fields::read_structure(&*storage, 0, "the VDI header")?;
    let header = Header::parse(&raw)?;
    let (blocks, recorded) = (raw.blocks_in_image.get(), raw.blocks_allocated.get());
    if recorded > blocks {
        let message = format!("{recorded} blocks have a place, where the disk has {blocks}");
        return Err(Error::corrupt(message).at_offset(COUNT));
    }
    let image = Arc::new(Vdi::open(Arc::clone(&storage))?);
    // A writer that was killed may have left more blocks than it counted.
    let end = fill::end(&*storage, &*image, header.block, header.data)?;
    let held = header.block.count(end.saturating_sub(header.data));
    let count = u32::try_from(held.max(recorded.into()))
        .map_err(|_| Error::corrupt("more blocks than a map can name").at_offset(COUNT))?;
    let blocks = Blocks { storage: Arc::clone(&storage), header, count };
    Ok(Filling::of_image(storage, image, Box::new(blocks)))
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

    fn place(&mut self) -> Result<u64> {
        let bytes = self.header.block.bytes();
        let host = self.header.data + u64::from(self.count) * bytes;
        let count = self.count.checked_add(1).filter(|count| *count < super::DISCARDED);
        let count = count.ok_or_else(|| Error::unsupported("the file outgrows the format"))?;
        self.storage.renew(host..host + bytes)?;
        // Counted before it is named: whoever trusts the count gives no place twice.
        self.storage.write_all_at(COUNT, &count.to_le_bytes())?;
        self.count = count;
        Ok(host)
    }

    fn enter(&mut self, index: u64, host: u64) -> Result<()> {
        let place = self.header.block.index(host - self.header.data) as u32;
        self.storage.write_all_at(self.header.map + index * 4, &place.to_le_bytes())
    }
}
