//! Directories: a list of names in a file (kernel: Documentation/filesystems/ext4/directory.rst).
//!
//! The index of a large directory hides in entries without a file, so that reading the list needs
//! to know nothing of it.

use super::bytes::{le16, le32};
use super::{Ext4, Inode};
use crate::error::{Error, Result};

/// The most bytes of names that one directory may have here.
const MAX_NAMES: usize = 256 << 20;

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name, as bytes: no encoding is promised.
    pub name: Vec<u8>,
    /// The number of the file's inode.
    pub inode: u32,
}

impl Ext4<'_> {
    /// The names in a directory, without `.` and `..`.
    pub fn entries(&self, directory: &Inode) -> Result<Vec<Entry>> {
        let mut list = List { directory, entries: Vec::new(), bytes: 0 };
        if directory.is_inline() {
            // The first four bytes are the parent's number.
            list.add(directory.block.get(4..).unwrap_or_default())?;
            list.add(directory.inline_rest())?;
            return Ok(list.entries);
        }
        let blocks = directory.size.div_ceil(self.block_size() as u64);
        if blocks > self.blocks() {
            return Err(list.corrupt());
        }
        let mut at = 0;
        while at < blocks {
            let run = directory.run(self, at)?;
            let len = run.len.min(blocks - at);
            for number in 0..len {
                self.go_on()?;
                let Some(place) = run.place else { break };
                list.add(&self.block(place + number)?)?;
            }
            at += len;
        }
        Ok(list.entries)
    }
}

struct List<'a> {
    directory: &'a Inode,
    entries: Vec<Entry>,
    bytes: usize,
}

impl List<'_> {
    fn corrupt(&self) -> Error {
        Error::corrupt(format!("ext4: the directory of inode {} is damaged", self.directory.number))
    }

    /// Adds the entries that stand in `bytes`: a block.
    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        let mut at = 0;
        while let Some(entry) = bytes.get(at..).filter(|rest| rest.len() >= 8) {
            let len = match usize::from(le16(entry, 4)) {
                // In blocks of 64 KiB, 16 bits do not hold their length.
                0 | 0xffff if bytes.len() == 65536 => 65536,
                len => len,
            };
            if len < 8 || len % 4 != 0 || len > entry.len() {
                return Err(self.corrupt());
            }
            let name_len = usize::from(entry.get(6).copied().unwrap_or(0));
            let inode = le32(entry, 0);
            let name = entry.get(8..8 + name_len).filter(|_| 8 + name_len <= len);
            let name = name.ok_or_else(|| self.corrupt())?;
            if inode != 0 && !matches!(name, b"" | b"." | b"..") {
                self.bytes += name_len + size_of::<Entry>();
                if self.bytes > MAX_NAMES || name.contains(&0) || name.contains(&b'/') {
                    return Err(self.corrupt());
                }
                self.entries.push(Entry { name: name.to_vec(), inode });
            }
            at += len;
        }
        Ok(())
    }
}
