//! An open image: its parts, and what holds them together.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::addr::HostOffset;
use crate::asymmetric::RwLock;
use crate::error::{Error, ErrorKind, Result};
use crate::luks::Passphrase;
use crate::qcow2::bitmap::tracker::Tracker;
use crate::qcow2::check::Repair;
use crate::qcow2::data::Data;
use crate::qcow2::data::crypt::{self, Crypt};
use crate::qcow2::data::inflated::Inflated;
use crate::qcow2::guard::lock;
use crate::qcow2::header::{Header, MAX_L1, MAX_SNAPSHOTS, autoclear, incompatible};
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::refcount::metadata_map::MetadataMap;
use crate::qcow2::snapshot::table::Table;
use crate::qcow2::tables::Tables;
use crate::qcow2::tables::cache::SLICE;
use crate::qcow2::tables::entry::Shape;
use crate::storage::Storage;

/// How to open an image.
#[derive(Clone)]
pub struct OpenOptions {
    /// Refuse changes, and make none (an image that was not closed well is then read as it is).
    pub read_only: bool,
    /// Bytes of L2 tables, and as many again of refcounts, to keep in memory.
    pub cache: u64,
    /// What is written is what the image shows already, through the layers below it: the content id
    /// goes on speaking for it.
    pub same_contents: bool,
    /// Open for writing what is marked corrupt or dirty, to be checked and mended: nothing is
    /// repaired on opening.
    pub repair: bool,
    /// The external data file, for an image that has one.
    pub data_file: Option<Arc<dyn Storage>>,
    /// What opens an encrypted image's key. Without it everything works that needs no data.
    pub passphrase: Option<Passphrase>,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: true,
            cache: 4 << 20,
            same_contents: false,
            repair: false,
            data_file: None,
            passphrase: None,
        }
    }
}

/// The most bytes of internal snapshots' L1 tables that are looked after.
const MAX_SURVEY: u64 = 1 << 30;
/// A qcow2 image, for many threads at once. See the module for its locks.
pub struct Image {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) data: Data,
    pub(super) shape: Shape,
    pub(super) read_only: bool,
    pub(super) same_contents: bool,
    /// Whether bitmaps are left alone by writes.
    pub(super) unrecorded: bool,
    pub(super) header: Mutex<Header>,
    pub(super) size: AtomicU64,
    pub(super) tables: RwLock<Tables>,
    pub(super) refcounts: Mutex<Refcounts>,
    pub(super) freed: Mutex<FreedLists>,
    /// Bytes that wait in it for a flush, about.
    pub(super) freed_bytes: AtomicU64,
    /// Serialises write-backs.
    pub(super) writeback: Mutex<()>,
    /// Held shared while mapped host clusters are in use.
    pub(super) grace: RwLock<()>,
    pub(super) poisoned: AtomicBool,
    /// Opened to be mended: what is wrong is not news.
    pub(super) mends: bool,
    /// What was found and mended when it was opened.
    mended: Vec<String>,
    /// Whether the header still vouches for the label's content id.
    pub(super) vouched: AtomicBool,
    pub(super) inflated: Mutex<Inflated>,
    /// Whether clusters are known to be mapped to holes of the file, once somebody asked.
    pub(super) preallocated: OnceLock<bool>,
    /// Where metadata stands; empty where the image is open for reading only.
    pub(super) metadata_map: Arc<MetadataMap>,
    /// The bitmaps that record writes; locked before all others.
    pub(super) tracker: Mutex<Tracker>,
    /// Whether there are any.
    pub(super) tracking: AtomicBool,
}

/// Clusters that lost one reference each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Freed {
    pub host: HostOffset,
    pub clusters: u64,
    pub what: Lost,
}

/// What clusters that lost a reference held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    Data,
    /// Data whose space the guest said it does not need.
    Discarded,
    /// An L2 table, slices of which may be cached.
    Table,
}

/// Clusters that are on their way to become free.
#[derive(Debug, Default)]
pub(super) struct FreedLists {
    /// The tables in the file may still refer to them.
    pub waiting: Vec<Freed>,
    /// Nothing in the file refers to them; reads that began earlier may still be under way.
    pub ready: Vec<Freed>,
}

impl Image {
    /// Opens the image in `storage`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] names the features that this engine lacks;
    /// [`ErrorKind::Corrupt`] what in the header contradicts the format.
    pub fn open(storage: Arc<dyn Storage>, options: OpenOptions) -> Result<Image> {
        let header = Header::read(&*storage)?;
        Image::with_header(storage, header, options)
    }

    /// Opens the image in `storage`, whose header was just read: for callers that had to look into
    /// it for the name of the external data file.
    ///
    /// # Errors
    /// As [`open`](Image::open).
    pub fn with_header(
        storage: Arc<dyn Storage>,
        header: Header,
        options: OpenOptions,
    ) -> Result<Image> {
        let corrupt = header.incompatible & incompatible::CORRUPT != 0;
        if corrupt && !options.read_only && !options.repair {
            let message =
                "Image is corrupt; cannot be opened read/write (check --repair all mends it)";
            return Err(Error::corrupt(message));
        }
        if header.refcount_table_clusters == 0 && !options.repair {
            let message = "Image does not contain a reference count table";
            return Err(Error::corrupt(message).at_offset(56));
        }
        if header.snapshots > MAX_SNAPSHOTS && !options.repair {
            return Err(Error::corrupt("Snapshot table too large").at_offset(60));
        }
        let slice = header.cluster.bytes().min(SLICE);
        let capacity = (options.cache / slice) as usize;
        let refcounts = match options.read_only {
            true => Refcounts::unread(storage.clone(), &header, capacity),
            false => Refcounts::open(storage.clone(), &header, capacity)?,
        };
        let crypt = Crypt::open(&*storage, &header, options.passphrase.as_ref())?;
        let data = Data::open(&storage, options.data_file, &header, crypt)?;
        let tables = Tables::open(&*storage, &header, capacity)?;
        if !options.repair {
            tables.refuse_repeated()?;
        }
        let image = Image {
            metadata_map: refcounts.metadata_map.clone(),
            shape: Shape::of(&header),
            read_only: options.read_only,
            same_contents: options.same_contents,
            unrecorded: options.same_contents,
            size: AtomicU64::new(header.size),
            tables: RwLock::new(tables),
            refcounts: Mutex::new(refcounts),
            freed: Mutex::default(),
            freed_bytes: AtomicU64::new(0),
            writeback: Mutex::new(()),
            grace: RwLock::new(()),
            poisoned: AtomicBool::new(false),
            mends: options.repair,
            vouched: AtomicBool::new(header.autoclear & autoclear::CONTENT_ID != 0),
            data,
            inflated: Mutex::new(Inflated::new(header.compression)),
            preallocated: OnceLock::new(),
            mended: Vec::new(),
            tracker: Mutex::default(),
            tracking: AtomicBool::new(false),
            header: Mutex::new(header),
            storage,
        };
        let mut image = image;
        if !options.read_only {
            image.mended = image.make_writable(options.repair)?;
        }
        Ok(image)
    }

    /// Lets no bitmap record what is written: the caller sees to what they say.
    pub fn unrecorded(mut self) -> Image {
        self.unrecorded = true;
        self
    }

    /// Brings an image that is opened for writing into the state that writing relies on.
    /// What is to be checked and mended keeps its marks until that is done.
    /// Returns what was found and mended.
    fn make_writable(&self, repair: bool) -> Result<Vec<String>> {
        let mut messages = Vec::new();
        let header = self.header();
        if !repair && header.incompatible & incompatible::DIRTY != 0 {
            if self.is_tangled()? {
                let message = "the image was not closed well, and is damaged in ways that are not \
                               repaired on opening: run check";
                return Err(Error::corrupt(message));
            }
            let check = self.check(Repair::All)?;
            messages = check.messages;
            if check.corruptions > 0 || check.errors > 0 {
                let message = "the image was not closed well and cannot be repaired on opening";
                return Err(Error::corrupt(message));
            }
            self.update_header(|h| h.incompatible &= !incompatible::DIRTY)?;
        }
        let sound = self.map_metadata().and_then(|()| self.track_bitmaps());
        if !repair {
            sound?;
        }
        // Without a data file, none is raw.
        let raw = if self.data.is_external() { 0 } else { autoclear::RAW_DATA };
        let kept = autoclear::KEPT & !raw;
        if header.autoclear & !kept != 0 {
            self.update_header(|h| h.autoclear &= kept)?;
        }
        Ok(messages)
    }

    /// Notes where metadata stands. Tables that overlap are refused: to write one is to damage the
    /// other.
    pub(super) fn map_metadata(&self) -> Result<()> {
        let (header, cluster) = (self.header(), self.shape.cluster);
        let mut places = vec![
            (0, cluster.bytes()),
            (header.l1_offset, u64::from(header.l1_size) * 8),
            (
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters) << cluster.bits(),
            ),
        ];
        if header.snapshots > 0 {
            // What cannot be read, check says and mends: no reason to refuse to open.
            let table = Table::read_mending(&*self.storage, &header).unwrap_or_default();
            places.push((header.snapshots_offset, table.len));
            let l1s = table.snapshots.iter().map(|s| (s.l1_offset, u64::from(s.l1_size) * 8));
            let mut left = MAX_SURVEY;
            places.extend(l1s.filter(|(_, len)| *len <= MAX_L1).take_while(|(_, len)| {
                left = left.saturating_sub(*len);
                left > 0
            }));
        }
        places.extend(crypt::area_place(&header).filter(|(_, len)| *len <= crypt::MAX_AREA));
        places.extend(lock(&self.refcounts).blocks().values().map(|at| (*at, cluster.bytes())));
        places.extend(self.tables.read().offsets().map(|at| (at, cluster.bytes())));
        self.metadata_map.replace(places).map_err(|offset| {
            let message = "two tables of the image overlap; it can only be read";
            Error::corrupt(message).at_offset(offset)
        })
    }

    /// Fails where guest data at `host` would stand on the image's own metadata.
    pub(super) fn check_overlap(&self, host: HostOffset, len: u64) -> Result<()> {
        if self.data.is_external() {
            return Ok(());
        }
        let free = self.metadata_map.check(host, len);
        free.map_err(|e| self.note_corruption(e))
    }

    /// What was found and mended when the image was opened for writing, as [`Check::messages`].
    pub fn mended_on_opening(&self) -> &[String] {
        &self.mended
    }

    /// A copy of the header as it is now.
    pub fn header(&self) -> Header {
        lock(&self.header).clone()
    }

    /// Changes the header in the file, durably. It fails, and changes nothing, where the new header
    /// does not fit into the first cluster.
    pub fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.check_writable()?;
        let mut header = lock(&self.header);
        let mut new = header.clone();
        change(&mut new);
        let mut now = vec![0; (new.spill.end - new.spill.start) as usize];
        self.storage.read_exact_at(new.spill.start, &mut now)?;
        let layout = new.lay_out(&now)?;
        self.metadata(|| layout.write(&*self.storage))?;
        new.spill = layout.spill;
        self.vouched.store(new.autoclear & autoclear::CONTENT_ID != 0, Ordering::Release);
        *header = new;
        Ok(())
    }

    /// Runs a write of metadata: if it fails, the file and memory may disagree, and the image
    /// refuses everything but reads until it is reopened.
    pub(super) fn metadata<T>(&self, write: impl FnOnce() -> Result<T>) -> Result<T> {
        write().inspect_err(|_| self.poisoned.store(true, Ordering::Release))
    }

    /// Makes durable what was written before. A sync that fails is a failed write: the host may have
    /// dropped what it could not write, and the next sync would succeed without it.
    pub(super) fn barrier(&self) -> Result<()> {
        self.metadata(|| self.storage.sync())
    }

    pub(super) fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        if self.poisoned.load(Ordering::Acquire) {
            let message = if self.header().is_corrupt() {
                "the image's metadata is wrong: check --repair all mends it"
            } else {
                "an earlier write of the image's metadata failed; reopen the disk"
            };
            return Err(Error::new(ErrorKind::Poisoned, message));
        }
        Ok(())
    }

    /// To be called before the guest's bytes change: the content id no longer speaks for them.
    pub(super) fn begin_change(&self) -> Result<()> {
        self.check_writable()?;
        if self.vouched.load(Ordering::Acquire) && !self.same_contents {
            self.update_header(|h| h.autoclear &= !autoclear::CONTENT_ID)?;
        }
        Ok(())
    }

    pub(super) fn free_later(&self, freed: Freed) {
        let bytes = freed.clusters << self.shape.cluster.bits();
        self.freed_bytes.fetch_add(bytes, Ordering::Relaxed);
        let list = &mut lock(&self.freed).waiting;
        if let Some(last) = list.last_mut() {
            let end = last.host.0 + (last.clusters << self.shape.cluster.bits());
            if end == freed.host.0 && last.what == freed.what {
                last.clusters += freed.clusters;
                return;
            }
        }
        list.push(freed);
    }

    /// The host bytes that the file takes, holes left out.
    pub fn allocated(&self) -> Result<u64> {
        let own = self.storage.allocated()?;
        let external = if self.data.is_external() { self.data.storage().allocated()? } else { 0 };
        Ok(own.saturating_add(external))
    }
}
