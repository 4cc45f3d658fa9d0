//! The file systems of a disk in which a kernel may lie, read without the kernel's drivers.
//!
//! It knows files, not what any of them means. What is in a disk may be hostile: all that is read has
//! a bound, and links stay in their file system.

use std::fs::File;
use std::io::{Seek, Write};
use std::ops::Range;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::ext4::mounted::{Attributes, Mounted, Options};
use crate::filesystem::fat::{self, Fat};
use crate::filesystem::partition::partitions;
use crate::filesystem::probe::{Content, probe};
use crate::filesystem::{path, tree};

const TYPE: u16 = 0o170_000;
const REGULAR: u16 = 0o100_000;
const DIRECTORY: u16 = 0o040_000;

/// The longest text that is read: a configuration of a boot loader.
const MOST_TEXT: u64 = 1 << 20;
/// The largest kernel or initrd that is read.
const MOST: u64 = 2 << 30;
/// The most names of one directory that are looked at.
const MOST_NAMES: usize = 4096;
/// Bytes that are copied at once.
const PIECE: usize = 1 << 20;

/// One file system of a disk.
pub struct Place {
    /// The partition, from 1; `None` for the whole disk.
    pub partition: Option<u32>,
    fs: Files,
}

/// A file system that can be read.
enum Files {
    Ext4(Box<Mounted>),
    /// An EFI system partition.
    Fat(Fat),
}

/// A file or directory in one.
enum Node {
    Ext4(Attributes),
    Fat(fat::Node),
}

impl Node {
    fn is_directory(&self) -> bool {
        match self {
            Node::Ext4(file) => file.mode & TYPE == DIRECTORY,
            Node::Fat(file) => file.is_directory,
        }
    }

    fn is_regular(&self) -> bool {
        match self {
            Node::Ext4(file) => file.mode & TYPE == REGULAR,
            Node::Fat(file) => !file.is_directory,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Node::Ext4(file) => file.size,
            Node::Fat(file) => file.size,
        }
    }
}

impl Files {
    fn open(
        device: &Arc<dyn BlockDevice>,
        range: Range<u64>,
        driver: &'static str,
    ) -> Result<Option<Files>> {
        let (start, len) = (range.start, range.end - range.start);
        let options = Options { read_only: true, ..Options::default() };
        match driver {
            "ext4" => {
                let fs = Mounted::open(device.clone(), start, len, options)?;
                Ok(Some(Files::Ext4(Box::new(fs))))
            }
            "vfat" => Fat::open(device.clone(), start, len).map(|fs| Some(Files::Fat(fs))),
            _ => Ok(None),
        }
    }

    /// What has a path; links are followed where there are any.
    fn find(&self, path: &str) -> Result<Option<Node>> {
        match self {
            Files::Ext4(fs) => Ok(path::find(fs, path.as_bytes(), true)?.file.map(Node::Ext4)),
            Files::Fat(fs) => Ok(fs.find(path)?.map(Node::Fat)),
        }
    }

    fn names(&self, directory: &Node) -> Result<Vec<String>> {
        match (self, directory) {
            (Files::Ext4(fs), Node::Ext4(directory)) => {
                let names = tree::names(fs, directory.inode)?.into_iter().take(MOST_NAMES);
                Ok(names.filter_map(|(name, _)| String::from_utf8(name).ok()).collect())
            }
            (Files::Fat(fs), Node::Fat(directory)) => {
                Ok(fs.names(directory)?.into_iter().take(MOST_NAMES).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn read(&self, file: &Node, at: u64, bytes: &mut [u8]) -> Result<usize> {
        match (self, file) {
            (Files::Ext4(fs), Node::Ext4(file)) => fs.read(file.inode, at, bytes),
            (Files::Fat(fs), Node::Fat(file)) => fs.read(file, at, bytes),
            _ => Ok(0),
        }
    }
}

/// The file systems of a disk.
#[derive(Default)]
pub struct Places {
    /// Those that can be read, in the order of the partition table.
    pub all: Vec<Place>,
    /// Partitions with file systems that only the kernel knows, and their names.
    pub foreign: Vec<(Option<u32>, &'static str)>,
    /// What was passed over, and why.
    pub passed_over: Vec<String>,
}

impl Places {
    /// Looks at the whole disk, or at each of its partitions.
    pub fn of(device: &Arc<dyn BlockDevice>) -> Result<Places> {
        let mut places = Places::default();
        let size = device.size();
        if let Content::FileSystem(fs) = probe(device.as_ref(), 0, size)? {
            places.add(device, None, 0..size, fs.driver);
            return Ok(places);
        }
        for part in partitions(device.as_ref())?.unwrap_or_default() {
            if part.offset.checked_add(part.len).is_none_or(|end| end > size) {
                let text = format!("partition {} reaches past the end of the disk", part.number);
                places.passed_over.push(text);
                continue;
            }
            if let Content::FileSystem(fs) = probe(device.as_ref(), part.offset, part.len)? {
                places.add(
                    device,
                    Some(part.number),
                    part.offset..part.offset.saturating_add(part.len),
                    fs.driver,
                );
            }
        }
        Ok(places)
    }

    fn add(
        &mut self,
        device: &Arc<dyn BlockDevice>,
        partition: Option<u32>,
        range: Range<u64>,
        driver: &'static str,
    ) {
        match Files::open(device, range, driver) {
            Ok(Some(fs)) => self.all.push(Place { partition, fs }),
            Ok(None) => self.foreign.push((partition, driver)),
            Err(error) => self.passed_over.push(format!("{}: {error}", name(partition))),
        }
    }
}

/// What people call a partition.
pub fn name(partition: Option<u32>) -> String {
    partition.map_or("the disk".to_owned(), |number| format!("partition {number}"))
}

/// What a Linux guest calls a partition of its first disk.
pub fn device(partition: Option<u32>) -> String {
    partition.map_or("/dev/vda".to_owned(), |number| format!("/dev/vda{number}"))
}

impl Place {
    /// The file system's id, as Linux writes it.
    pub fn uuid(&self) -> String {
        match &self.fs {
            Files::Ext4(fs) => uuid::Uuid::from_bytes(fs.uuid()).hyphenated().to_string(),
            Files::Fat(fs) => fs.uuid(),
        }
    }

    /// Whether it looks like the root of a system, and not only like its /boot. None is on FAT.
    pub fn is_root(&self) -> bool {
        let is_directory = |path: &str| self.look(path).is_some_and(|file| file.is_directory());
        matches!(self.fs, Files::Ext4(_))
            && is_directory("/etc")
            && (is_directory("/usr") || is_directory("/sbin"))
    }

    /// Whether there is a file with this path.
    pub fn has(&self, path: &str) -> bool {
        self.look(path).is_some_and(|file| file.is_regular())
    }

    /// The names in a directory, where there is one: those that are text.
    pub fn names(&self, path: &str) -> Result<Vec<String>> {
        let Some(directory) = self.look(path).filter(Node::is_directory) else {
            return Ok(Vec::new());
        };
        let mut names = self.fs.names(&directory)?;
        names.sort();
        Ok(names)
    }

    /// The text of a file, where there is one.
    pub fn text(&self, path: &str) -> Result<Option<String>> {
        let Some(file) = self.look(path).filter(Node::is_regular) else { return Ok(None) };
        if file.size() > MOST_TEXT {
            return Err(Error::invalid(format!("{path} in the disk is too long to be believed")));
        }
        let mut bytes = vec![0; file.size() as usize];
        let len = self.fs.read(&file, 0, &mut bytes)?;
        bytes.truncate(len);
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The first bytes of a file, at most `len` of them.
    pub fn start(&self, path: &str, len: usize) -> Result<Vec<u8>> {
        let file = self.file(path)?;
        let mut bytes = vec![0; len];
        let read = self.fs.read(&file, 0, &mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Appends a file's contents to one of the host's, which are then padded to four bytes: as archives
    /// in an initrd stand one after the other.
    pub fn copy(&self, path: &str, to: &mut File) -> Result<()> {
        let failed = |e| Error::io("cannot copy out of the disk", e);
        let file = self.file(path)?;
        let size = file.size();
        let before = to.stream_position().map_err(failed)?;
        if size > MOST || before + size > MOST {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{path} in the disk is too large to boot ({size} bytes)"),
            ));
        }
        let mut bytes = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            let len = self.fs.read(&file, at, &mut bytes)?;
            if len == 0 {
                return Err(Error::corrupt(format!("{path} in the disk ends before its size")));
            }
            to.write_all(bytes.get(..len).unwrap_or_default()).map_err(failed)?;
            at += len as u64;
        }
        let padding = (4 - size % 4) % 4;
        to.write_all(&[0; 4][..padding as usize]).map_err(failed)
    }

    fn look(&self, path: &str) -> Option<Node> {
        self.fs.find(path).ok()?
    }

    fn file(&self, path: &str) -> Result<Node> {
        let text = || format!("there is no {path} in the disk");
        self.fs.find(path)?.ok_or_else(|| Error::new(ErrorKind::NotFound, text()))
    }
}
