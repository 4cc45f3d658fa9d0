//! Tables of an image, read page by page as they are looked at: a table is never in memory whole,
//! however large the image says it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::fields;
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Bytes per page: one system call fetches this much of a table.
const PAGE: Unit = Unit::from_bits(14);

/// A file's pages, the recently used ones kept. Takes at most `capacity` times 16 KiB.
pub(super) struct Pages {
    storage: Arc<dyn Storage>,
    len: u64,
    capacity: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    pages: HashMap<u64, (u64, Arc<[u8]>)>,
    clock: u64,
}

impl Pages {
    /// The pages that one image of a single file keeps: 4 MiB.
    pub(super) const DEFAULT: usize = 256;

    /// Reads `storage`, whose length must not shrink, and keeps up to `capacity` pages.
    pub(super) fn new(storage: Arc<dyn Storage>, capacity: usize) -> Result<Pages> {
        let len = storage.len()?;
        Ok(Pages { storage, len, capacity: capacity.max(1), kept: Mutex::default() })
    }

    /// The file's length in bytes when it was opened.
    pub(super) fn file_len(&self) -> u64 {
        self.len
    }

    /// A reader that looks up a page once for the entries it reads from it.
    pub(super) fn cursor(&self) -> Cursor<'_> {
        Cursor { pages: self, current: None }
    }

    fn page(&self, index: u64) -> Result<Arc<[u8]>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let clock = kept.clock;
        if let Some((used, page)) = kept.pages.get_mut(&index) {
            *used = clock;
            return Ok(Arc::clone(page));
        }
        drop(kept);

        let start = PAGE.start(index).filter(|&s| s < self.len).ok_or_else(|| {
            Error::corrupt("a table of the image reaches past the end of the file")
                .at_offset(self.len)
        })?;
        let mut bytes = vec![0; (self.len - start).min(PAGE.bytes()) as usize];
        self.storage.read_exact_at(start, &mut bytes)?;
        let page: Arc<[u8]> = bytes.into();

        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.pages.len() >= self.capacity {
            let oldest = kept.pages.iter().min_by_key(|(_, (used, _))| *used).map(|(&i, _)| i);
            oldest.map(|i| kept.pages.remove(&i));
        }
        kept.pages.insert(index, (clock, Arc::clone(&page)));
        Ok(page)
    }
}

/// Which bit of a byte comes first in a bitmap.
#[derive(Debug, Clone, Copy)]
pub(super) enum BitOrder {
    /// The most significant one: VHD.
    High,
    /// The least significant one: VHDX.
    Low,
}

impl BitOrder {
    fn get(self, byte: u8, bit: u64) -> bool {
        let shift = match self {
            BitOrder::High => 7 - bit,
            BitOrder::Low => bit,
        };
        byte >> shift & 1 == 1
    }
}

/// Reads entries of a table, cheapest when they lie close together.
pub(super) struct Cursor<'a> {
    pages: &'a Pages,
    current: Option<(u64, Arc<[u8]>)>,
}

impl Cursor<'_> {
    /// `N` bytes at a file offset; an error with the offset past the file's end.
    pub(super) fn array<const N: usize>(&mut self, offset: u64) -> Result<[u8; N]> {
        fields::within(offset, N as u64, self.pages.len, "a table entry")?;
        let mut array = [0; N];
        let mut done = 0;
        while done < N {
            let at = offset + done as u64;
            let rest = self.slice(at)?;
            let take = rest.len().min(N - done);
            if let (Some(to), Some(from)) = (array.get_mut(done..done + take), rest.get(..take)) {
                to.copy_from_slice(from);
            }
            done += take;
        }
        Ok(array)
    }

    /// The bit at `first` of the bitmap that stands at file offset `base`, and how many bits from
    /// there have the same value: at least 1, at most `max`, perhaps fewer than there are.
    pub(super) fn bits(
        &mut self,
        base: u64,
        first: u64,
        max: u64,
        order: BitOrder,
    ) -> Result<(bool, u64)> {
        let start = base.checked_add(first / 8).ok_or_else(|| Error::corrupt("no such bitmap"))?;
        let bytes = self.slice(start)?;
        let value = order.get(bytes.first().copied().unwrap_or(0), first % 8);
        let whole = if value { 0xff } else { 0 };
        let mut run = 0;
        for (n, &byte) in bytes.iter().enumerate() {
            let from = if n == 0 { first % 8 } else { 0 };
            if byte == whole {
                run += 8 - from;
            } else {
                let same = (from..8).take_while(|&bit| order.get(byte, bit) == value).count();
                run += same as u64;
                break;
            }
            if run >= max {
                break;
            }
        }
        Ok((value, run.clamp(1, max.max(1))))
    }

    /// The bytes from a file offset to the end of its page; not empty.
    pub(super) fn slice(&mut self, offset: u64) -> Result<&[u8]> {
        let index = PAGE.index(offset);
        if self.current.as_ref().is_none_or(|(held, _)| *held != index) {
            self.current = Some((index, self.pages.page(index)?));
        }
        let page = self.current.as_ref().map(|(_, page)| page);
        page.and_then(|page| page.get(PAGE.within(offset) as usize..))
            .filter(|rest| !rest.is_empty())
            .ok_or_else(|| {
                Error::corrupt("a table of the image reaches past the end of the file")
                    .at_offset(offset)
            })
    }
}
