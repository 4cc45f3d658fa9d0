//! What is inside a disk, without the kernel: partitions, file systems by name, ext2, ext3 and ext4 read and
//! written, and FAT read.
//!
//! Knows a [`BlockDevice`], no image format, no mount and no command.

pub mod ext4;
pub mod fat;
pub mod partition;
pub mod path;
pub mod probe;
pub mod tree;

#[cfg(test)]
pub(crate) mod ram;

use std::sync::Arc;

use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};

use ext4::mounted::{Mounted, Options, ROOT};
use partition::Partition;
use probe::{Content, FileSystem};

const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;

/// A file system and where in the disk it stands.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// Which one it is.
    pub fs: FileSystem,
    /// Its first byte.
    pub offset: u64,
    /// In bytes; 0 for all that follows.
    pub len: u64,
}

/// Finds the file system on a disk or in a partition, or says what is there instead and what the
/// user can do.
pub fn find(device: &dyn BlockDevice, partition: Option<u32>) -> Result<Found> {
    let size = device.size();
    let Some(number) = partition else {
        let content = probe::probe(device, 0, size)?;
        if let Content::FileSystem(fs) = content {
            return Ok(Found { fs, offset: 0, len: 0 });
        }
        return Err(match (partition::partitions(device)?, content) {
            (Some(table), _) if table.is_empty() => {
                Error::unsupported("this disk has a partition table without partitions")
            }
            (Some(table), _) => Error::invalid(format!(
                "this disk has a partition table: use --partition N ({})",
                list(device, &table)
            )),
            (None, Content::Other(name)) => cannot_mount("this disk", name),
            (None, _) => Error::unsupported(
                "no file system that can be mounted was found on this disk (it may be empty)",
            ),
        });
    };
    let Some(table) = partition::partitions(device)? else {
        return Err(Error::invalid("this disk has no partition table: leave --partition out"));
    };
    let Some(found) = table.iter().find(|partition| partition.number == number) else {
        let list = list(device, &table);
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("this disk has no partition {number} ({list})"),
        ));
    };
    let Partition { offset, len, .. } = *found;
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(Error::corrupt(format!(
            "partition {number} ({len} bytes from {offset}) reaches past the end of the disk ({size} bytes)"
        )));
    }
    match probe::probe(device, offset, len)? {
        Content::FileSystem(fs) => Ok(Found { fs, offset, len }),
        Content::Other(name) => Err(cannot_mount(&format!("partition {number}"), name)),
        Content::Unknown => Err(Error::unsupported(format!(
            "no file system that can be mounted was found in partition {number}"
        ))),
    }
}

/// Opens the file system on a disk or in a partition, to be read and written without the kernel.
///
/// # Errors
/// [`ErrorKind::Unsupported`] names a file system that only the kernel knows.
pub fn open(
    device: Arc<dyn BlockDevice>,
    partition: Option<u32>,
    read_only: bool,
) -> Result<Mounted> {
    let Found { fs, offset, len } = find(device.as_ref(), partition)?;
    if fs.driver != "ext4" {
        return Err(Error::unsupported(format!(
            "holds {}: without the kernel only ext2, ext3 and ext4 are read and written; root can \
             mount it (`sudo vdisk mount`)",
            fs.name
        )));
    }
    let len = if len == 0 { device.size().saturating_sub(offset) } else { len };
    let mounted = Mounted::open(device, offset, len, Options { read_only, ..Options::default() })?;
    // Without it there is no file, and whoever came would not be told why.
    if mounted.attributes(ROOT)?.mode & TYPE != DIRECTORY {
        return Err(Error::corrupt("ext4: the root is no directory"));
    }
    Ok(mounted)
}

fn cannot_mount(what: &str, name: &str) -> Error {
    Error::unsupported(format!("{what} holds {name}, which vdisk does not mount"))
}

/// `1: ext4 10 GiB, 2: swap 1 GiB`.
fn list(device: &dyn BlockDevice, table: &[Partition]) -> String {
    let words = table.iter().map(|partition| {
        let content = probe::probe(device, partition.offset, partition.len);
        let name = content.map_or("unreadable", |content| content.name());
        format!("{}: {name} {}", partition.number, size(partition.len))
    });
    words.collect::<Vec<_>>().join(", ")
}

/// A length as people read it, to one decimal.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    match tenths % 10 {
        0 => format!("{} {}", tenths / 10, UNITS[unit]),
        rest => format!("{}.{rest} {}", tenths / 10, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn a_size_is_rounded_down_to_one_decimal() {
        assert_eq!(size(512), "0.5 KiB");
        assert_eq!(size(10 << 30), "10 GiB");
        assert_eq!(size((10 << 30) + (700 << 20)), "10.6 GiB");
        assert_eq!(size(u64::MAX), "16383.9 PiB");
    }
}
