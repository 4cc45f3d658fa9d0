//! Writing a VHDX image: each new block at the end of the file.
//!
//! The log is not used: a block, and the length of the file that holds it, are durable before the one
//! entry changes that names it, so that there is nothing to replay.

use std::sync::Arc;

use super::create::PRESENT;
use super::header::{Header, MIB, Regions};
use super::{Vhdx, replay_log, slot};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fill::{self, Filling, Places};
use crate::storage::Storage;

/// The image in `storage`, to be written. A log in force is replayed first.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a differencing image.
pub fn fill(storage: Arc<dyn Storage>) -> Result<Filling> {
    replay_log(Arc::clone(&storage))?;
    let image = Vhdx::open(Arc::clone(&storage))?;
    if image.metadata.parent.is_some() {
        return Err(Error::unsupported("differencing VHDX images are only read"));
    }
    let (at, len) = Header::read(&storage)?.log;
    let front = Regions::read(&storage)?.end.max(at.saturating_add(len));
    let end = fill::end(&*storage, &image, image.metadata.block, front)?;
    let end = end.checked_next_multiple_of(MIB);
    let blocks = Blocks {
        storage: Arc::clone(&storage),
        block: image.metadata.block,
        bat: image.bat,
        ratio: image.ratio,
        end: end.ok_or_else(|| Error::corrupt("the log lies past 64 bits"))?,
        renewed: false,
    };
    Ok(Filling::of_image(storage, Arc::new(image), Box::new(blocks)))
}

struct Blocks {
    storage: Arc<dyn Storage>,
    block: Unit,
    bat: u64,
    ratio: u64,
    /// Where the next block will stand.
    end: u64,
    /// The headers say that the file changes.
    renewed: bool,
}

impl Blocks {
    fn renew(&mut self) -> Result<()> {
        if !self.renewed {
            Header::renew(&self.storage)?;
            self.renewed = true;
        }
        Ok(())
    }
}

impl Places for Blocks {
    fn block(&self) -> Unit {
        self.block
    }

    fn place(&mut self) -> Result<u64> {
        self.renew()?;
        let host = self.end;
        let end = host.checked_add(self.block.bytes()).filter(|end| *end < 1 << 62);
        let end = end.ok_or_else(|| Error::unsupported("the file outgrows the format"))?;
        self.storage.renew(host..end)?;
        self.end = end;
        Ok(host)
    }

    fn enter(&mut self, index: u64, host: u64) -> Result<()> {
        self.storage.sync()?;
        let entry = self.bat + slot(index, self.ratio) * 8;
        self.storage.write_all_at(entry, &(host | PRESENT).to_le_bytes())
    }

    fn touch(&mut self, _: u64) -> Result<()> {
        self.renew()
    }
}
