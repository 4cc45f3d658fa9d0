//! The header in the first cluster: fixed fields, extensions, the backing file's name.
//!
//! Specification: qcow2, "Header". Offsets and sizes that come from the file are checked here
//! against the bounds of the format; whether they lie inside the file is checked where they are
//! used.

use byteorder::{BigEndian, ByteOrder};

use super::extension::{self, Extension};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::image::{Backing, Details, Identity, Label};
use crate::storage::Storage;

/// `QFI\xfb`.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
const V2_LEN: usize = 72;
/// The shortest version 3 header.
const V3_MIN_LEN: usize = 104;
/// The version 3 header as this engine writes it: with the compression type.
const V3_LEN: usize = 112;
/// The largest refcount table, in bytes.
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The largest L1 table, in bytes.
pub(super) const MAX_L1: u64 = 32 << 20;
/// The most internal snapshots.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Where the extensions and names of nearly all headers end, in bytes: who looks at thousands of
/// headers need not read the rest of their clusters.
const USUAL: u64 = 4096;
/// What a medium writes whole or not at all, in bytes.
const SECTOR: u64 = 512;
/// The longest backing file name, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;

/// Incompatible feature bits.
pub(super) mod incompatible {
    pub const DIRTY: u64 = 1;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// What the specification defines.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature bit: refcounts may be written late while the dirty bit is set.
pub(super) const LAZY_REFCOUNTS: u64 = 1;

/// Autoclear feature bits.
pub(super) mod autoclear {
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
    /// All extensions but the backing format, which is in `backing`.
    pub extensions: Vec<Extension>,
}

/// Whether all that the header says ends within its first `bytes`: at least a version 3 header.
fn ends_within(bytes: &[u8]) -> bool {
    let offset = BigEndian::read_u64(&bytes[8..]);
    if offset != 0 {
        let len = u64::from(BigEndian::read_u32(&bytes[16..]));
        return offset.checked_add(len).is_some_and(|end| end <= bytes.len() as u64);
    }
    let v2 = BigEndian::read_u32(&bytes[4..]) == 2;
    let start = if v2 { V2_LEN } else { BigEndian::read_u32(&bytes[100..]) as usize };
    bytes.get(start..).is_some_and(extension::has_end)
}

impl Header {
    /// Reads and checks the header of `storage`.
    pub fn read(storage: &dyn Storage) -> Result<Header> {
        let len = storage.len()?;
        let mut bytes = vec![0; len.min(USUAL) as usize];
        storage.read_exact_at(0, &mut bytes)?;
        if bytes.len() < V2_LEN || BigEndian::read_u32(&bytes) != MAGIC {
            return Err(Error::corrupt("Image is not in qcow2 format"));
        }
        let bits = BigEndian::read_u32(&bytes[20..]);
        if !(9..=21).contains(&bits) {
            return Err(
                Error::unsupported(format!("Unsupported cluster size: 2^{bits}")).at_offset(20)
            );
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
        let u32_at = |at: usize| BigEndian::read_u32(&bytes[at..]);
        let u64_at = |at: usize| BigEndian::read_u64(&bytes[at..]);
        let version = u32_at(4);
        let header_len = match version {
            2 => V2_LEN,
            3 if bytes.len() >= V3_MIN_LEN => u32_at(100) as usize,
            3 => return Err(Error::corrupt("the header is cut short")),
            other => return Err(Error::unsupported(format!("Unsupported qcow2 version {other}"))),
        };
        if version == 3 && header_len < V3_MIN_LEN {
            return Err(Error::corrupt("qcow2 header too short").at_offset(100));
        }
        if header_len > bytes.len() {
            return Err(Error::corrupt("qcow2 header exceeds cluster size").at_offset(100));
        }
        let v3 = |at: usize| if version >= 3 { u64_at(at) } else { 0 };
        let mut header = Header {
            version,
            cluster: Unit::from_bits(u32_at(20)),
            size: u64_at(24),
            crypt_method: u32_at(32),
            l1_size: u32_at(36),
            l1_offset: u64_at(40),
            refcount_table_offset: u64_at(48),
            refcount_table_clusters: u32_at(56),
            snapshots: u32_at(60),
            snapshots_offset: u64_at(64),
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            refcount_order: if version >= 3 { u32_at(96) } else { 4 },
            compression: Compression::Zlib,
            tail: bytes.get(V3_LEN..header_len).unwrap_or_default().to_vec(),
            backing: None,
            extensions: Vec::new(),
        };
        let compression = if header_len > V3_MIN_LEN { bytes[V3_MIN_LEN] } else { 0 };
        header.parse_names(bytes, header_len)?;
        header.check_features(compression)?;
        header.check_bounds()?;
        Ok(header)
    }

    fn parse_names(&mut self, bytes: &[u8], header_len: usize) -> Result<()> {
        let offset = BigEndian::read_u64(&bytes[8..]);
        let len = BigEndian::read_u32(&bytes[16..]) as usize;
        let area_end = if offset == 0 { bytes.len() as u64 } else { offset };
        let area = usize::try_from(area_end).ok().and_then(|end| bytes.get(header_len..end));
        let Some(area) = area else {
            return Err(Error::corrupt("Invalid backing file offset").at_offset(8));
        };
        self.extensions = extension::parse(area, header_len as u64)?;
        if offset == 0 || len == 0 {
            return Ok(());
        }
        let start = offset as usize;
        let name = bytes.get(start..start.saturating_add(len)).unwrap_or_default();
        if name.is_empty() || name.len() > MAX_BACKING_NAME {
            return Err(Error::corrupt("Backing file name too long").at_offset(16));
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
            return bad("Reference count entry width too large; may not exceed 64 bits", 96);
        }
        if self.crypt_method > 2 {
            return bad("Unsupported encryption method", 32);
        }
        if table_bytes > MAX_REFCOUNT_TABLE {
            return bad("Reference count table too large", 56);
        }
        if table_bytes > 0 && !self.placed(self.refcount_table_offset, table_bytes) {
            return bad("Reference count table offset invalid", 48);
        }
        if !self.cluster.aligned(self.snapshots_offset) {
            return bad("Snapshot table offset invalid", 64);
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > MAX_L1 {
            return bad("Active L1 table too large", 36);
        }
        if self.l1_size > 0 && !self.placed(self.l1_offset, l1_bytes) {
            return bad("Active L1 table offset invalid", 40);
        }
        match self.l1_needed(self.size) {
            None => bad("Image is too big", 24),
            Some(needed) if u64::from(self.l1_size) < needed => bad("L1 table is too small", 36),
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

    /// The first cluster's bytes, as many as are needed. The feature name table, which only helps
    /// messages, is left out where it does not fit, and where a labelled header fits into one sector
    /// without it: a sector is written whole or not at all, so no crash tears a change of the tree.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut extensions = self.extensions.clone();
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.as_ref()) {
            let data = format.clone().into_bytes();
            extensions.push(Extension { magic: extension::BACKING_FORMAT, data });
        }
        let labelled = self.extension(Label::MAGIC).is_some();
        let room = if labelled { SECTOR } else { self.cluster.bytes() };
        let mut bytes = self.encode_with(&extensions)?;
        if bytes.len() as u64 > room {
            extensions.retain(|e| e.magic != extension::FEATURE_NAMES);
            bytes = self.encode_with(&extensions)?;
        }
        if bytes.len() as u64 > self.cluster.bytes() {
            return Err(Error::invalid(format!(
                "the header with its names takes {} bytes and must fit into one cluster of {} bytes",
                bytes.len(),
                self.cluster.bytes()
            )));
        }
        Ok(bytes)
    }

    fn encode_with(&self, extensions: &[Extension]) -> Result<Vec<u8>> {
        let fixed = if self.version >= 3 { V3_LEN + self.tail.len() } else { V2_LEN };
        let mut out = vec![0; fixed.next_multiple_of(8)];
        let header_len = out.len() as u32;
        out.extend_from_slice(&extension::encode(extensions));
        let name = self.backing.as_ref().map_or(&[][..], |b| b.name.as_bytes());
        if name.len() > MAX_BACKING_NAME {
            return Err(Error::invalid(format!(
                "the backing file's name has {} bytes, {MAX_BACKING_NAME} at most",
                name.len()
            )));
        }
        if !name.is_empty() {
            let at = out.len() as u64;
            BigEndian::write_u64(&mut out[8..], at);
            BigEndian::write_u32(&mut out[16..], name.len() as u32);
            out.extend_from_slice(name);
        }
        for (at, value) in [
            (0, MAGIC),
            (4, self.version),
            (20, self.cluster.bits()),
            (32, self.crypt_method),
            (36, self.l1_size),
            (56, self.refcount_table_clusters),
            (60, self.snapshots),
        ] {
            BigEndian::write_u32(&mut out[at..], value);
        }
        for (at, value) in [
            (24, self.size),
            (40, self.l1_offset),
            (48, self.refcount_table_offset),
            (64, self.snapshots_offset),
        ] {
            BigEndian::write_u64(&mut out[at..], value);
        }
        if self.version >= 3 {
            self.encode_v3(&mut out, header_len);
        }
        Ok(out)
    }

    fn encode_v3(&self, out: &mut [u8], header_len: u32) {
        BigEndian::write_u64(&mut out[72..], self.incompatible);
        BigEndian::write_u64(&mut out[80..], self.compatible);
        BigEndian::write_u64(&mut out[88..], self.autoclear);
        BigEndian::write_u32(&mut out[96..], self.refcount_order);
        BigEndian::write_u32(&mut out[100..], header_len);
        out[V3_MIN_LEN] = match self.compression {
            Compression::Zlib => 0,
            Compression::Zstd => 1,
        };
        out[V3_LEN..V3_LEN + self.tail.len()].copy_from_slice(&self.tail);
    }
}
