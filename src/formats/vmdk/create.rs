//! New VMDK images: the descriptor's text, and the empty extents that it lists.
//! "Virtual Disk Format 5.0".

use std::fmt::Write as _;
use std::sync::Arc;

use zerocopy::{FromZeros, IntoBytes};

use super::sparse::{self, RawHeader, SECTOR};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// The unit of allocation of sparse extents.
pub const GRAIN: Unit = Unit::from_bits(16);
/// Entries of a grain table, and the sectors that they take.
const ENTRIES: u64 = 512;
const TABLE: u64 = ENTRIES * 4 / SECTOR.bytes();
/// First sector and number of sectors of the descriptor inside a sparse extent.
const DESCRIPTOR: (u64, u64) = (1, 20);
/// The part of a disk that is kept in one of several files.
const PIECE: u64 = 2 << 30;
/// The largest disk, in bytes: 64 TiB.
const MAX_SIZE: u64 = 64 << 40;

/// How the data of a disk are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subformat {
    /// One file with description and grains.
    MonolithicSparse,
    /// A description, and one file with the disk's bytes.
    MonolithicFlat,
    /// A description, and files of grains for each 2 GiB.
    TwoGbMaxExtentSparse,
    /// A description, and files of 2 GiB with the disk's bytes.
    TwoGbMaxExtentFlat,
    /// One file with description and compressed grains.
    StreamOptimized,
}

impl Subformat {
    /// All of them.
    pub const ALL: [Subformat; 5] = [
        Subformat::MonolithicSparse,
        Subformat::MonolithicFlat,
        Subformat::TwoGbMaxExtentSparse,
        Subformat::TwoGbMaxExtentFlat,
        Subformat::StreamOptimized,
    ];

    /// Its name, which is also its `createType`.
    pub fn name(self) -> &'static str {
        match self {
            Subformat::MonolithicSparse => "monolithicSparse",
            Subformat::MonolithicFlat => "monolithicFlat",
            Subformat::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Subformat::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Subformat::StreamOptimized => "streamOptimized",
        }
    }

    /// The disk's bytes stand in files as they are.
    pub fn is_flat(self) -> bool {
        matches!(self, Subformat::MonolithicFlat | Subformat::TwoGbMaxExtentFlat)
    }

    fn is_split(self) -> bool {
        matches!(self, Subformat::TwoGbMaxExtentSparse | Subformat::TwoGbMaxExtentFlat)
    }

    /// The description stands in the one extent.
    pub fn is_one_file(self) -> bool {
        !self.is_flat() && !self.is_split()
    }
}

/// What to make.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Bytes of the guest's disk.
    pub size: u64,
    /// How they are kept.
    pub subformat: Subformat,
    /// Zeroes take no grain.
    pub zeroed_grain: bool,
    /// The name and content id of the image below.
    pub parent: Option<(String, u32)>,
    /// What the disk is plugged into.
    pub adapter: String,
    /// The version of the virtual machine.
    pub hardware: String,
    /// The version of the programs in the guest.
    pub tools: String,
}

/// Refuses a name of an image that no description can hold: it has no way to write a quote or the
/// end of a line inside a name.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
pub fn check_name(name: &str) -> Result<()> {
    if !name.contains(['"', '\n', '\r']) {
        return Ok(());
    }
    let name = name.escape_debug();
    Err(Error::unsupported(format!(
        "a VMDK image cannot be called '{name}': its description has no way to write quotes and line \
         ends in a name"
    )))
}

/// Makes an image whose description is called `name` and stands in `storage`, whatever that holds;
/// `open` makes the files beside it that it needs, and opens them.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for disks past 64 TiB, and for what
/// flat files cannot do.
pub fn create(
    storage: &dyn Storage,
    name: &str,
    options: &CreateOptions,
    open: &mut dyn FnMut(&str) -> Result<Arc<dyn Storage>>,
) -> Result<()> {
    let CreateOptions { size, subformat, .. } = *options;
    check_name(name)?;
    if size > MAX_SIZE {
        return Err(Error::unsupported("The image size is too large for file format 'vmdk'"));
    }
    if subformat.is_flat() && options.parent.is_some() {
        return Err(Error::unsupported("Flat image can't have backing file"));
    }
    if subformat.is_flat() && options.zeroed_grain {
        return Err(Error::unsupported("Flat image can't enable zeroed grain"));
    }
    if !subformat.is_one_file() {
        if storage.is_fixed() {
            // The description is all that its file holds.
            return Err(Error::unsupported("a VMDK of several files cannot begin on a device"));
        }
        storage.renew(0..0)?;
    }
    let mut lines = String::new();
    for (number, len) in pieces(options).enumerate() {
        let file = match subformat.is_one_file() {
            true => name.to_owned(),
            false => extent_name(name, subformat, number + 1),
        };
        let sectors = SECTOR.count(len);
        let _ = match subformat.is_flat() {
            true => writeln!(lines, "RW {sectors} FLAT \"{file}\" 0"),
            false => writeln!(lines, "RW {sectors} SPARSE \"{file}\""),
        };
        if subformat.is_one_file() {
            sparse_extent(storage, len, options)?;
            continue;
        }
        let extent = open(&file)?;
        match subformat.is_flat() {
            true => flat(&*extent, len)?,
            false => sparse_extent(&*extent, len, options)?,
        }
        extent.sync()?;
    }
    let text = description(options, &lines);
    let (first, sectors) = DESCRIPTOR;
    match subformat.is_one_file() {
        true if text.len() as u64 > sectors * SECTOR.bytes() => {
            return Err(Error::unsupported("the image description does not fit into its place"));
        }
        true => storage.write_all_at(first * SECTOR.bytes(), text.as_bytes())?,
        false => storage.write_all_at(0, text.as_bytes())?,
    }
    storage.sync()
}

/// The lengths of the disk's files.
fn pieces(options: &CreateOptions) -> impl Iterator<Item = u64> {
    let size = options.size;
    let piece = if options.subformat.is_split() { PIECE } else { size.max(1) };
    (0..size.div_ceil(piece).max(1)).map(move |n| (size - n * piece).min(piece))
}

/// `disk.vmdk` becomes `disk-flat.vmdk`, `disk-f001.vmdk` or `disk-s001.vmdk`.
fn extent_name(name: &str, subformat: Subformat, number: usize) -> String {
    let (stem, dot, end) = match name.rsplit_once('.') {
        Some((stem, end)) => (stem, ".", end),
        None => (name, "", ""),
    };
    // Otherwise what stands before a colon would be taken for a protocol.
    let here = if name.contains(':') { "./" } else { "" };
    match subformat {
        Subformat::TwoGbMaxExtentFlat => format!("{here}{stem}-f{number:03}{dot}{end}"),
        Subformat::TwoGbMaxExtentSparse => format!("{here}{stem}-s{number:03}{dot}{end}"),
        _ => format!("{here}{stem}-flat{dot}{end}"),
    }
}

fn flat(storage: &dyn Storage, len: u64) -> Result<()> {
    storage.renew(0..len)?;
    // A written first block lets programs find out the host's alignment.
    storage.write_all_at(0, &vec![0; len.min(4096) as usize])
}

/// An empty sparse extent: header, two directories, and the tables that they name.
fn sparse_extent(storage: &dyn Storage, len: u64, options: &CreateOptions) -> Result<()> {
    let tables = GRAIN.count(len).div_ceil(ENTRIES);
    let directory = SECTOR.count(tables * 4);
    let redundant = DESCRIPTOR.0 + DESCRIPTOR.1;
    let first = redundant + directory + tables * TABLE;
    let grains = GRAIN.ceil((first + directory + tables * TABLE) * SECTOR.bytes());
    storage.renew(0..grains)?;
    for at in [redundant, first] {
        // Tables are named by the sectors behind the directory, in their order.
        let sectors = (0..tables).map(|n| (at + directory + n * TABLE) as u32);
        let bytes: Vec<u8> = sectors.flat_map(u32::to_le_bytes).collect();
        storage.write_all_at(at * SECTOR.bytes(), &bytes)?;
    }
    let streamed = options.subformat == Subformat::StreamOptimized;
    let (version, mut flags) = match (streamed, options.zeroed_grain) {
        (true, _) => (3u32, 0x30003u32),
        (false, true) => (2, 3),
        (false, false) => (1, 3),
    };
    flags |= if options.zeroed_grain { sparse::FLAG_ZERO_GRAIN } else { 0 };
    let header = RawHeader {
        magic: sparse::MAGIC,
        version: version.into(),
        flags: flags.into(),
        capacity: SECTOR.count(len).into(),
        grain_size: SECTOR.index(GRAIN.bytes()).into(),
        descriptor_offset: DESCRIPTOR.0.into(),
        descriptor_size: DESCRIPTOR.1.into(),
        num_gtes_per_gt: (ENTRIES as u32).into(),
        rgd_offset: redundant.into(),
        gd_offset: first.into(),
        overhead: SECTOR.index(grains).into(),
        line_ends: *b"\n \r\n",
        compress_algorithm: u16::from(streamed).into(),
        ..RawHeader::new_zeroed()
    };
    storage.write_all_at(0, header.as_bytes())
}

fn description(options: &CreateOptions, lines: &str) -> String {
    // A random id, and none of those that mean something.
    let id = uuid::Uuid::new_v4().as_u128() as u32;
    let id = if matches!(id, 0 | u32::MAX) { 1 } else { id };
    let parent_id = options.parent.as_ref().map_or(u32::MAX, |(_, id)| *id);
    let hint = match &options.parent {
        Some((name, _)) => format!("parentFileNameHint=\"{name}\"\n"),
        None => String::new(),
    };
    let heads = if options.adapter == "ide" { 16 } else { 255 };
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={id:x}\nparentCID={parent_id:x}\n\
         createType=\"{kind}\"\n{hint}\n# Extent description\n{lines}\n# The Disk Data Base\n#DDB\n\n\
         ddb.virtualHWVersion = \"{hardware}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\n\
         ddb.adapterType = \"{adapter}\"\nddb.toolsVersion = \"{tools}\"\n",
        kind = options.subformat.name(),
        hardware = options.hardware,
        cylinders = options.size / (63 * heads * SECTOR.bytes()),
        adapter = options.adapter,
        tools = options.tools,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::GuestOffset;
    use crate::formats::vmdk::Plan;
    use crate::image::{Image, Mapping};
    use crate::storage::MemoryStorage;

    fn options(subformat: Subformat) -> CreateOptions {
        CreateOptions {
            size: 5 << 30,
            subformat,
            zeroed_grain: false,
            parent: None,
            adapter: "ide".to_owned(),
            hardware: "4".to_owned(),
            tools: "2147483647".to_owned(),
        }
    }

    #[test]
    fn a_new_image_opens_and_is_empty() {
        use Subformat::{MonolithicSparse, StreamOptimized, TwoGbMaxExtentSparse};
        for (subformat, names) in [
            (MonolithicSparse, &[][..]),
            (StreamOptimized, &[]),
            (TwoGbMaxExtentSparse, &["d-s001.vmdk", "d-s002.vmdk", "d-s003.vmdk"]),
        ] {
            let own: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
            let (mut files, mut seen) = (Vec::new(), Vec::new());
            create(&*own, "d.vmdk", &options(subformat), &mut |name| {
                seen.push(name.to_owned());
                let file: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
                files.push(Arc::clone(&file));
                Ok(file)
            })
            .unwrap();
            let plan = Plan::read(own).unwrap();
            let listed: Vec<_> = plan.files().iter().map(|name| name.text.clone()).collect();
            assert!(listed == seen && seen == names, "{seen:?}");
            let image = plan.open(&files).unwrap();
            assert_eq!(image.size(), 5 << 30);
            let first = image.map(GuestOffset(0), 5 << 30).unwrap();
            assert_eq!(first.mapping, Mapping::Unallocated);
        }
    }

    #[test]
    fn flat_files_have_no_parent_and_names_may_lack_an_ending() {
        let bad = CreateOptions {
            parent: Some(("base".to_owned(), 7)),
            ..options(Subformat::MonolithicFlat)
        };
        let storage = MemoryStorage::default();
        let made = create(&storage, "x", &bad, &mut |_| Err(Error::invalid("no file is needed")));
        assert!(made.unwrap_err().message().contains("can't have backing file"));
        assert_eq!(extent_name("noext", Subformat::MonolithicFlat, 1), "noext-flat");
        assert_eq!(extent_name("a.b.vmdk", Subformat::TwoGbMaxExtentFlat, 12), "a.b-f012.vmdk");
    }
}
