//! Proves an image right, or says what is wrong, and mends it.
//!
//! The check walks everything that the header reaches ([`walk`]), counts how often each host
//! cluster is referred to ([`counts`]), and compares that with the refcounts. Leaks are clusters
//! with a refcount above the count: only space is lost. A refcount below the count, or a table that
//! points where it cannot, is a corruption. [`repair`] makes refcounts and COPIED flags what the
//! count says. What that cannot mend, [`salvage`] writes anew.

pub(super) mod counts;
mod label;
mod rebuild;
mod repair;
mod salvage;
mod snapshots;
mod walk;

use crate::error::Result;
pub use crate::image::{Check, Repair};
use crate::qcow2::guard::lock;
use crate::qcow2::header::incompatible;
use crate::qcow2::image::Image;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::snapshot::Table;
use counts::Counted;

/// What a walk says of the refcounts' own structures.
#[derive(Clone, Copy)]
struct Structure {
    /// They cannot be mended where they stand.
    rebuild: bool,
    /// Corruptions that the walk found.
    wrong: u64,
    /// As QEMU, who mends nothing where they would have to be rebuilt and may not be.
    strict: bool,
}

impl Image {
    /// Checks the image, and repairs what `repair` allows. Nothing else may use the image meanwhile.
    ///
    /// # Errors
    /// Only where the check itself cannot go on; what it finds is in the [`Check`].
    pub fn check(&self, repair: Repair) -> Result<Check> {
        self.check_with(repair, false)
    }

    /// Like [`check`](Image::check); where `overlaps`, tables that something else stands on are
    /// wrong also where the refcounts know of both.
    fn check_with(&self, repair: Repair, overlaps: bool) -> Result<Check> {
        if !self.read_only {
            self.write_back()?;
            self.release_freed()?;
            self.write_back()?;
        } else {
            let capacity = lock(&self.refcounts).capacity();
            let read = Refcounts::open(self.storage.clone(), &self.header(), capacity)?;
            *lock(&self.refcounts) = read;
        }
        let mut check = Check::default();
        let snapshots = self.check_snapshot_table(&mut check, repair)?;
        let before = check.corruptions;
        let mut walk = walk::Walk::new(self, &mut check, repair)?;
        walk.run(&snapshots)?;
        let shared = if overlaps { walk.overlaps() } else { Vec::new() };
        let rebuild = walk.rebuild;
        let counts = walk.finish();
        let structure = Structure { rebuild, wrong: check.corruptions - before, strict: !overlaps };
        for offset in shared {
            check.corruption(format!("offset={offset:#x}: a table and something else overlap"));
        }
        check.image_end_offset = counts.end() << self.shape.cluster.bits();
        if !self.compare_and_mend(&mut check, repair, structure, &counts, &snapshots)? {
            return Ok(check);
        }
        repair::Flags { image: self, check: &mut check, repair, stored: repair::Stored::default() }
            .run()?;
        if repair == Repair::All {
            self.mend_snapshot_table(&mut check, &snapshots)?;
        }
        Ok(check)
    }

    /// Compares the refcounts with what was counted, says all differences, and then mends. Whether
    /// the check can go on.
    fn compare_and_mend(
        &self,
        check: &mut Check,
        repair: Repair,
        structure: Structure,
        counts: &Counted,
        snapshots: &Table,
    ) -> Result<bool> {
        let before = (check.corruptions, check.leaks);
        let none = Repair::None;
        let found = repair::Compare { image: self, check, repair: none, counts }.run()?;
        let end = found.end << self.shape.cluster.bits();
        check.image_end_offset = check.image_end_offset.max(end);
        let rebuild = found.lost || structure.rebuild;
        if repair == Repair::None || found.differences == 0 && !rebuild {
            return Ok(true);
        }
        if rebuild && repair == Repair::All {
            check.say("Rebuilding refcount structure".to_owned());
            self.rebuild_refcounts(counts, 0, |_| ())?;
            let mended = check.corruptions - before.0 + structure.wrong;
            check.leaks_fixed += check.leaks - before.1;
            (check.corruptions, check.leaks) = before;
            let again = self.drop_old_refcounts(snapshots)?;
            // What was wrong with the blocks themselves is gone with them.
            let still = again.corruptions.min(structure.wrong);
            check.corruptions = check.corruptions - structure.wrong + still;
            check.corruptions_fixed += mended - still;
            again.messages.into_iter().for_each(|said| check.say(said));
            return Ok(true);
        }
        if rebuild && structure.strict {
            check.say("ERROR need to rebuild refcount structures".to_owned());
            check.errors += 1;
            return Ok(false);
        }
        (check.corruptions, check.leaks) = before;
        repair::Compare { image: self, check, repair, counts }.run()?;
        self.write_back()?;
        Ok(true)
    }

    /// Gives the clusters back in which the refcounts stood before they were written anew: nothing
    /// refers to them any more. Returns what else is wrong, and what there was to say.
    fn drop_old_refcounts(&self, snapshots: &Table) -> Result<Check> {
        let mut again = Check::default();
        let mut walk = walk::Walk::new(self, &mut again, Repair::None)?;
        walk.run(snapshots)?;
        let counts = walk.finish();
        let mut freed = Check::default();
        let leaks = Repair::Leaks;
        repair::Compare { image: self, check: &mut freed, repair: leaks, counts: &counts }.run()?;
        self.write_back()?;
        // Where tables overlap, what the map of metadata has is not all there is; the next check says so.
        let _ = self.map_metadata();
        again.messages.append(&mut freed.messages);
        Ok(again)
    }

    /// Checks and mends, and checks again what was mended: the counts of what is still wrong are
    /// the second look's. An image that is right afterwards loses its dirty and corrupt marks.
    pub(super) fn check_and_mend(&self, repair: Repair) -> Result<Check> {
        let mut salvaged = Check::default();
        if repair == Repair::All && self.is_tangled()? {
            self.salvage(&mut salvaged)?;
        }
        self.check_label(&mut salvaged, repair)?;
        let mut check = self.check_with(repair, true)?;
        check.corruptions += salvaged.corruptions;
        check.messages = [salvaged.messages, check.messages].concat();
        if repair == Repair::None {
            return Ok(check);
        }
        check.corruptions_fixed += salvaged.corruptions_fixed;
        if check.corruptions_fixed > 0 || check.leaks_fixed > 0 {
            let again = self.check_with(Repair::None, true)?;
            let (corruptions_fixed, leaks_fixed) = (check.corruptions_fixed, check.leaks_fixed);
            let mut messages = check.messages;
            messages.extend(again.messages.iter().cloned());
            messages.truncate(Check::MAX_MESSAGES);
            check = Check { corruptions_fixed, leaks_fixed, messages, ..again };
            check.corruptions += salvaged.corruptions;
        }
        if check.corruptions == 0 && check.errors == 0 {
            self.mark_right()?;
        }
        Ok(check)
    }

    /// Takes the marks of an image away that was not closed well, or was found corrupt: a check has
    /// found it right.
    pub fn mark_right(&self) -> Result<()> {
        let marks = incompatible::DIRTY | incompatible::CORRUPT;
        if self.header().incompatible & marks == 0 {
            return Ok(());
        }
        self.update_header(|h| h.incompatible &= !marks)
    }
}
