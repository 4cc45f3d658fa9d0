//! What stands in a stretch of a disk, told from the first bytes of each format.
//!
//! Only names what it finds: whether the contents are sound is for the kernel to judge.

use std::io::IoSliceMut;

use crate::block::BlockDevice;
use crate::error::Result;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A file system that the kernel may be able to mount.
    FileSystem(FileSystem),
    /// Something known that holds no file system directly.
    Other(&'static str),
    /// Nothing known.
    Unknown,
}

/// A file system of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// What people call it.
    pub name: &'static str,
    /// The name of the kernel's driver.
    pub driver: &'static str,
    /// The option that keeps a read-only mount from writing its journal to the disk.
    pub no_replay: Option<&'static str>,
    /// Whether it can only be read.
    pub read_only: bool,
}

impl FileSystem {
    /// The one that people call so.
    pub fn named(name: &str) -> Option<FileSystem> {
        let known = MAGICS.iter().filter_map(|magic| match magic.content {
            Content::FileSystem(fs) => Some(fs),
            _ => None,
        });
        known.chain(EXT).chain([VFAT]).find(|fs| fs.name == name)
    }
}

impl Content {
    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Content::FileSystem(fs) => fs.name,
            Content::Other(name) => name,
            Content::Unknown => "unknown",
        }
    }
}

/// Bytes that give a format away.
struct Magic {
    offset: u64,
    bytes: &'static [u8],
    content: Content,
}

const fn fs(name: &'static str, no_replay: Option<&'static str>, read_only: bool) -> Content {
    Content::FileSystem(FileSystem { name, driver: name, no_replay, read_only })
}

/// In the order of trust: long and specific magics before short ones. ext and FAT are apart.
const MAGICS: &[Magic] = &[
    Magic { offset: 0, bytes: b"LUKS\xba\xbe", content: Content::Other("LUKS encryption") },
    Magic { offset: 24, bytes: b"LVM2 001", content: Content::Other("LVM2 physical volume") },
    Magic { offset: 512 + 24, bytes: b"LVM2 001", content: Content::Other("LVM2 physical volume") },
    Magic { offset: 4086, bytes: b"SWAPSPACE2", content: Content::Other("swap") },
    Magic {
        offset: 4096,
        bytes: b"\xfc\x4e\x2b\xa9",
        content: Content::Other("Linux RAID member"),
    },
    Magic {
        offset: 0x10040,
        bytes: b"_BHRfS_M",
        content: fs("btrfs", Some("rescue=nologreplay"), false),
    },
    Magic { offset: 0, bytes: b"XFSB", content: fs("xfs", Some("norecovery"), false) },
    Magic { offset: 0, bytes: b"hsqs", content: fs("squashfs", None, true) },
    Magic { offset: 1024, bytes: b"\xe2\xe1\xf5\xe0", content: fs("erofs", None, true) },
    Magic {
        offset: 1024,
        bytes: b"\x10\x20\xf5\xf2",
        content: fs("f2fs", Some("norecovery"), false),
    },
    Magic { offset: 0x8001, bytes: b"CD001", content: fs("iso9660", None, true) },
    Magic { offset: 3, bytes: b"EXFAT   ", content: fs("exfat", None, false) },
    Magic { offset: 3, bytes: b"NTFS    ", content: fs("ntfs3", None, false) },
];

const EXT: [FileSystem; 3] =
    [with_ext4("ext2", None), with_ext4("ext3", Some("noload")), with_ext4("ext4", Some("noload"))];

const fn with_ext4(name: &'static str, no_replay: Option<&'static str>) -> FileSystem {
    FileSystem { name, driver: "ext4", no_replay, read_only: false }
}

const VFAT: FileSystem =
    FileSystem { name: "vfat", driver: "vfat", no_replay: None, read_only: false };

/// Tells what stands in `len` bytes from `offset`.
pub fn probe(device: &dyn BlockDevice, offset: u64, len: u64) -> Result<Content> {
    let reader = Reader { device, offset, len };
    for magic in MAGICS {
        if reader.matches(magic.offset, magic.bytes)? {
            return Ok(magic.content);
        }
    }
    if let Some(content) = ext(&reader)? {
        return Ok(content);
    }
    if fat(&reader)? {
        return Ok(Content::FileSystem(VFAT));
    }
    Ok(Content::Unknown)
}

/// ext2, ext3 and ext4 share one superblock and one driver; the features tell them apart.
fn ext(reader: &Reader<'_>) -> Result<Option<Content>> {
    const HAS_JOURNAL: u32 = 0x4;
    /// What ext3 knows: filetype, recover, journal_dev, meta_bg.
    const EXT3_INCOMPAT: u32 = 0x2 | 0x4 | 0x8 | 0x10;
    let Some(magic) = reader.get::<2>(1024 + 56)? else { return Ok(None) };
    if magic != [0x53, 0xef] {
        return Ok(None);
    }
    let compat = reader.get::<4>(1024 + 92)?.map_or(0, u32::from_le_bytes);
    let incompat = reader.get::<4>(1024 + 96)?.map_or(0, u32::from_le_bytes);
    let [ext2, ext3, ext4] = EXT;
    let fs = match (compat & HAS_JOURNAL != 0, incompat & !EXT3_INCOMPAT) {
        (_, more) if more != 0 => ext4,
        (true, _) => ext3,
        (false, _) => ext2,
    };
    Ok(Some(Content::FileSystem(fs)))
}

/// A FAT boot sector ends as a partition table does; the type strings and the sizes tell.
fn fat(reader: &Reader<'_>) -> Result<bool> {
    let Some(boot) = reader.get::<512>(0)? else { return Ok(false) };
    let sector = u16::from_le_bytes([boot[11], boot[12]]);
    let cluster = boot[13];
    Ok(boot[510..] == [0x55, 0xaa]
        && (boot[54..].starts_with(b"FAT") || boot[82..].starts_with(b"FAT32"))
        && (512..=4096).contains(&sector)
        && sector.is_power_of_two()
        && cluster.is_power_of_two())
}

/// Reads within a stretch of a disk.
pub(super) struct Reader<'a> {
    pub(super) device: &'a dyn BlockDevice,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Reader<'_> {
    /// `N` bytes at `at`, `None` where the stretch or the disk ends before.
    pub(super) fn get<const N: usize>(&self, at: u64) -> Result<Option<[u8; N]>> {
        let mut bytes = [0; N];
        Ok(self.fill(at, &mut bytes)?.then_some(bytes))
    }

    /// Fills `bytes` from `at`; false where the stretch or the disk ends before.
    pub(super) fn fill(&self, at: u64, bytes: &mut [u8]) -> Result<bool> {
        let end = at.checked_add(bytes.len() as u64).filter(|end| *end <= self.len);
        let Some(end) = end.and_then(|end| end.checked_add(self.offset)) else {
            return Ok(false);
        };
        if end > self.device.size() {
            return Ok(false);
        }
        self.device.read_at(self.offset + at, &mut [IoSliceMut::new(bytes)])?;
        Ok(true)
    }

    fn matches(&self, at: u64, magic: &[u8]) -> Result<bool> {
        let mut bytes = [0; 16];
        let Some(found) = bytes.get_mut(..magic.len()) else { return Ok(false) };
        Ok(self.fill(at, found)? && found == magic)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ram::Ram;
    use super::*;

    fn found(at: usize, bytes: &[u8]) -> &'static str {
        let mut disk = vec![0; 0x20000];
        disk[512 + at..][..bytes.len()].copy_from_slice(bytes);
        probe(&Ram(disk), 512, 0x1fe00).unwrap().name()
    }

    #[test]
    fn every_magic_is_told_within_its_stretch() {
        for magic in MAGICS {
            assert_eq!(found(magic.offset as usize, magic.bytes), magic.content.name());
        }
        assert_eq!(found(0, b""), "unknown");
    }

    #[test]
    fn features_tell_ext2_from_ext3_and_ext4() {
        let superblock = |compat: u32, incompat: u32| {
            let mut bytes = vec![0x53, 0xef];
            bytes.resize(36, 0);
            bytes.extend(compat.to_le_bytes());
            bytes.extend(incompat.to_le_bytes());
            bytes
        };
        assert_eq!(found(1024 + 56, &superblock(0x38, 0x2)), "ext2");
        assert_eq!(found(1024 + 56, &superblock(0x3c, 0x6)), "ext3");
        assert_eq!(found(1024 + 56, &superblock(0x3c, 0x2c2)), "ext4");
    }

    #[test]
    fn a_stretch_that_ends_early_is_unknown() {
        let disk = Ram(b"XFSB".to_vec());
        assert_eq!(probe(&disk, 0, 3).unwrap(), Content::Unknown);
        assert_eq!(probe(&disk, u64::MAX, 4).unwrap(), Content::Unknown);
        assert_eq!(probe(&disk, 0, 1 << 40).unwrap().name(), "xfs");
    }
}
