//! New images, and room for what will be written.
//!
//! The layout is QEMU's: header, refcount table, first refcount block, L1 table, then whatever is
//! written first.

use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Allocation, Backing, Image as _, Mapping};
use crate::luks::{self, Cipher, Passphrase};
use crate::qcow2::data::crypt::{self, AES, Crypt, LUKS};
use crate::qcow2::guard::lock;
use crate::qcow2::header::extension::{CRYPTO_HEADER, DATA_FILE, Extension, feature_names};
use crate::qcow2::header::{Compression, Header, LAZY_REFCOUNTS, autoclear, incompatible};
use crate::qcow2::image::{Image, OpenOptions};
use crate::qcow2::refcount::bits::set_in;
use crate::storage::Storage;

/// What to allocate when an image is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All tables; the file is sparse.
    Metadata,
    /// All tables, and room for the data reserved on the host.
    Falloc,
    /// All tables, and the data written as zeroes.
    Full,
}

/// A file of its own for the guest's bytes.
#[derive(Clone)]
pub struct DataFile {
    /// The name that the image records for it.
    pub name: String,
    /// Keep it readable as a raw image, without the tables.
    pub raw: bool,
    /// The file. What it holds, a raw one shows.
    pub storage: Arc<dyn Storage>,
}

impl fmt::Debug for DataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataFile({:?}, raw: {})", self.name, self.raw)
    }
}

/// How the data of a new image are encrypted.
#[derive(Debug, Clone)]
pub struct Encryption {
    /// What opens the image.
    pub passphrase: Passphrase,
    /// The method.
    pub method: Method,
}

/// A method of encryption.
#[derive(Debug, Clone)]
pub enum Method {
    /// What old programs read: the key is the passphrase, which makes it weak.
    Aes,
    /// A LUKS header inside the image.
    Luks(luks::Options),
}

/// The properties of a new image.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The guest disk's size in bytes.
    pub size: u64,
    /// 512 bytes to 2 MiB; 16 KiB at least with `extended_l2`.
    pub cluster: Unit,
    /// 2 or 3.
    pub version: u32,
    /// Refcount width in bits: a power of two up to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// 32 subclusters for each cluster; version 3.
    pub extended_l2: bool,
    /// How clusters are compressed; zstd needs version 3.
    pub compression: Compression,
    /// Let other programs write refcounts late; version 3.
    pub lazy_refcounts: bool,
    /// What to allocate at once.
    pub preallocation: Preallocation,
    /// The layer below.
    pub backing: Option<Backing>,
    /// Where the data stand, if not in the image; version 3.
    pub data_file: Option<DataFile>,
    /// Whether and how the data are encrypted.
    pub encryption: Option<Encryption>,
    /// More header extensions.
    pub extensions: Vec<Extension>,
}

impl CreateOptions {
    /// The defaults, for a disk of `size` bytes.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            cluster: Unit::from_bits(16),
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Zlib,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            backing: None,
            data_file: None,
            encryption: None,
            extensions: Vec::new(),
        }
    }

    /// Whether there can be such an image, before anything is done for it.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) names the property that is out of bounds.
    pub fn check(&self) -> Result<()> {
        self.header().map(drop)
    }

    fn header(&self) -> Result<Header> {
        let bits = self.cluster.bits();
        if !(9..=21).contains(&bits) {
            return Err(Error::invalid(
                "Cluster size must be a power of two between 512 and 2048k",
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            let message = "Refcount width must be a power of two and may not exceed 64 bits";
            return Err(Error::invalid(message));
        }
        if !(2..=3).contains(&self.version) {
            return Err(Error::invalid(format!("qcow2 has no version {}", self.version)));
        }
        let zstd = self.compression == Compression::Zstd;
        let needs_v3 = self.extended_l2 || zstd || self.lazy_refcounts || self.refcount_bits != 16;
        if self.version == 2 && needs_v3 {
            return Err(Error::invalid(
                "subclusters, zstd, lazy refcounts and refcounts of other than 16 bits need version 3",
            ));
        }
        if self.extended_l2 && bits < 14 {
            return Err(Error::invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        self.check_data()?;
        let mut extensions = self.extensions.clone();
        if let Some(file) = &self.data_file {
            extensions.push(Extension { magic: DATA_FILE, data: file.name.clone().into_bytes() });
        }
        if self.version >= 3 {
            extensions.push(feature_names());
        }
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        let header = Header {
            version: self.version,
            cluster: self.cluster,
            size: 0,
            crypt_method: 0,
            l1_size: 0,
            l1_offset: 3 << bits,
            refcount_table_offset: 1 << bits,
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: flag(zstd, incompatible::COMPRESSION)
                | flag(self.extended_l2, incompatible::EXTENDED_L2)
                | flag(self.data_file.is_some(), incompatible::DATA_FILE),
            compatible: flag(self.lazy_refcounts, LAZY_REFCOUNTS),
            autoclear: flag(
                self.data_file.as_ref().is_some_and(|file| file.raw),
                autoclear::RAW_DATA,
            ),
            refcount_order: self.refcount_bits.trailing_zeros(),
            compression: self.compression,
            tail: Vec::new(),
            backing: self.backing.clone(),
            extensions,
            spill: 0..0,
        };
        if header.l1_needed(self.size).is_none() {
            return Err(Error::invalid(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            ));
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err(Error::invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 is enabled",
            ));
        }
        Ok(header)
    }

    /// Whether a data file and encryption go with the rest.
    fn check_data(&self) -> Result<()> {
        let bad = |message: &str| Err(Error::invalid(message));
        if let Some(file) = &self.data_file {
            if self.version < 3 {
                return bad(
                    "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
                );
            }
            if file.raw && self.backing.is_some() {
                return bad("Backing file and data-file-raw cannot be used at the same time");
            }
            if file.name.is_empty() {
                return bad("the external data file needs a name");
            }
        }
        let preallocated = self.preallocation != Preallocation::Off;
        if self.encryption.is_some() && preallocated && self.version < 3 {
            return bad("preallocation of an encrypted image needs version 3");
        }
        Ok(())
    }
}

/// As much of the first refcount block as holds the counts of the first clusters.
const BLOCK_FRONT: usize = 4096;

/// Makes an image in `storage`, whatever that holds, and opens it for writing.
///
/// # Errors
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) names the property that is out of bounds.
pub fn create(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Image> {
    let header = options.header()?;
    let cluster = header.cluster.bytes();
    let bytes = header.encode()?;
    // Last of all is the header written: what was there before is no image any more.
    storage.renew(0..3 * cluster)?;
    let table = (2 * cluster).to_be_bytes();
    let mut block = vec![0; cluster as usize];
    for used in 0..3 {
        set_in(&mut block, header.refcount_order, used, 1);
    }
    // The rest of the block is zero, and a hole: thousands of clones take less of the host.
    let front = block.len().min(BLOCK_FRONT);
    storage.write_all_at(2 * cluster, &block[..front])?;
    storage.write_all_at(cluster, &table)?;
    storage.write_all_at(0, &bytes)?;
    let data_file = options.data_file.as_ref().map(|file| file.storage.clone());
    let open = OpenOptions { read_only: false, data_file, ..OpenOptions::default() };
    let mut image = Image::open(storage, open)?;
    if let Some(encryption) = &options.encryption {
        image.encrypt(encryption)?;
    }
    image.give_size(options.size)?;
    image.preallocate(0, options.preallocation)?;
    image.flush()?;
    Ok(image)
}

impl Image {
    /// Makes a new image, which is empty, an encrypted one.
    fn encrypt(&mut self, how: &Encryption) -> Result<()> {
        let passphrase = how.passphrase.bytes();
        let Method::Luks(options) = &how.method else {
            self.data.set_crypt(Crypt::legacy(Cipher::legacy(passphrase)?));
            return self.update_header(|h| h.crypt_method = AES);
        };
        let luks::Created { area, cipher, .. } = luks::Header::create(passphrase, options)?;
        let cluster = self.shape.cluster;
        let run = lock(&self.refcounts).allocate(cluster.count(area.len() as u64))?;
        self.storage.write_zeroes(run.host.0, run.clusters << cluster.bits())?;
        self.storage.write_all_at(run.host.0, &area)?;
        self.metadata_map.add(run.host.0, area.len() as u64);
        // The header names it only when its clusters are counted.
        self.write_back()?;
        let place = crypt::area_extension(run.host.0, area.len() as u64);
        self.update_header(|h| {
            h.crypt_method = LUKS;
            h.set_extension(CRYPTO_HEADER, Some(place));
        })?;
        self.data.set_crypt(Crypt::luks(cipher));
        Ok(())
    }

    /// Gives host clusters to what has none from byte `from` of the disk on; it reads as before.
    /// Without subclusters, what is given a place reads as zeroes: nothing may show from a layer
    /// below. Nothing else may use the image meanwhile.
    pub fn preallocate(&self, from: u64, how: Preallocation) -> Result<()> {
        if how == Preallocation::Off {
            return Ok(());
        }
        self.check_writable()?;
        let (size, file) = (self.size(), self.data.storage());
        let cluster = self.shape.cluster;
        let is_open = |m: Mapping| matches!(m, Mapping::Unallocated | Mapping::Zero { host: None });
        let has_base = self.backing().is_some();
        let shows_below = self.shape.extended && has_base;
        // The cluster in which the part begins belongs to it where nothing stands there yet, and
        // nothing shows through that a new cluster would hide.
        let mut at = cluster.floor(from);
        let hides = has_base && !shows_below;
        if at < from && at < size && (hides || !is_open(self.map(GuestOffset(at), 1)?.mapping)) {
            at = cluster.ceil(from);
        }
        while at < size {
            let extent = self.map(GuestOffset(at), size - at)?;
            if !is_open(extent.mapping) {
                at = cluster.ceil(at + extent.len);
                continue;
            }
            let reservation = self.reserve(GuestOffset(at), extent.len)?;
            let start = reservation.start().0;
            at = start + reservation.len();
            if reservation.is_kept() && !self.data.is_external() {
                continue;
            }
            let (host, mut len) = reservation.place();
            if self.data.is_external() {
                // A data file ends where the disk does.
                len = at - start;
            }
            match how {
                Preallocation::Falloc => file.write_zeroes(host.0, len)?,
                Preallocation::Full => self.write_zero_bytes(host, len)?,
                Preallocation::Metadata if self.data.is_external() && !self.data.is_raw() => {
                    // What a data file holds where nothing was allocated has no meaning.
                    file.punch_hole(host.0, len)?;
                }
                // Clusters that were used before hold what nobody may see.
                _ if !reservation.reads_zero() && !self.data.is_external() => {
                    file.write_zeroes(host.0, len)?;
                }
                _ => {}
            }
            if file.len()? < host.0 + len {
                file.set_len(host.0 + len)?;
            }
            if shows_below {
                // What shows through from below goes on doing so.
                reservation.keep_unread()?;
                continue;
            }
            Box::new(reservation).commit()?;
            if self.data.is_encrypted() {
                // Zeroes in the file are noise to who decrypts them.
                self.zero_range(GuestOffset(start), at - start, false)?;
            }
        }
        Ok(())
    }

    fn write_zero_bytes(&self, host: HostOffset, len: u64) -> Result<()> {
        let zeroes = vec![0; len.min(1 << 20) as usize];
        for at in (0..len).step_by(zeroes.len().max(1)) {
            let n = (len - at).min(zeroes.len() as u64) as usize;
            self.data.write_stored(host + at, &[IoSlice::new(&zeroes[..n])])?;
        }
        Ok(())
    }
}
