//! The text of a VMDK: which extents make up the disk, and who its parent is.
//! "Virtual Disk Format 5.0", section "The Descriptor File".

use std::sync::Arc;

use crate::addr::Unit;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::fields;
use crate::storage::Storage;

const SECTOR: Unit = Unit::from_bits(9);
/// A descriptor that is longer is something else.
pub const MAX_TEXT: u64 = 1 << 20;
/// A 64 TiB disk in pieces of 2 GiB has half as many.
const MAX_EXTENTS: usize = 1 << 16;
/// As many files as one disk may keep open.
const MAX_FILES: usize = 4096;

/// What a descriptor says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// The kind of disk, as `monolithicSparse`.
    pub create_type: String,
    /// Changes when the disk's contents do; a child records it.
    pub cid: Option<u32>,
    /// The [`cid`](Descriptor::cid) that the parent must have.
    pub parent_cid: Option<u32>,
    /// The parent's name.
    pub parent: Option<String>,
    /// The names of the files that hold extents, each once.
    pub files: Vec<String>,
    pub(super) extents: Vec<Line>,
}

/// One extent line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    /// Bytes of the guest disk.
    pub(super) len: u64,
    pub(super) kind: Kind,
}

/// What holds an extent's bytes; `file` is an index into [`Descriptor::files`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bytes as they are, from `offset` of the file.
    Flat { file: usize, offset: u64 },
    /// A sparse extent of its own.
    Sparse { file: usize },
    /// Nothing: it reads as zeroes.
    Zero,
}

impl Kind {
    /// The file it stands in.
    pub(super) fn file(self) -> Option<usize> {
        match self {
            Kind::Flat { file, .. } | Kind::Sparse { file } => Some(file),
            Kind::Zero => None,
        }
    }
}

impl Descriptor {
    /// Reads and parses a descriptor of `len` bytes at `offset`.
    pub(super) fn read(storage: &Arc<dyn Storage>, offset: u64, len: u64) -> Result<Descriptor> {
        if len > MAX_TEXT {
            return Err(
                Error::corrupt(format!("a VMDK descriptor of {len} bytes")).at_offset(offset)
            );
        }
        let bytes = fields::read(storage, offset, len, "the VMDK descriptor")?;
        let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
        Descriptor::parse(&String::from_utf8_lossy(text)).map_err(|e| e.at_offset(offset))
    }

    /// Parses the text.
    pub fn parse(text: &str) -> Result<Descriptor> {
        let mut descriptor = Descriptor::default();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            descriptor.line(line).map_err(|error| {
                if error.kind() == ErrorKind::Corrupt && line.starts_with("RW ") {
                    return Error::corrupt(format!("Invalid extent line: {line}"));
                }
                let what = format!("line {} of the VMDK descriptor: ", number + 1);
                Error::new(error.kind(), what + error.message())
            })?;
        }
        if descriptor.create_type.is_empty() {
            return Err(Error::corrupt("a VMDK descriptor without createType"));
        }
        Ok(descriptor)
    }

    fn line(&mut self, line: &str) -> Result<()> {
        match line.split_once(char::is_whitespace) {
            Some((access @ ("RW" | "RDONLY" | "NOACCESS"), rest)) => self.extent(access, rest),
            _ => self.entry(line),
        }
    }

    fn entry(&mut self, line: &str) -> Result<()> {
        let Some((key, value)) = line.split_once('=') else { return Ok(()) };
        let value = value.trim().trim_matches('"');
        let cid = || {
            u32::from_str_radix(value, 16)
                .map_err(|_| Error::corrupt(format!("'{value}' is not a content id")))
        };
        match key.trim() {
            "createType" => self.create_type = value.to_owned(),
            "CID" => self.cid = Some(cid()?),
            "parentCID" => self.parent_cid = Some(cid()?),
            "parentFileNameHint" if !value.is_empty() => {
                self.parent = Some(fields::native_path(value));
            }
            _ => {}
        }
        Ok(())
    }

    /// `SECTORS TYPE ["NAME" [OFFSET]]`, the offset in sectors.
    fn extent(&mut self, access: &str, rest: &str) -> Result<()> {
        let bad = || Error::corrupt("not an extent line");
        if access == "NOACCESS" {
            return Err(Error::unsupported("an extent without access"));
        }
        if self.extents.len() >= MAX_EXTENTS {
            return Err(Error::unsupported(format!("more than {MAX_EXTENTS} extents")));
        }
        let (sectors, rest) = rest.trim_start().split_once(char::is_whitespace).ok_or_else(bad)?;
        let len = bytes(sectors)?;
        let rest = rest.trim_start();
        let (kind, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let kind = match kind {
            "ZERO" => Kind::Zero,
            // These begin at the beginning of their file.
            "VMFS" if !quoted(rest).ok_or_else(bad)?.1.is_empty() => return Err(bad()),
            "FLAT" | "VMFS" => {
                let (name, offset) = quoted(rest).ok_or_else(bad)?;
                let offset = if offset.is_empty() { 0 } else { bytes(offset)? };
                Kind::Flat { file: self.file(name)?, offset }
            }
            "SPARSE" => {
                let before = self.files.len();
                let file = self.file(quoted(rest).ok_or_else(bad)?.0)?;
                // One file is one sparse extent; this also bounds how many tables are held.
                if file < before {
                    return Err(Error::corrupt("a sparse extent that is listed twice"));
                }
                Kind::Sparse { file }
            }
            other => return Err(Error::unsupported(format!("VMDK extents of type {other}"))),
        };
        self.extents.push(Line { len, kind });
        Ok(())
    }

    fn file(&mut self, name: &str) -> Result<usize> {
        if let Some(index) = self.files.iter().position(|known| known == name) {
            return Ok(index);
        }
        if name.is_empty() || self.files.len() >= MAX_FILES {
            return Err(Error::unsupported(format!(
                "an extent without a name, or more than {MAX_FILES} files"
            )));
        }
        self.files.push(name.to_owned());
        Ok(self.files.len() - 1)
    }
}

fn bytes(sectors: &str) -> Result<u64> {
    let number = sectors.parse::<u64>().ok().and_then(|n| SECTOR.start(n));
    number.ok_or_else(|| Error::corrupt(format!("'{sectors}' is not a number of sectors")))
}

fn quoted(text: &str) -> Option<(&str, &str)> {
    let (name, rest) = text.trim_start().strip_prefix('"')?.split_once('"')?;
    Some((name, rest.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=7d1\nparentCID=ffffffff\n\
        createType=\"custom\"\r\n\n# Extent description\nRW 4 FLAT \"a b.vmdk\" 2\n\
        RDONLY 8 SPARSE \"s.vmdk\"\nRW 1 ZERO\nRW 1 FLAT \"a b.vmdk\" 6\n\
        ddb.adapterType = \"ide\"\n";

    #[test]
    fn a_descriptor_lists_each_file_once() {
        let d = Descriptor::parse(TEXT).unwrap();
        assert_eq!(d.files, ["a b.vmdk", "s.vmdk"]);
        assert_eq!(
            (d.cid, d.parent_cid, d.create_type.as_str()),
            (Some(0x7d1), Some(!0), "custom")
        );
        let kinds: Vec<_> = d.extents.iter().map(|e| (e.len, e.kind)).collect();
        let flat = |offset| Kind::Flat { file: 0, offset };
        assert_eq!(
            kinds,
            [
                (2048, flat(1024)),
                (4096, Kind::Sparse { file: 1 }),
                (512, Kind::Zero),
                (512, flat(3072))
            ]
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        for bad in ["RW x FLAT \"a\" 0", "RW 1 FLAT a 0", "RW 36028797018963968 ZERO", "RW 1"] {
            let error = Descriptor::parse(&format!("{TEXT}{bad}\n")).unwrap_err();
            assert!(error.message().contains(bad), "{bad}: {error}");
        }
        let error = Descriptor::parse(&format!("{TEXT}RW 1 SESPARSE \"x\"")).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
        assert!(Descriptor::parse("version=1\n").is_err());
    }
}
