//! What cannot be mended where it stands: tables that overlap, entries that point nowhere.
//!
//! To write one of two tables that share a cluster is to damage the other, and refcounts that two
//! say where none should be are no help. So nothing is written in place. Each table keeps its place
//! unless another has it already; what has to move or to change is written anew behind the end of
//! the file, with the bytes that were read before; then come new refcounts for all of it, and one
//! write of the header makes them the image's. A crash before that leaves the old image and some
//! bytes behind its end. What could be read before reads the same ([`entries`]).
//!
//! Snapshots and bitmaps whose own tables cannot be read hold nothing that could be kept: they are
//! taken out, and it is said.

mod bitmaps;
mod entries;
mod ground;

use std::collections::BTreeMap;

use super::{Check, Repair, walk};
use crate::error::Result;
use crate::qcow2::data::crypt;
use crate::qcow2::header::extension::CRYPTO_HEADER;
use crate::qcow2::header::{Header, MAX_L1, incompatible};
use crate::qcow2::image::Image;
use crate::qcow2::refcount::bits::max_refcount;
use crate::qcow2::snapshot::Table;
use crate::qcow2::tables::entry::{COPIED, OFFSET};
use crate::qcow2::tables::words::{decode, encode};
use entries::{Entries, User};
use ground::Ground;

impl Image {
    /// Whether something is wrong that cannot be mended where it stands.
    pub(in crate::qcow2) fn is_tangled(&self) -> Result<bool> {
        let header = self.header();
        let table = Table::read_mending(&*self.storage, &header)?;
        let mut check = Check::default();
        let mut walk = walk::Walk::new(self, &mut check, Repair::None)?;
        walk.run(&table)?;
        let overlaps = !walk.overlaps().is_empty();
        let damaged = overlaps || check.corruptions > 0 || check.errors > 0;
        Ok(damaged || !self.bitmaps_are_sound(&header))
    }

    /// Writes anew what is tangled. The image is as it was where this fails.
    pub(super) fn salvage(&self, check: &mut Check) -> Result<()> {
        self.check_writable()?;
        let len = self.storage.len()?;
        let mut said = Check::default();
        let built = self.build_anew(&mut said);
        let (header, floor) = match built {
            Ok(built) => built,
            Err(error) => {
                // Nothing refers to what was copied so far.
                self.storage.set_len(len)?;
                self.data.shortened();
                return Err(error);
            }
        };
        let mut again = Check::default();
        let table = Table::read(&*self.storage, &header)?;
        let mut walk = walk::Walk::of(header.clone(), self, &mut again, Repair::None)?;
        walk.run(&table)?;
        let counts = walk.finish();
        self.rebuild_refcounts(&counts, floor, |h| *h = header)?;
        let header = self.header();
        self.metadata(|| self.tables.write().reload(&*self.storage, &header))?;
        check.corruptions_fixed += said.corruptions_fixed.max(1);
        said.messages.into_iter().for_each(|line| check.say(line));
        self.drop_old_refcounts(&table)?;
        self.map_metadata()?;
        self.track_bitmaps()
    }

    /// Writes all that has to move or to change behind the end of the file; returns the header that
    /// refers to it, and the first cluster after it.
    fn build_anew(&self, check: &mut Check) -> Result<(Header, u64)> {
        let mut header = self.header();
        let ground = Ground::new(self, max_refcount(header.refcount_order))?;
        let mut work = Salvage { image: self, check, ground, l2: BTreeMap::new(), blank: None };
        work.fixed_places(&mut header)?;
        let mut roots = work.claim_roots(&header)?;
        let bitmaps = work.claim_bitmaps(&header)?;
        work.mend_l2(header.backing.is_some())?;
        let backed = header.backing.is_some();
        if let Some(place) = work.rewrite_root(&roots.active, backed)? {
            header.l1_offset = place;
        }
        let mut changed = roots.changed;
        for (snapshot, root) in roots.table.snapshots.iter_mut().zip(&roots.snapshots) {
            if let Some(place) = work.rewrite_root(root, backed)? {
                snapshot.l1_offset = place;
                changed = true;
            }
        }
        if changed {
            let bytes = Table::encode(&roots.table.snapshots)?;
            header.snapshots = roots.table.snapshots.len() as u32;
            header.snapshots_offset =
                if bytes.is_empty() { 0 } else { work.ground.place(&bytes)? };
        }
        work.rewrite_bitmaps(&bitmaps, &mut header)?;
        if header.version >= 3 {
            // COPIED flags follow.
            header.incompatible |= incompatible::DIRTY;
        }
        let end = work.ground.end();
        self.barrier()?;
        Ok((header, end))
    }
}

struct Salvage<'a> {
    image: &'a Image,
    check: &'a mut Check,
    ground: Ground<'a>,
    /// By host offset.
    l2: BTreeMap<u64, L2>,
    /// A table of zero entries, and how often it is referred to.
    blank: Option<(u64, u64)>,
}

/// An L2 table.
struct L2 {
    user: User,
    /// Whether another table has its cluster.
    moves: bool,
    /// Where it is written anew, if it is.
    place: Option<u64>,
}

/// An L1 table.
struct Root {
    offset: u64,
    entries: u32,
    moves: bool,
}

/// All L1 tables, and the table of snapshots.
struct Roots {
    active: Root,
    table: Table,
    /// One for each snapshot in `table`.
    snapshots: Vec<Root>,
    /// Whether the table of snapshots has to be written.
    changed: bool,
}

impl Salvage<'_> {
    /// The header, which cannot move, and the key of an encrypted image.
    fn fixed_places(&mut self, header: &mut Header) -> Result<()> {
        self.ground.claim(0, header.cluster.bytes());
        let Some((at, len)) = crypt::area_place(header) else { return Ok(()) };
        let whole = header.cluster.ceil(len);
        let fits = len <= crypt::MAX_AREA && self.ground.holds(at, len);
        if !fits || self.ground.claim(at, whole) {
            return Ok(());
        }
        let bytes = self.ground.read(at, len)?;
        let data = crypt::area_extension(self.ground.place(&bytes)?, len);
        header.set_extension(CRYPTO_HEADER, Some(data));
        self.say("the encryption header overlaps another table: copied");
        Ok(())
    }

    fn say(&mut self, what: &str) {
        self.check.corruptions_fixed += 1;
        self.check.say(format!("Repairing {what}"));
    }

    /// Claims the L1 tables' clusters, the active one's first, and those of the L2 tables below.
    fn claim_roots(&mut self, header: &Header) -> Result<Roots> {
        let table = Table::read_mending(&*self.image.storage, header)?;
        let mut changed = !table.discarded.is_empty();
        for said in table.discarded.clone() {
            self.say(&format!("the snapshot table: {said}"));
        }
        let active = self.claim_root(header.l1_offset, header.l1_size);
        let place = (header.snapshots_offset, table.len);
        let stays = self.ground.holds(place.0, place.1) && self.ground.claim(place.0, place.1);
        if table.len > 0 && !stays {
            self.say("the snapshot table: it overlaps another table, or the end of the file");
            changed = true;
        }
        let mut kept = Table { len: table.len, ..Table::default() };
        let mut snapshots = Vec::new();
        for snapshot in table.snapshots {
            let bytes = u64::from(snapshot.l1_size) * 8;
            let place = snapshot.l1_offset;
            let aligned = header.cluster.aligned(place);
            if !aligned || bytes > MAX_L1 || bytes > 0 && !self.ground.holds(place, bytes) {
                let (id, name) = (snapshot.id().into_owned(), snapshot.name().into_owned());
                self.say(&format!(
                    "snapshot {id} ({name}): removed, its L1 table at {place:#x} cannot be read"
                ));
                changed = true;
                continue;
            }
            snapshots.push(self.claim_root(snapshot.l1_offset, snapshot.l1_size));
            kept.snapshots.push(snapshot);
        }
        self.claim_l2(&active)?;
        for root in &snapshots {
            self.claim_l2(root)?;
        }
        Ok(Roots { active, table: kept, snapshots, changed })
    }

    fn claim_root(&mut self, offset: u64, entries: u32) -> Root {
        let bytes = u64::from(entries) * 8;
        Root { offset, entries, moves: bytes > 0 && !self.ground.claim(offset, bytes) }
    }

    fn root_entries(&self, root: &Root) -> Result<Vec<u64>> {
        let bytes = self.ground.read(root.offset, u64::from(root.entries) * 8)?;
        Ok(decode(&bytes))
    }

    fn claim_l2(&mut self, root: &Root) -> Result<()> {
        let cluster = self.image.shape.cluster;
        let coverage = self.image.header().l2_coverage();
        for (index, entry) in self.root_entries(root)?.into_iter().enumerate() {
            let host = entry & OFFSET;
            if host == 0 || !cluster.aligned(host) || host >= self.ground.file_len() {
                continue;
            }
            if let Some(known) = self.l2.get_mut(&host) {
                known.user.times = known.user.times.saturating_add(1);
                continue;
            }
            let moves = !self.ground.claim(host, cluster.bytes());
            let user = User { times: 1, guest: coverage.start(index as u64).unwrap_or(u64::MAX) };
            self.l2.insert(host, L2 { user, moves, place: None });
        }
        Ok(())
    }

    /// Mends all L2 tables; those that move or change get another place.
    fn mend_l2(&mut self, backed: bool) -> Result<()> {
        let shape = self.image.shape;
        for (host, l2) in &mut self.l2 {
            let mut bytes = self.ground.read(*host, shape.cluster.bytes())?;
            let (ground, check) = (&mut self.ground, &mut *self.check);
            let mut entries = Entries { shape, backed, ground, check };
            let changed = entries.mend(&mut bytes, l2.user)?;
            if l2.moves {
                self.check.corruptions_fixed += 1;
                self.check.say(format!(
                    "Repairing the L2 table at {host:#x}: it overlaps another table: copied"
                ));
            }
            if changed || l2.moves {
                l2.place = Some(self.ground.place(&bytes)?);
            }
        }
        Ok(())
    }

    /// Writes an L1 table anew where it moves or changes; returns its new place.
    fn rewrite_root(&mut self, root: &Root, backed: bool) -> Result<Option<u64>> {
        let mut entries = self.root_entries(root)?;
        let mut changed = root.moves;
        for (index, entry) in entries.iter_mut().enumerate() {
            let new = self.root_entry(*entry, index, backed)?;
            changed |= new != *entry;
            *entry = new;
        }
        if root.moves {
            let at = root.offset;
            self.say(&format!("the L1 table at {at:#x}: it overlaps another table: copied"));
        }
        if changed { self.ground.place(&encode(&entries)).map(Some) } else { Ok(None) }
    }

    fn root_entry(&mut self, old: u64, index: usize, backed: bool) -> Result<u64> {
        let host = old & OFFSET;
        let entry = old & !walk::L1_RESERVED;
        if let Some(l2) = self.l2.get(&host) {
            let shared = if l2.user.times > 1 { COPIED } else { 0 };
            return Ok(entry & !(OFFSET | shared) | l2.place.unwrap_or(host));
        }
        if host == 0 {
            return Ok(0);
        }
        if self.image.shape.cluster.aligned(host) {
            self.say(&format!(
                "L1 entry {index}: its table at {host:#x} is past the end of the file"
            ));
            return Ok(0);
        }
        self.say(&format!(
            "L1 entry {index}: its table at {host:#x} is on no cluster boundary; what it mapped reads \
             as zeroes now"
        ));
        if backed { self.blank_table() } else { Ok(0) }
    }

    /// A table that reads as zeroes and not as the layer below.
    fn blank_table(&mut self) -> Result<u64> {
        let (shape, max) = (self.image.shape, max_refcount(self.image.header().refcount_order));
        if let Some((place, times)) = self.blank.filter(|(_, times)| *times < max) {
            self.blank = Some((place, times + 1));
            return Ok(place);
        }
        let mut bytes = vec![0; shape.cluster.bytes() as usize];
        let (ground, check) = (&mut self.ground, &mut *self.check);
        let mut entries = Entries { shape, backed: true, ground, check };
        for index in 0..bytes.len() / shape.entry_bytes() as usize {
            let zero = entries.unread()?;
            shape.put(&mut bytes, index, zero);
        }
        let place = self.ground.place(&bytes)?;
        self.blank = Some((place, 1));
        Ok(place)
    }
}
