//! The superblock, and where the descriptor of a block group stands (kernel:
//! Documentation/filesystems/ext4/super.rst, group_descr.rst).

use super::bytes::{le16, le32, wide};
use super::checksum::checksum;
use crate::error::{Error, Result};

/// Where it stands, and how long it is.
pub const AT: u64 = 1024;
/// Its length in bytes.
pub const LEN: usize = 1024;

const MAGIC: u16 = 0xef53;

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
/// What can be read: filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode,
/// csum_seed, largedir, inline_data, encrypt, casefold.
const KNOWN: u32 = 0x2
    | INCOMPAT_RECOVER
    | INCOMPAT_META_BG
    | 0x40
    | INCOMPAT_64BIT
    | 0x100
    | 0x200
    | 0x400
    | 0x2000
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const COMPAT_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const FLAG_UNSIGNED_HASH: u32 = 0x2;

/// What is needed of it to find files.
#[derive(Debug, Clone)]
pub struct Superblock {
    /// Bytes of a block: 1 KiB to 64 KiB.
    pub block_size: usize,
    /// Blocks of the file system.
    pub blocks: u64,
    /// Inodes of the file system.
    pub inodes: u32,
    /// Inodes of one block group, never 0.
    pub inodes_per_group: u32,
    /// Bytes of an inode: a power of two, 128 at least and a block at most.
    pub inode_size: usize,
    /// The journal's inode, where it has to be replayed.
    pub journal: Option<u32>,
    /// The journal's inode, replayed or not; 0 where there is none.
    pub journal_inode: u32,
    /// The block that the first group begins with.
    pub first_data_block: u64,
    /// Blocks of one block group, never 0.
    pub blocks_per_group: u64,
    /// Bytes of a block group's descriptor.
    pub descriptor_size: usize,
    /// Blocks that are kept free after the descriptors, for more of them.
    pub reserved_descriptors: u64,
    /// The features that a reader may not know.
    pub compat: u32,
    /// The features that a reader has to know.
    pub incompat: u32,
    /// The features that a writer has to know.
    pub ro_compat: u32,
    /// What the checksums of metadata begin with.
    pub seed: u32,
    /// The file system's id.
    pub uuid: [u8; 16],
    /// What the hashes of names begin with.
    pub hash_seed: [u32; 4],
    /// The kind of hash that a new index of a directory gets.
    pub hash_version: u8,
    /// Whether hashes take a name's bytes as unsigned.
    pub hash_unsigned: bool,
    /// The first inode that is nobody's in particular.
    pub first_inode: u32,
    /// Bytes beyond the first 128 that a new inode uses.
    pub extra_size: u16,
    /// Whether it was clean when it was last let go: the bits of `s_state`.
    pub state: u16,
    /// Blocks that only root may use.
    pub reserved_blocks: u64,
    first_meta_group: Option<u64>,
    sparse: Sparse,
}

/// Which block groups begin with a copy of the superblock.
#[derive(Debug, Clone, Copy)]
enum Sparse {
    All,
    Powers,
    Two(u64, u64),
}

impl Superblock {
    /// Reads and checks it.
    pub fn parse(raw: &[u8]) -> Result<Superblock> {
        if le16(raw, 0x38) != MAGIC {
            return Err(Error::corrupt("ext4: there is no superblock"));
        }
        let incompat = le32(raw, 0x60);
        if incompat & INCOMPAT_JOURNAL_DEV != 0 {
            return Err(Error::unsupported("ext4: this is the journal of another file system"));
        }
        if incompat & !KNOWN != 0 {
            let unknown = incompat & !KNOWN;
            return Err(Error::unsupported(format!("ext4: incompatible features {unknown:#x}")));
        }
        let believable = |fine: bool, what: &str| match fine {
            true => Ok(()),
            false => {
                Err(Error::corrupt(format!("ext4: the superblock's {what} is not believable")))
            }
        };
        let log = le32(raw, 0x18);
        believable(log <= 6, "block size")?;
        let block_size = 1024usize << log;
        let inode_size = if le32(raw, 0x4c) == 0 { 128 } else { usize::from(le16(raw, 0x58)) };
        let fits = (128..=block_size).contains(&inode_size) && inode_size.is_power_of_two();
        believable(fits, "inode size")?;
        let wide_descriptors = incompat & INCOMPAT_64BIT != 0;
        let descriptor_size = if wide_descriptors { usize::from(le16(raw, 0xfe)) } else { 32 };
        let fits = (32..=block_size).contains(&descriptor_size);
        believable(fits && descriptor_size.is_power_of_two(), "group descriptor size")?;
        let inodes_per_group = le32(raw, 0x28);
        believable(inodes_per_group > 0, "number of inodes in a group")?;
        let blocks_per_group = u64::from(le32(raw, 0x20));
        believable(blocks_per_group > 0, "number of blocks in a group")?;
        let high = if wide_descriptors { le32(raw, 0x150) } else { 0 };
        let sparse = match (le32(raw, 0x5c), le32(raw, 0x64)) {
            (compat, _) if compat & COMPAT_SPARSE_SUPER2 != 0 => {
                Sparse::Two(le32(raw, 0x24c).into(), le32(raw, 0x250).into())
            }
            (_, ro) if ro & RO_COMPAT_SPARSE_SUPER != 0 => Sparse::Powers,
            _ => Sparse::All,
        };
        Ok(Superblock {
            block_size,
            blocks: wide(high, le32(raw, 0x4)),
            inodes: le32(raw, 0),
            inodes_per_group,
            inode_size,
            journal: journal(raw, incompat)?,
            journal_inode: if le32(raw, 0x5c) & COMPAT_JOURNAL != 0 { le32(raw, 0xe0) } else { 0 },
            first_data_block: le32(raw, 0x14).into(),
            blocks_per_group,
            descriptor_size,
            reserved_descriptors: le16(raw, 0xce).into(),
            compat: le32(raw, 0x5c),
            incompat,
            ro_compat: le32(raw, 0x64),
            seed: match incompat & INCOMPAT_CSUM_SEED {
                0 => checksum(u32::MAX, raw.get(0x68..0x78).unwrap_or_default()),
                _ => le32(raw, 0x270),
            },
            uuid: raw.get(0x68..0x78).and_then(|id| id.try_into().ok()).unwrap_or_default(),
            hash_seed: [0xec, 0xf0, 0xf4, 0xf8].map(|at| le32(raw, at)),
            hash_version: raw.get(0xfc).copied().unwrap_or(0),
            hash_unsigned: le32(raw, 0x160) & FLAG_UNSIGNED_HASH != 0,
            first_inode: if le32(raw, 0x4c) == 0 { 11 } else { le32(raw, 0x54) },
            state: le16(raw, 0x3a),
            extra_size: le16(raw, 0x15e).max(le16(raw, 0x15c)),
            reserved_blocks: wide(
                if wide_descriptors { le32(raw, 0x154) } else { 0 },
                le32(raw, 0x8),
            ),
            first_meta_group: (incompat & INCOMPAT_META_BG != 0)
                .then(|| u64::from(le32(raw, 0x104))),
            sparse,
        })
    }

    /// The block that holds the descriptor of a group, and where in it.
    pub fn descriptor(&self, group: u32) -> Option<(u64, usize)> {
        let per_block = (self.block_size / self.descriptor_size) as u64;
        let (number, index) = (u64::from(group) / per_block, u64::from(group) % per_block);
        let at = index as usize * self.descriptor_size;
        let block = match self.first_meta_group {
            Some(first) if number >= first => {
                let first = number.checked_mul(per_block)?;
                let start = first.checked_mul(self.blocks_per_group)?;
                start
                    .checked_add(self.first_data_block)?
                    .checked_add(self.has_copy(first).into())?
            }
            _ => number.checked_add(self.first_data_block)?.checked_add(1)?,
        };
        Some((block, at))
    }

    /// The first block of the inode table that a group's descriptor names.
    pub fn inode_table(&self, descriptor: &[u8]) -> u64 {
        let high = if self.descriptor_size >= 64 { le32(descriptor, 0x28) } else { 0 };
        wide(high, le32(descriptor, 0x8))
    }

    /// Whether all descriptors stand with their groups.
    pub fn has_meta_groups_alone(&self) -> bool {
        self.first_meta_group == Some(0)
    }

    /// How many block groups there are.
    pub fn groups(&self) -> u64 {
        self.blocks.saturating_sub(self.first_data_block).div_ceil(self.blocks_per_group)
    }

    /// How many blocks at a group's begin hold a copy of the superblock, descriptors, and what is
    /// kept for more of them.
    pub fn base_blocks(&self, group: u64) -> u64 {
        let per_block = (self.block_size / self.descriptor_size) as u64;
        let copy = u64::from(self.has_copy(group));
        match self.first_meta_group {
            Some(first) if group / per_block >= first => {
                let at = group % per_block;
                copy + u64::from(at < 2 || at == per_block - 1)
            }
            first => {
                let all = self.groups().div_ceil(per_block);
                let descriptors = first.map_or(all, |first| first.min(all));
                copy * (1 + descriptors + self.reserved_descriptors)
            }
        }
    }

    /// Whether a group begins with a copy of the superblock.
    pub fn has_copy(&self, group: u64) -> bool {
        let power = |base: u64| {
            let mut at = base;
            while at < group {
                at = at.saturating_mul(base);
            }
            at == group
        };
        match self.sparse {
            Sparse::All => true,
            Sparse::Two(a, b) => group == 0 || group == a || group == b,
            Sparse::Powers => group <= 1 || [3, 5, 7].into_iter().any(power),
        }
    }
}

/// The journal that has to be replayed before anything is right.
fn journal(raw: &[u8], incompat: u32) -> Result<Option<u32>> {
    if incompat & INCOMPAT_RECOVER == 0 {
        return Ok(None);
    }
    match (le32(raw, 0xe0), le32(raw, 0xe4)) {
        (inode, 0) if inode != 0 => Ok(Some(inode)),
        _ => Err(Error::unsupported(
            "ext4: was in use, and its journal is on another device: it cannot be replayed",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_the_superblock_stand_at_powers() {
        let mut raw = vec![0; LEN];
        raw[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        raw[0x20] = 1;
        raw[0x28] = 1;
        raw[0x64] = 1;
        let block = Superblock::parse(&raw).unwrap();
        let with: Vec<u64> = (0..50).filter(|g| block.has_copy(*g)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49]);
        raw[0x18] = 7;
        assert!(Superblock::parse(&raw).is_err());
    }
}
