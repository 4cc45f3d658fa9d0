//! FAT12, FAT16 and FAT32, read: what an EFI system partition is, and with it many a `/boot`.
//!
//! By Microsoft's "FAT File System Specification" (fatgen103). What is in it may be hostile: a chain of
//! clusters has an end because no file has more clusters than the file system.

mod directory;

use std::io::IoSliceMut;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::error::{Error, Result};

use directory::Entry;

/// The longest directory: 65536 entries.
const MOST_ENTRIES: u64 = (1 << 16) * directory::LEN as u64;
/// The most pieces that a file may be in.
const MOST_RUNS: usize = 1 << 18;
/// Bytes of the table that are read at once.
const PIECE: u64 = 4096;

/// A file system that is open for reading.
pub struct Fat {
    device: Arc<dyn BlockDevice>,
    /// Its first byte on the device.
    start: u64,
    shape: Shape,
}

/// How wide an entry of the table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Twelve,
    Sixteen,
    ThirtyTwo,
}

/// What the boot sector says, in bytes from the start of the file system.
#[derive(Debug, Clone, Copy)]
struct Shape {
    width: Width,
    table: u64,
    /// Of the root directory, where it stands apart from the clusters.
    root: (u64, u64),
    /// The first cluster of the root directory, where it is made of clusters.
    root_cluster: u32,
    data: u64,
    cluster: u64,
    /// How many clusters there are; the first one's number is 2.
    clusters: u32,
    id: u32,
}

/// A file or directory.
#[derive(Debug, Clone)]
pub struct Node {
    /// Whether it is a directory.
    pub is_directory: bool,
    /// In bytes; of a directory, all that its clusters hold.
    pub size: u64,
    /// Where its bytes are: from the start of the file system, and how many.
    runs: Vec<(u64, u64)>,
}

fn broken(what: &str) -> Error {
    Error::corrupt(format!("the FAT file system is damaged: {what}"))
}

impl Shape {
    fn of(sector: &[u8; 512], len: u64) -> Result<Shape> {
        let byte = |at: usize| u64::from(sector[at]);
        let word = |at: usize| byte(at) | byte(at + 1) << 8;
        let long = |at: usize| word(at) | word(at + 2) << 16;
        let (sector_len, per_cluster) = (word(11), byte(13));
        let is_sound = [512, 1024, 2048, 4096].contains(&sector_len)
            && per_cluster.is_power_of_two()
            && word(14) > 0
            && byte(16) > 0;
        if !is_sound {
            return Err(broken("its boot sector makes no sense"));
        }
        let either = |short: u64, long: u64| if short == 0 { long } else { short };
        let is_wide = word(22) == 0;
        let table_sectors = either(word(22), long(36));
        let root_len = word(17) * directory::LEN as u64;
        let root_at = word(14) + byte(16) * table_sectors;
        let data_at = root_at + root_len.div_ceil(sector_len);
        let sectors = either(word(19), long(32)).min(len / sector_len);
        let clusters = sectors.saturating_sub(data_at) / per_cluster;
        let width = match clusters {
            _ if is_wide => Width::ThirtyTwo,
            0..0xff5 => Width::Twelve,
            _ => Width::Sixteen,
        };
        // What the table has no entry for is no cluster.
        let entries = table_sectors * sector_len * 8 / width.bits();
        let clusters = clusters.min(entries.saturating_sub(2)).min(0x0fff_fff4);
        Ok(Shape {
            width,
            table: word(14) * sector_len,
            root: (root_at * sector_len, root_len),
            root_cluster: if is_wide { long(44) as u32 & width.mask() } else { 0 },
            data: data_at * sector_len,
            cluster: per_cluster * sector_len,
            clusters: clusters as u32,
            id: long(if is_wide { 67 } else { 39 }) as u32,
        })
    }

    /// Where a cluster is, if there is one of that number.
    fn place(&self, cluster: u32) -> Option<u64> {
        let number = cluster.checked_sub(2).filter(|number| *number < self.clusters)?;
        Some(self.data + u64::from(number) * self.cluster)
    }
}

impl Width {
    fn bits(self) -> u64 {
        match self {
            Width::Twelve => 12,
            Width::Sixteen => 16,
            Width::ThirtyTwo => 32,
        }
    }

    /// The bits of an entry that count.
    fn mask(self) -> u32 {
        match self {
            Width::Twelve => 0xfff,
            Width::Sixteen => 0xffff,
            Width::ThirtyTwo => 0x0fff_ffff,
        }
    }
}

impl Fat {
    /// Opens the file system in `len` bytes of a device from `start`.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Corrupt`] where the boot sector makes no sense.
    pub fn open(device: Arc<dyn BlockDevice>, start: u64, len: u64) -> Result<Fat> {
        let mut sector = [0; 512];
        device.read_at(start, &mut [IoSliceMut::new(&mut sector)])?;
        let shape = Shape::of(&sector, len)?;
        Ok(Fat { device, start, shape })
    }

    /// The number that it was given when it was made, as Linux writes it.
    pub fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.shape.id >> 16, self.shape.id & 0xffff)
    }

    /// The file or directory with this path, if there is one. Upper and lower case are the same.
    pub fn find(&self, path: &str) -> Result<Option<Node>> {
        let mut node = self.root()?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            if !node.is_directory {
                return Ok(None);
            }
            let entries = self.entries(&node)?;
            let Some(entry) = entries.into_iter().find(|e| e.is_called(name)) else {
                return Ok(None);
            };
            node = self.node(&entry)?;
        }
        Ok(Some(node))
    }

    /// The names in a directory.
    pub fn names(&self, directory: &Node) -> Result<Vec<String>> {
        Ok(self.entries(directory)?.into_iter().map(|entry| entry.name).collect())
    }

    /// Reads from `at` on as much as there is; how much that was.
    pub fn read(&self, node: &Node, at: u64, bytes: &mut [u8]) -> Result<usize> {
        let (mut done, mut skip) = (0, at);
        let wanted = node.size.saturating_sub(at).min(bytes.len() as u64) as usize;
        for (place, len) in &node.runs {
            if skip >= *len {
                skip -= len;
                continue;
            }
            let Some(left) = bytes.get_mut(done..wanted).filter(|left| !left.is_empty()) else {
                break;
            };
            let now = left.len().min((len - skip) as usize);
            let (piece, _) = left.split_at_mut(now);
            self.get(place + skip, piece)?;
            (done, skip) = (done + now, 0);
        }
        Ok(done)
    }

    fn get(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let at = self.start.checked_add(at).ok_or_else(|| broken("a place past all places"))?;
        self.device.read_at(at, &mut [IoSliceMut::new(bytes)])
    }

    fn root(&self) -> Result<Node> {
        if self.shape.root_cluster == 0 {
            let runs = vec![self.shape.root];
            return Ok(Node { is_directory: true, size: self.shape.root.1, runs });
        }
        self.directory(self.shape.root_cluster)
    }

    fn directory(&self, first: u32) -> Result<Node> {
        let runs = self.runs(first, MOST_ENTRIES)?;
        let size = runs.iter().map(|(_, len)| len).sum::<u64>().min(MOST_ENTRIES);
        Ok(Node { is_directory: true, size, runs })
    }

    fn node(&self, entry: &Entry) -> Result<Node> {
        if entry.is_directory {
            return self.directory(entry.cluster);
        }
        let size = u64::from(entry.size);
        let runs = if size == 0 { Vec::new() } else { self.runs(entry.cluster, size)? };
        if runs.iter().map(|(_, len)| len).sum::<u64>() < size {
            return Err(broken("a file ends before its size"));
        }
        Ok(Node { is_directory: false, size, runs })
    }

    fn entries(&self, directory: &Node) -> Result<Vec<Entry>> {
        let mut bytes = vec![0; directory.size as usize];
        let len = self.read(directory, 0, &mut bytes)?;
        bytes.truncate(len);
        Ok(directory::entries(&bytes))
    }

    /// Where the bytes of a chain of clusters are, at least `len` of them where it has so many.
    fn runs(&self, first: u32, len: u64) -> Result<Vec<(u64, u64)>> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut table = Table { fat: self, at: 0, piece: Vec::new() };
        let (mut cluster, mut found) = (first, 0);
        while found < len {
            // The end of the chain, a free cluster or a bad one.
            let Some(place) = self.shape.place(cluster) else { break };
            match runs.last_mut() {
                Some((start, run)) if *start + *run == place => *run += self.shape.cluster,
                _ => runs.push((place, self.shape.cluster)),
            }
            if runs.len() > MOST_RUNS {
                return Err(Error::unsupported(
                    "a file on a FAT file system is in too many pieces",
                ));
            }
            found += self.shape.cluster;
            if found / self.shape.cluster > u64::from(self.shape.clusters) {
                return Err(broken("a chain of clusters has no end"));
            }
            cluster = table.next(cluster)?;
        }
        Ok(runs)
    }
}

/// The table, of which a piece is kept.
struct Table<'a> {
    fat: &'a Fat,
    at: u64,
    piece: Vec<u8>,
}

impl Table<'_> {
    /// The cluster behind one.
    fn next(&mut self, cluster: u32) -> Result<u32> {
        let width = self.fat.shape.width;
        let bit = u64::from(cluster) * width.bits();
        let bytes = [self.byte(bit / 8)?, self.byte(bit / 8 + 1)?];
        let low = u32::from(u16::from_le_bytes(bytes));
        let entry = match width {
            Width::Twelve => low >> (bit % 8),
            Width::Sixteen => low,
            Width::ThirtyTwo => {
                let high = [self.byte(bit / 8 + 2)?, self.byte(bit / 8 + 3)?];
                low | u32::from(u16::from_le_bytes(high)) << 16
            }
        };
        Ok(entry & width.mask())
    }

    fn byte(&mut self, at: u64) -> Result<u8> {
        if self.piece.is_empty() || at < self.at || at - self.at >= self.piece.len() as u64 {
            self.at = at / PIECE * PIECE;
            let place = self.fat.shape.table + self.at;
            // The data lies behind the table, and is at least as long as what is asked for here.
            let len = PIECE.min(self.fat.device.size().saturating_sub(self.fat.start + place));
            self.piece.resize(len as usize, 0);
            self.fat.get(place, &mut self.piece)?;
        }
        let byte = self.piece.get((at - self.at) as usize);
        byte.copied().ok_or_else(|| broken("its table ends early"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filesystem::ram::Ram;

    /// A FAT12 file system of 64 clusters of 512 bytes, with a file of three clusters that are not in a row and a
    /// directory.
    fn made() -> Vec<u8> {
        let mut disk = vec![0; 512 * 68];
        disk[11..13].copy_from_slice(&512u16.to_le_bytes());
        (disk[13], disk[14], disk[16], disk[17], disk[22]) = (1, 1, 1, 16, 1);
        disk[19..21].copy_from_slice(&67u16.to_le_bytes());
        disk[39..43].copy_from_slice(&0x1234_abcdu32.to_le_bytes());
        // 2 to 5, 5 to 4, 4 and 3 are ends.
        for (cluster, next) in [(2, 5), (5, 4), (4, 0xfff), (3, 0xff8u16)] {
            let at = 512 + cluster * 3 / 2;
            let old = u16::from_le_bytes([disk[at], disk[at + 1]]);
            let new = if cluster % 2 == 0 { old & 0xf000 | next } else { old & 0xf | next << 4 };
            disk[at..at + 2].copy_from_slice(&new.to_le_bytes());
        }
        let file = directory::tests::entry(b"KERNEL  IMG", 0x20, 2, 1100);
        let folder = directory::tests::entry(b"LOADER     ", 0x10, 3, 0);
        disk[1024..1056].copy_from_slice(&file);
        disk[1056..1088].copy_from_slice(&folder);
        for (cluster, byte) in [(2, 1), (5, 2), (4, 3)] {
            disk[1536 + (cluster - 2) * 512..][..512].fill(byte);
        }
        let below = directory::tests::entry(b"DEFAULT    ", 0x20, 0, 0);
        disk[1536 + 512..1536 + 544].copy_from_slice(&below);
        disk
    }

    fn opened(disk: Vec<u8>) -> Result<Fat> {
        let len = disk.len() as u64;
        Fat::open(Arc::new(Ram(disk)), 0, len)
    }

    #[test]
    fn files_are_found_and_read_across_their_clusters() {
        let fat = opened(made()).unwrap();
        assert_eq!(fat.uuid(), "1234-ABCD");
        let file = fat.find("/kernel.img").unwrap().unwrap();
        assert_eq!((file.size, file.is_directory), (1100, false));
        let mut bytes = [0; 2000];
        assert_eq!(fat.read(&file, 0, &mut bytes).unwrap(), 1100);
        assert!(bytes[..512].iter().all(|b| *b == 1) && bytes[512..1024].iter().all(|b| *b == 2));
        assert!(bytes[1024..1100].iter().all(|b| *b == 3) && bytes[1100] == 0);
        assert_eq!(fat.read(&file, 1000, &mut bytes[..50]).unwrap(), 50);
        assert!(bytes[..24].iter().all(|b| *b == 2) && bytes[24..50].iter().all(|b| *b == 3));
        assert_eq!(fat.read(&file, 5000, &mut bytes).unwrap(), 0);
        let folder = fat.find("loader").unwrap().unwrap();
        assert_eq!(fat.names(&folder).unwrap(), ["DEFAULT"]);
        assert_eq!(fat.find("loader/default").unwrap().unwrap().size, 0);
        assert!(fat.find("kernel.img/x").unwrap().is_none() && fat.find("x").unwrap().is_none());
    }

    #[test]
    fn a_chain_that_bites_its_tail_is_refused_and_one_that_is_too_short() {
        let mut disk = made();
        // 4 to 2: three clusters in a circle, for a file that says it has all of the disk.
        disk[512 + 6] = 2;
        disk[512 + 7] &= 0xf0;
        disk[1024 + 28..1024 + 32].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = opened(disk).unwrap().find("kernel.img").unwrap_err();
        assert!(error.to_string().contains("no end"), "{error}");
        let mut disk = made();
        disk[1024 + 28..1024 + 32].copy_from_slice(&2000u32.to_le_bytes());
        let error = opened(disk).unwrap().find("kernel.img").unwrap_err();
        assert!(error.to_string().contains("ends before its size"), "{error}");
    }

    #[test]
    fn no_damage_makes_it_panic_or_go_on_for_ever() {
        let change = (0..2048usize, any::<u8>());
        proptest!(|(changes in prop::collection::vec(change, 1..40), cut in 512..34816usize)| {
            let mut disk = made();
            for (at, byte) in changes {
                disk[at] = byte;
            }
            disk.truncate(cut / 512 * 512);
            let Ok(fat) = opened(disk) else { return Ok(()) };
            for path in ["/", "kernel.img", "loader", "loader/default"] {
                if let Ok(Some(node)) = fat.find(path) {
                    let _ = fat.names(&node);
                    let _ = fat.read(&node, 100, &mut [0; 4096]);
                }
            }
        });
    }
}
