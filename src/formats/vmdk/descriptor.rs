//! The text of a VMDK: which extents make up the disk, and who its parent is.
//! "Virtual Disk Format 5.0", section "The Descriptor File".

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
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

/// The types of extents that are read.
const TYPES: [&str; 6] = ["FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE", "ZERO"];

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
    pub files: Vec<Name>,
    pub(super) extents: Vec<Line>,
}

/// The name of a file, which stands in a descriptor in any encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// As the descriptor has it.
    pub bytes: OsString,
    /// As text: what is no UTF-8 is taken for Latin-1, which programs on Windows and ESX wrote.
    pub text: String,
}

impl Name {
    fn new(bytes: &[u8]) -> Name {
        Name { bytes: OsString::from_vec(bytes.to_vec()), text: text(bytes) }
    }
}

/// One extent line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    /// Bytes of the guest disk.
    pub(super) len: u64,
    pub(super) kind: Kind,
    /// The name of its type.
    pub(super) name: &'static str,
    /// It says `RW`.
    pub(super) writable: bool,
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
        Descriptor::parse(text).map_err(|e| e.at_offset(offset))
    }

    /// Parses the text, whose names may be in any encoding.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor> {
        let mut descriptor = Descriptor::default();
        for (number, line) in bytes.split(|&b| b == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            descriptor.line(line).map_err(|error| {
                if error.kind() == ErrorKind::Corrupt && line.starts_with(b"RW ") {
                    return Error::corrupt(format!("Invalid extent line: {}", text(line)));
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

    /// What the parent is known by; nothing where any will do.
    pub(super) fn parent_fingerprints(&self) -> Vec<String> {
        let parent = self.parent.as_ref().and(self.parent_cid);
        parent.filter(|&id| id != u32::MAX).map(super::cid).into_iter().collect()
    }

    fn line(&mut self, line: &[u8]) -> Result<()> {
        match word(line) {
            (access @ (b"RW" | b"RDONLY" | b"NOACCESS"), rest) if !rest.is_empty() => {
                self.extent(access, rest)
            }
            _ => self.entry(&text(line)),
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

    /// `SECTORS TYPE ["NAME" [OFFSET]]`, the offset in sectors. More may follow: partitions of disks
    /// and devices have ids there.
    fn extent(&mut self, access: &[u8], rest: &[u8]) -> Result<()> {
        let bad = || Error::corrupt("not an extent line");
        if access == b"NOACCESS" {
            return Err(Error::unsupported("an extent without access"));
        }
        if self.extents.len() >= MAX_EXTENTS {
            return Err(Error::unsupported(format!("more than {MAX_EXTENTS} extents")));
        }
        let (sectors, rest) = word(rest);
        let len = bytes(sectors)?;
        let (kind, rest) = word(rest);
        let known = TYPES.into_iter().find(|name| name.as_bytes() == kind);
        let kind = match kind {
            b"ZERO" => Kind::Zero,
            b"FLAT" | b"VMFS" => {
                let (name, more) = quoted(rest).ok_or_else(bad)?;
                let offset = match word(more).0 {
                    b"" => 0,
                    // These begin at the beginning of their file.
                    number if kind == b"VMFS" && bytes(number).is_ok() => return Err(bad()),
                    _ if kind == b"VMFS" => 0,
                    number => bytes(number)?,
                };
                Kind::Flat { file: self.file(name)?, offset }
            }
            b"SPARSE" | b"VMFSSPARSE" | b"SESPARSE" => {
                let before = self.files.len();
                let file = self.file(quoted(rest).ok_or_else(bad)?.0)?;
                // One file is one sparse extent; this also bounds how many tables are held.
                if file < before {
                    return Err(Error::corrupt("a sparse extent that is listed twice"));
                }
                Kind::Sparse { file }
            }
            b"" => return Err(bad()),
            other => {
                let message = format!("VMDK extents of type {}", text(other));
                return Err(Error::unsupported(message));
            }
        };
        let name = known.unwrap_or_default();
        self.extents.push(Line { len, kind, name, writable: access == b"RW" });
        Ok(())
    }

    fn file(&mut self, name: &[u8]) -> Result<usize> {
        let name = Name::new(name);
        if let Some(index) = self.files.iter().position(|known| *known == name) {
            return Ok(index);
        }
        if name.bytes.is_empty() || self.files.len() >= MAX_FILES {
            return Err(Error::unsupported(format!(
                "an extent without a name, or more than {MAX_FILES} files"
            )));
        }
        self.files.push(name);
        Ok(self.files.len() - 1)
    }
}

/// The text that bytes mean.
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|&b| char::from(b)).collect(),
    }
}

/// The first word, and what follows the blanks behind it.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii_start();
    let end = text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len());
    let (word, rest) = text.split_at_checked(end).unwrap_or((text, &[]));
    (word, rest.trim_ascii_start())
}

fn bytes(sectors: &[u8]) -> Result<u64> {
    let sectors = text(sectors);
    let number = sectors.parse::<u64>().ok().and_then(|n| SECTOR.start(n));
    number.ok_or_else(|| Error::corrupt(format!("'{sectors}' is not a number of sectors")))
}

/// What stands between the first two quotes, and what follows.
fn quoted(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = text.trim_ascii_start().strip_prefix(b"\"")?;
    let end = rest.iter().position(|&b| b == b'"')?;
    let (name, rest) = rest.split_at_checked(end)?;
    Some((name, rest.strip_prefix(b"\"")?))
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
        let d = Descriptor::parse(TEXT.as_bytes()).unwrap();
        let names: Vec<_> = d.files.iter().map(|name| name.text.as_str()).collect();
        assert_eq!(names, ["a b.vmdk", "s.vmdk"]);
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
            let error = Descriptor::parse(format!("{TEXT}{bad}\n").as_bytes()).unwrap_err();
            assert!(error.message().contains(bad), "{bad}: {error}");
        }
        let error = Descriptor::parse(format!("{TEXT}RW 1 VMFSRDM \"x\"").as_bytes()).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
        assert!(Descriptor::parse(b"version=1\n").is_err());
    }

    /// ESX and Workstation write lines with more values than the specification has, and names in the
    /// encoding of their system.
    #[test]
    fn lines_of_other_programs_are_read() {
        let lines = b"version=1\ncreateType=\"custom\"\nRW 4 FLAT \"a\" 2 id1 id2\n\
            RW 8 VMFSSPARSE \"d-delta.vmdk\"\nRW 8 SESPARSE \"d-sesparse.vmdk\"\n\
            RW 8 VMFS \"f-flat.vmdk\" whatever\nRW 1 FLAT \"b\xfcro \xe9.vmdk\" 0\n";
        let d = Descriptor::parse(lines).unwrap();
        assert_eq!(d.extents[0].kind, Kind::Flat { file: 0, offset: 1024 });
        assert_eq!(d.extents[1].kind, Kind::Sparse { file: 1 });
        assert_eq!(d.extents[2].kind, Kind::Sparse { file: 2 });
        assert_eq!(d.extents[3].kind, Kind::Flat { file: 3, offset: 0 });
        assert_eq!(d.files[4].text, "b\u{fc}ro \u{e9}.vmdk");
        assert_eq!(d.files[4].bytes.as_encoded_bytes(), b"b\xfcro \xe9.vmdk");
        let offset = b"version=1\ncreateType=\"vmfs\"\nRW 8 VMFS \"f-flat.vmdk\" 0\n";
        assert!(Descriptor::parse(offset).is_err());
    }
}
