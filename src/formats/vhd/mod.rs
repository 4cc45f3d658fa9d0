//! VHD, Virtual PC's and Hyper-V's first disk image ("vpc" for qemu-img): fixed, dynamic and
//! differencing.
//!
//! A differencing disk answers for the sectors that its bitmaps name and says `Unallocated` for
//! the others; the bitmaps of a dynamic disk carry nothing that its table does not and are not
//! read, as some writers leave them empty.

use std::io::IoSliceMut;
use std::sync::Arc;

use self::footer::{FOOTER, Footer, Header, Kind, SECTOR};
use super::pages::{BitOrder, Cursor, Pages};
use super::{fields, runs};
use crate::addr::{GuestOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Backing, Capabilities, Extent, Fingerprint, Image, Mapping};
use crate::storage::Storage;

mod create;
mod fill;
mod footer;

pub use create::{CreateOptions, create};
pub use fill::fill;
pub use footer::SizeBy;

/// An entry of the block allocation table for a block without data.
const FREE: u32 = u32::MAX;

/// One VHD file, open for reading.
pub struct Vhd {
    storage: Arc<dyn Storage>,
    pages: Pages,
    footer: Footer,
    /// `None` for a fixed disk.
    header: Option<Header>,
}

impl Vhd {
    /// Reads and checks the footer and, if the disk is not fixed, the header. The tables are read
    /// as they are needed. `size` says which of two sizes the disk has.
    pub fn open(storage: Arc<dyn Storage>, size: SizeBy) -> Result<Vhd> {
        let footer = find_footer(&storage, size)?;
        let file = storage.len()?;
        let header = match footer.kind {
            Kind::Fixed if footer.size > file.saturating_sub(FOOTER - 1) => {
                return Err(Error::corrupt(format!(
                    "a fixed disk of {} bytes in a file of {file} bytes",
                    footer.size
                ))
                .at_offset(file.saturating_sub(FOOTER)));
            }
            Kind::Fixed => None,
            Kind::Dynamic | Kind::Differencing => Some(Header::read(&storage, &footer)?),
        };
        let pages = Pages::new(Arc::clone(&storage), Pages::DEFAULT)?;
        Ok(Vhd { storage, pages, footer, header })
    }

    fn piece(&self, table: &mut Cursor<'_>, at: u64) -> Result<runs::Piece> {
        let Some(header) = &self.header else {
            return Ok((runs::data(at), self.footer.size - at));
        };
        let within = header.block.within(at);
        let len = (header.block.bytes() - within).min(self.footer.size - at);
        let entry = header.table + header.block.index(at) * 4;
        let sector = u32::from_be_bytes(table.array(entry)?);
        if sector == FREE {
            return Ok((Mapping::Unallocated, len));
        }
        // Below 2^32 sectors and a block each: no sum here leaves 64 bits.
        let bitmap = u64::from(sector) * SECTOR.bytes();
        let host = bitmap + header.bitmap + within;
        if host + len > self.pages.file_len() {
            return Err(Error::corrupt(format!(
                "the block at sector {sector} reaches past the end of the file"
            ))
            .at_offset(entry));
        }
        if self.footer.kind == Kind::Dynamic {
            return Ok((runs::data(host), len));
        }
        let first = SECTOR.index(within);
        let (here, run) = table.bits(bitmap, first, SECTOR.count(len), BitOrder::High)?;
        let len = len.min(run * SECTOR.bytes() - SECTOR.within(within));
        Ok((if here { runs::data(host) } else { Mapping::Unallocated }, len))
    }
}

/// The footer at the end, else the copy at the beginning that a disk with blocks has.
///
/// The end decides: no guest can write there, while the first sector of a fixed disk is the
/// guest's, who could put the header of a differencing disk there and name any file as its parent.
///
/// Virtual PC before 2004 made footers of 511 bytes: such a file ends one byte before its last
/// sector does.
fn find_footer(storage: &Arc<dyn Storage>, size: SizeBy) -> Result<Footer> {
    let file = storage.len()?;
    let len = if SECTOR.within(file) == FOOTER - 1 { FOOTER - 1 } else { FOOTER };
    let at = file.saturating_sub(len);
    let mut tail = fields::read(storage, at, len, "the VHD footer")?;
    tail.resize(FOOTER as usize, 0);
    let last = Footer::parse(&tail, at, size);
    if last.is_ok() {
        return last;
    }
    let head = fields::read(storage, 0, FOOTER, "the VHD header")?;
    match Footer::parse(&head, 0, size) {
        Ok(footer) if footer.kind != Kind::Fixed => Ok(footer),
        _ => last,
    }
}

fn uuid(id: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}

impl Image for Vhd {
    fn size(&self) -> u64 {
        self.footer.size
    }

    fn cluster(&self) -> Unit {
        runs::CLUSTER
    }

    fn block_size(&self) -> Option<u64> {
        self.header.as_ref().map(|header| header.block.bytes())
    }

    fn backing(&self) -> Option<Backing> {
        let name = self.header.as_ref()?.parent.clone()?;
        Some(Backing { name, format: Some("vpc".to_owned()) })
    }

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.footer.size)?;
        let mut table = self.pages.cursor();
        runs::longest(at, len, |pos| self.piece(&mut table, pos))
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        // A block's holes are the host's own business.
        if self.header.is_some() { Ok(extent) } else { runs::narrow(&self.storage, extent) }
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        runs::read(&self.storage, extent, at, bufs)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { fingerprint: Some(self), ..Capabilities::default() }
    }
}

impl Fingerprint for Vhd {
    /// The disk's UUID. It stays the same when the disk is written.
    fn fingerprint(&self) -> Option<String> {
        Some(uuid(&self.footer.id))
    }

    fn parent_fingerprints(&self) -> Vec<String> {
        let header = self.header.as_ref().filter(|header| header.parent.is_some());
        header
            .filter(|header| header.parent_id != [0; 16])
            .map(|h| uuid(&h.parent_id))
            .into_iter()
            .collect()
    }
}
