//! New VDI images: a header, a map without a block, and nothing else until something is written.

use zerocopy::{FromZeros, IntoBytes};

use super::{BLOCK, DYNAMIC, HEADER, MAX_SIZE, RawHeader, SECTOR, STATIC, too_large};
use crate::error::Result;
use crate::storage::Storage;

/// What the first bytes say to a reader of text.
const BANNER: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";
const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
/// Bytes of the header that hold fields, counted from the field that says so.
const FIELDS: u32 = 0x180;

/// Makes an image of `size` bytes in `storage`, whatever that holds. Of a `fixed` one every block has
/// its place at once, and reads as zeroes.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the format ends below `size`.
pub fn create(storage: &dyn Storage, size: u64, fixed: bool) -> Result<()> {
    if size > MAX_SIZE {
        return Err(too_large(size));
    }
    let blocks = BLOCK.count(size) as u32;
    let map = SECTOR.ceil(u64::from(blocks) * 4);
    let data = HEADER + map;
    let end = if fixed { data + u64::from(blocks) * BLOCK.bytes() } else { data };
    storage.renew(0..end)?;
    storage.write_all_at(0, header(size, blocks, data as u32, fixed).as_bytes())?;
    // A piece at a time: the largest map takes 2 GiB.
    const PIECE: u32 = 1 << 18;
    for first in (0..blocks).step_by(PIECE as usize) {
        let numbers = first..blocks.min(first.saturating_add(PIECE));
        let entry = |number: u32| if fixed { number } else { super::FREE };
        let bytes: Vec<u8> = numbers.flat_map(|n| entry(n).to_le_bytes()).collect();
        storage.write_all_at(HEADER + u64::from(first) * 4, &bytes)?;
    }
    storage.sync()
}

fn header(size: u64, blocks: u32, data: u32, fixed: bool) -> RawHeader {
    let mut text = [0; 64];
    text[..BANNER.len()].copy_from_slice(BANNER);
    RawHeader {
        text,
        signature: SIGNATURE.into(),
        version: VERSION.into(),
        header_size: FIELDS.into(),
        image_type: if fixed { STATIC } else { DYNAMIC }.into(),
        offset_bmap: (HEADER as u32).into(),
        offset_data: data.into(),
        sector_size: (SECTOR.bytes() as u32).into(),
        disk_size: size.into(),
        block_size: (BLOCK.bytes() as u32).into(),
        blocks_in_image: blocks.into(),
        blocks_allocated: if fixed { blocks } else { 0 }.into(),
        uuid_image: uuid::Uuid::new_v4().into_bytes(),
        uuid_last_snap: uuid::Uuid::new_v4().into_bytes(),
        ..RawHeader::new_zeroed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::addr::GuestOffset;
    use crate::formats::vdi::Vdi;
    use crate::image::{Image, Mapping};
    use crate::storage::MemoryStorage;

    #[test]
    fn a_new_image_opens_and_is_empty_or_all_there() {
        for fixed in [false, true] {
            let storage = Arc::new(MemoryStorage::default());
            create(&*storage, 3_000_320, fixed).unwrap();
            assert_eq!(storage.len().unwrap(), 1024 + if fixed { 3 << 20 } else { 0 });
            let image = Vdi::open(storage).unwrap();
            assert_eq!(image.size(), 3_000_320);
            let all = image.map(GuestOffset(0), 3_000_320).unwrap();
            assert_eq!(all.len, 3_000_320);
            assert_eq!(matches!(all.mapping, Mapping::Data { .. }), fixed);
        }
        assert!(create(&MemoryStorage::default(), MAX_SIZE + 512, false).is_err());
    }
}
