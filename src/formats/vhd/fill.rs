//! Writing a VHD: of a dynamic one each new block behind the one that came before, its bitmap in front of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::footer::{FOOTER, Footer, HEADER, Header, Kind, SECTOR, SizeBy};
use super::{FREE, Vhd};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::formats::fill::{self, Everywhere, Filling, Places};
use crate::storage::Storage;

/// The image in `storage`, to be written; `size` says which of two sizes it has.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a differencing image.
pub fn fill(storage: Arc<dyn Storage>, size: SizeBy) -> Result<Filling> {
    let image = Vhd::open(Arc::clone(&storage), size)?;
    let header = match (&image.header, image.footer.kind) {
        (Some(header), Kind::Dynamic) => header.clone(),
        (_, Kind::Fixed) => {
            return Ok(Filling::of_image(storage, Arc::new(image), Box::new(Everywhere)));
        }
        _ => return Err(Error::unsupported("differencing VHD images are only read")),
    };
    let (mut end, footer) = last_footer(&storage)?;
    if storage.is_fixed() {
        // The footer at the very end says nothing of the blocks.
        let table = header.table.saturating_add(u64::from(header.entries) * 4);
        let front = table.max(image.footer.header.saturating_add(HEADER));
        end = fill::end(&*storage, &image, header.block, front)?;
    }
    let blocks = Blocks {
        storage: Arc::clone(&storage),
        header,
        footer,
        end: SECTOR.ceil(end),
        whole: BTreeSet::new(),
    };
    Ok(Filling::of_image(storage, Arc::new(image), Box::new(blocks)))
}

/// Where blocks end, and the footer that stands there, or should.
fn last_footer(storage: &Arc<dyn Storage>) -> Result<(u64, Vec<u8>)> {
    let head = fields::read(storage, 0, FOOTER, "the VHD header")?;
    let file = storage.len()?;
    let at = file.saturating_sub(FOOTER);
    let tail = fields::read(storage, at, FOOTER, "the VHD footer")?;
    match Footer::parse(&tail, at, SizeBy::Creator) {
        Ok(_) => Ok((at, tail)),
        // The image opened, so that this one is right.
        Err(_) => Ok((file, head)),
    }
}

struct Blocks {
    storage: Arc<dyn Storage>,
    header: Header,
    footer: Vec<u8>,
    /// Where the footer stands, and the next block will.
    end: u64,
    /// Blocks whose bitmaps name all of their sectors, because it was seen to.
    whole: BTreeSet<u64>,
}

impl Blocks {
    fn entry(&self, index: u64) -> u64 {
        self.header.table + index * 4
    }
}

impl Places for Blocks {
    fn block(&self) -> Unit {
        self.header.block
    }

    fn place(&mut self) -> Result<u64> {
        let Header { block, bitmap, .. } = &self.header;
        let start = self.end;
        u32::try_from(SECTOR.index(start))
            .ok()
            .filter(|sector| *sector != FREE)
            .ok_or_else(|| Error::unsupported("the file outgrows the format"))?;
        let host = start + bitmap;
        let end = host + block.bytes();
        // There is a footer at any time: the new one first, then the bitmap over the old one. All of
        // the block's sectors are in use, and read as zeroes.
        if self.storage.is_fixed() {
            self.storage.set_len(end + FOOTER)?;
        }
        self.storage.write_all_at(end, &self.footer)?;
        if self.storage.is_fixed() {
            self.storage.write_zeroes(host, block.bytes())?;
        } else if FOOTER > *bitmap {
            self.storage.write_zeroes(host, FOOTER - bitmap)?;
        }
        self.storage.write_all_at(start, &vec![0xff; *bitmap as usize])?;
        self.end = end;
        Ok(host)
    }

    fn enter(&mut self, index: u64, host: u64) -> Result<()> {
        let sector = SECTOR.index(host - self.header.bitmap) as u32;
        self.storage.write_all_at(self.entry(index), &sector.to_be_bytes())
    }

    /// Programs that heed the bitmap of a dynamic disk do not read what it does not name.
    fn touch(&mut self, index: u64) -> Result<()> {
        if !self.whole.insert(index) {
            return Ok(());
        }
        let mut sector = [0; 4];
        self.storage.read_exact_at(self.entry(index), &mut sector)?;
        let bitmap = u64::from(u32::from_be_bytes(sector)) * SECTOR.bytes();
        self.storage.write_all_at(bitmap, &vec![0xff; self.header.bitmap as usize])
    }

    fn finish(&mut self) -> Result<()> {
        self.storage.write_all_at(self.end, &self.footer)
    }
}
