//! The header in the first cluster: fixed fields, extensions, the backing file's name.
//!
//! Specification: qcow2, "Header". Offsets and sizes that come from the file are checked here
//! against the bounds of the format; whether they lie inside the file is checked where they are
//! used.

pub(in crate::qcow2) mod extension;
pub(in crate::qcow2) mod layout;
pub(in crate::qcow2) mod relabel;

use std::mem::offset_of;
use std::ops::Range;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::image::{Backing, Details, Identity, Label};
use crate::qcow2::header::extension::Extension;
use crate::storage::Storage;

/// `QFI\xfb`.
pub(in crate::qcow2) const MAGIC: u32 = 0x5146_49fb;

/// The fixed fields as they stand in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    // A version 2 header ends here.
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
    // The shortest version 3 header ends here.
    compression_type: u8,
    padding: [u8; 7],
}

/// Bytes of a version 2 header.
const V2_LEN: usize = offset_of!(Fixed, incompatible_features);
/// The shortest version 3 header.
const V3_MIN_LEN: usize = offset_of!(Fixed, compression_type);
/// The version 3 header as this engine writes it: with the compression type.
const V3_LEN: usize = size_of::<Fixed>();
const _: () = assert!(V2_LEN == 72 && V3_MIN_LEN == 104 && V3_LEN == 112);

/// The place of a fixed field in the file, for errors.
macro_rules! at {
    ($field:ident) => {
        offset_of!(Fixed, $field) as u64
    };
}

impl Fixed {
    /// The fields at the beginning of the file; those that `bytes` do not reach are zero.
    fn read(bytes: &[u8]) -> Fixed {
        let mut fixed = Fixed::new_zeroed();
        let len = bytes.len().min(V3_LEN);
        fixed.as_mut_bytes()[..len].copy_from_slice(&bytes[..len]);
        fixed
    }
}

/// The largest refcount table, in bytes.
pub(in crate::qcow2) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The largest L1 table, in bytes.
pub(in crate::qcow2) const MAX_L1: u64 = 32 << 20;
/// The most internal snapshots.
pub(in crate::qcow2) const MAX_SNAPSHOTS: u32 = 65536;
/// Where the extensions and names of nearly all headers end, in bytes: who looks at thousands of
/// headers need not read the rest of their clusters.
const USUAL: u64 = 4096;
/// The longest backing file name, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;

/// Incompatible feature bits.
pub(in crate::qcow2) mod incompatible {
    pub const DIRTY: u64 = 1;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// What the specification defines.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature bit: refcounts may be written late while the dirty bit is set.
pub(in crate::qcow2) const LAZY_REFCOUNTS: u64 = 1;

/// Autoclear feature bits.
pub(in crate::qcow2) mod autoclear {
    /// The external data file can be read without the tables.
    pub const RAW_DATA: u64 = 1 << 1;
    /// The content id in vdisk's label speaks for the bytes: a program that does not know the bit
    /// clears it when it opens the image for writing.
    pub const CONTENT_ID: u64 = 1 << 61;
    /// The bitmaps are consistent with the disk.
    pub const BITMAPS: u64 = 1;
    /// What this engine keeps right when it writes; it clears the others.
    pub const KEPT: u64 = CONTENT_ID | BITMAPS | RAW_DATA;
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate with a 4 KiB window.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl Compression {
    /// Its name, as qemu-img gives it.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// Everything in the header cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size: 512 bytes to 2 MiB.
    pub cluster: Unit,
    /// The guest disk's size in bytes.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Host offset of the active L1 table.
    pub l1_offset: u64,
    /// Host offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Bits that a program must know to open the image.
    pub incompatible: u64,
    /// Bits that a program may ignore.
    pub compatible: u64,
    /// Bits that a program that does not know them clears when it writes.
    pub autoclear: u64,
    /// log2 of a refcount's width in bits, 0 to 6.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Header bytes past those that this version knows, kept as they are.
    pub tail: Vec<u8>,
    /// The layer below.
    pub backing: Option<Backing>,
    /// All extensions but the backing format, which is in `backing`, and those of the layout.
    pub extensions: Vec<Extension>,
    /// The bytes past the first sector that the header takes in the file.
    pub(in crate::qcow2) spill: Range<u64>,
}

/// Whether all that the header says ends within its first `bytes`: at least a version 3 header.
fn ends_within(bytes: &[u8]) -> bool {
    let fixed = Fixed::read(bytes);
    let offset = fixed.backing_file_offset.get();
    if offset != 0 {
        let len = u64::from(fixed.backing_file_size.get());
        return offset.checked_add(len).is_some_and(|end| end <= bytes.len() as u64);
    }
    let start = if fixed.version == 2 { V2_LEN } else { fixed.header_length.get() as usize };
    bytes.get(start..).is_some_and(|area| extension::each(area, |_, _| ()))
}

fn unsupported_version(version: u32) -> Error {
    Error::unsupported(format!("Unsupported qcow2 version {version}")).at_offset(at!(version))
}

impl Header {
    /// Reads and checks the header of `storage`.
    pub fn read(storage: &dyn Storage) -> Result<Header> {
        let len = storage.len()?;
        let mut bytes = vec![0; len.min(USUAL) as usize];
        storage.read_exact_at(0, &mut bytes)?;
        let fixed = Fixed::read(&bytes);
        if bytes.len() < V2_LEN || fixed.magic != MAGIC {
            return Err(Error::corrupt("Image is not in qcow2 format"));
        }
        let version = fixed.version.get();
        if !matches!(version, 2 | 3) {
            return Err(unsupported_version(version));
        }
        let bits = fixed.cluster_bits.get();
        if !(9..=21).contains(&bits) {
            let message = format!("Unsupported cluster size: 2^{bits}");
            return Err(Error::unsupported(message).at_offset(at!(cluster_bits)));
        }
        let cluster = len.min(1 << bits);
        if cluster < USUAL {
            bytes.truncate(cluster as usize);
        } else if cluster > USUAL && !ends_within(&bytes) {
            bytes.resize(cluster as usize, 0);
            storage.read_exact_at(0, &mut bytes)?;
        }
        Header::parse(&bytes)
    }

    /// Parses the first cluster, or as much of it as the file has: at least a version 2 header.
    fn parse(bytes: &[u8]) -> Result<Header> {
        let mut fixed = Fixed::read(bytes);
        let version = fixed.version.get();
        let header_len = match version {
            2 => V2_LEN,
            3 if bytes.len() >= V3_MIN_LEN => fixed.header_length.get() as usize,
            3 => return Err(Error::corrupt("the header is cut short")),
            other => return Err(unsupported_version(other)),
        };
        if version == 3 && header_len < V3_MIN_LEN {
            return Err(Error::corrupt("qcow2 header too short").at_offset(at!(header_length)));
        }
        if header_len > bytes.len() {
            let message = "qcow2 header exceeds cluster size";
            return Err(Error::corrupt(message).at_offset(at!(header_length)));
        }
        // What a shorter header leaves out is zero.
        fixed.as_mut_bytes()[header_len.min(V3_LEN)..].fill(0);
        let mut header = Header {
            version,
            cluster: Unit::from_bits(fixed.cluster_bits.get()),
            size: fixed.size.get(),
            crypt_method: fixed.crypt_method.get(),
            l1_size: fixed.l1_size.get(),
            l1_offset: fixed.l1_table_offset.get(),
            refcount_table_offset: fixed.refcount_table_offset.get(),
            refcount_table_clusters: fixed.refcount_table_clusters.get(),
            snapshots: fixed.nb_snapshots.get(),
            snapshots_offset: fixed.snapshots_offset.get(),
            incompatible: fixed.incompatible_features.get(),
            compatible: fixed.compatible_features.get(),
            autoclear: fixed.autoclear_features.get(),
            refcount_order: if version >= 3 { fixed.refcount_order.get() } else { 4 },
            compression: Compression::Zlib,
            tail: bytes.get(V3_LEN..header_len).unwrap_or_default().to_vec(),
            backing: None,
            extensions: Vec::new(),
            spill: 0..0,
        };
        header.parse_names(bytes, &fixed, header_len)?;
        header.check_features(fixed.compression_type)?;
        header.check_bounds()?;
        Ok(header)
    }

    fn parse_names(&mut self, bytes: &[u8], fixed: &Fixed, header_len: usize) -> Result<()> {
        let offset = fixed.backing_file_offset.get();
        let len = fixed.backing_file_size.get() as usize;
        let area_end = if offset == 0 { bytes.len() as u64 } else { offset };
        let area = usize::try_from(area_end).ok().and_then(|end| bytes.get(header_len..end));
        let Some(area) = area else {
            let message = "Invalid backing file offset";
            return Err(Error::corrupt(message).at_offset(at!(backing_file_offset)));
        };
        self.extensions = extension::parse(area, header_len as u64)?;
        let name_end = if offset == 0 { 0 } else { offset + len as u64 };
        self.take_layout(bytes, header_len..header_len + area.len(), name_end);
        if offset == 0 || len == 0 {
            return Ok(());
        }
        let start = offset as usize;
        let name = bytes.get(start..start.saturating_add(len)).unwrap_or_default();
        if name.is_empty() || name.len() > MAX_BACKING_NAME {
            let message = "Backing file name too long";
            return Err(Error::corrupt(message).at_offset(at!(backing_file_size)));
        }
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec())
                .map_err(|_| Error::unsupported("the backing file's name is not UTF-8"))
        };
        let mut format = None;
        // Where there are several, the last one counts, as with every extension.
        let is_format = |e: &Extension| e.magic == extension::BACKING_FORMAT;
        if let Some(recorded) = self.extensions.iter().rfind(|e| is_format(e)) {
            format = Some(text(&recorded.data)?);
        }
        self.extensions.retain(|e| !is_format(e));
        self.backing = Some(Backing { name: text(name)?, format });
        Ok(())
    }

    fn check_features(&mut self, compression: u8) -> Result<()> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let names = extension::name_bits(&self.extensions, unknown);
            return Err(Error::unsupported(format!("Unsupported qcow2 feature(s): {names}")));
        }
        let flagged = self.incompatible & incompatible::COMPRESSION != 0;
        let bit = |must| format!("qcow2: Compression type incompatible feature bit must {must}");
        self.compression = match (compression, flagged) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0, true) => return Err(Error::corrupt(bit("not be set"))),
            (1, false) => return Err(Error::corrupt(bit("be set"))),
            (other, _) => {
                return Err(Error::unsupported(format!(
                    "qcow2: unknown compression type: {other}"
                )));
            }
        };
        Ok(())
    }

    fn check_bounds(&self) -> Result<()> {
        let bad = |what: &str, at| Err(Error::corrupt(what).at_offset(at));
        let table_bytes = u64::from(self.refcount_table_clusters) << self.cluster.bits();
        if self.refcount_order > 6 {
            return bad(
                "Reference count entry width too large; may not exceed 64 bits",
                at!(refcount_order),
            );
        }
        if self.crypt_method > 2 {
            return bad("Unsupported encryption method", at!(crypt_method));
        }
        if table_bytes > MAX_REFCOUNT_TABLE {
            return bad("Reference count table too large", at!(refcount_table_clusters));
        }
        if table_bytes > 0 && !self.placed(self.refcount_table_offset, table_bytes) {
            return bad("Reference count table offset invalid", at!(refcount_table_offset));
        }
        if !self.cluster.aligned(self.snapshots_offset) {
            return bad("Snapshot table offset invalid", at!(snapshots_offset));
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > MAX_L1 {
            return bad("Active L1 table too large", at!(l1_size));
        }
        if self.l1_size > 0 && !self.placed(self.l1_offset, l1_bytes) {
            return bad("Active L1 table offset invalid", at!(l1_table_offset));
        }
        match self.l1_needed(self.size) {
            None => bad("Image is too big", at!(size)),
            Some(needed) if u64::from(self.l1_size) < needed => {
                bad("L1 table is too small", at!(l1_size))
            }
            Some(_) => Ok(()),
        }
    }

    /// Whether a table of `bytes` bytes can stand at `offset`: on a cluster boundary, past the
    /// header, below 2^56.
    fn placed(&self, offset: u64, bytes: u64) -> bool {
        self.cluster.aligned(offset)
            && offset >= self.cluster.bytes()
            && offset.checked_add(bytes).is_some_and(|end| end <= 1 << 56)
    }

    /// Whether L2 entries are 128 bits wide, with subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether the data stand in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// The recorded name of the external data file; `None` where there is none, or where it is not
    /// recorded.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a name that is not UTF-8.
    pub fn data_file(&self) -> Result<Option<&str>> {
        let name = self.extension(extension::DATA_FILE).filter(|_| self.has_data_file());
        let text = |name| {
            str::from_utf8(name)
                .map_err(|_| Error::unsupported("the external data file's name is not UTF-8"))
        };
        name.filter(|name| !name.is_empty()).map(text).transpose()
    }

    /// Whether the external data file shows the disk without this image's tables.
    pub fn data_file_is_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & autoclear::RAW_DATA != 0
    }

    /// What people want to know of it.
    pub fn details(&self) -> Details {
        let is = |bit: u64| Some(self.incompatible & bit != 0);
        Details {
            version: Some(self.version),
            compression: Some(self.compression.name()),
            refcount_bits: Some(1 << self.refcount_order),
            lazy_refcounts: Some(self.compatible & LAZY_REFCOUNTS != 0),
            extended_l2: Some(self.extended_l2()),
            dirty: is(incompatible::DIRTY),
            corrupt: is(incompatible::CORRUPT),
            encryption: match self.crypt_method {
                0 => None,
                1 => Some("aes"),
                _ => Some("luks"),
            },
            data_file: self.data_file().ok().flatten().map(str::to_owned),
            internal_snapshots: Some(self.snapshots),
        }
    }

    /// Whether the image was not closed by its last writer: refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether some program found the image damaged.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether refcounts may be written late.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & LAZY_REFCOUNTS != 0
    }

    /// Bytes of guest disk that one L2 table maps.
    pub fn l2_coverage(&self) -> Unit {
        let entry_bits = if self.extended_l2() { 4 } else { 3 };
        Unit::from_bits(2 * self.cluster.bits() - entry_bits)
    }

    /// L1 entries for a guest disk of `size` bytes; `None` where the format has no room for it.
    pub fn l1_needed(&self, size: u64) -> Option<u64> {
        let entries = self.l2_coverage().count(size);
        (entries * 8 <= MAX_L1).then_some(entries)
    }

    /// The bytes of the extension with `magic`.
    pub fn extension(&self, magic: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|e| e.magic == magic).map(|e| &e.data[..])
    }

    /// Who the layer says it is.
    pub fn identity(&self) -> Result<Identity> {
        Ok(Identity {
            label: self.extension(Label::MAGIC).map(Label::decode).transpose()?,
            vouched: self.autoclear & autoclear::CONTENT_ID != 0,
            backing: self.backing.clone(),
        })
    }

    /// Sets, replaces or (with `None`) removes an extension.
    pub fn set_extension(&mut self, magic: u32, data: Option<Vec<u8>>) {
        let at = self.extensions.iter().position(|e| e.magic == magic);
        match (at, data) {
            (Some(at), Some(data)) => self.extensions[at].data = data,
            (Some(at), None) => drop(self.extensions.remove(at)),
            (None, Some(data)) => self.extensions.push(Extension { magic, data }),
            (None, None) => {}
        }
    }

    /// Bytes of the fixed fields.
    pub(in crate::qcow2) fn fixed_len(&self) -> usize {
        let fixed = if self.version >= 3 { V3_LEN + self.tail.len() } else { V2_LEN };
        fixed.next_multiple_of(8)
    }

    /// The fixed fields. The backing file's name, where there is one, stands at `name_at`.
    pub(in crate::qcow2) fn encode_fixed(&self, name_at: u64) -> Vec<u8> {
        let name_len = self.backing_name().len();
        let fixed = Fixed {
            magic: MAGIC.into(),
            version: self.version.into(),
            backing_file_offset: if name_len > 0 { name_at } else { 0 }.into(),
            backing_file_size: (name_len as u32).into(),
            cluster_bits: self.cluster.bits().into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshots.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible_features: self.incompatible.into(),
            compatible_features: self.compatible.into(),
            autoclear_features: self.autoclear.into(),
            refcount_order: self.refcount_order.into(),
            header_length: (self.fixed_len() as u32).into(),
            compression_type: match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            },
            padding: [0; 7],
        };
        let mut out = fixed.as_bytes().to_vec();
        if self.version >= 3 {
            out.extend_from_slice(&self.tail);
        }
        out.resize(self.fixed_len(), 0);
        out
    }

    /// The backing file's name; empty without one.
    pub(in crate::qcow2) fn backing_name(&self) -> &[u8] {
        self.backing.as_ref().map_or(&[][..], |b| b.name.as_bytes())
    }
}
