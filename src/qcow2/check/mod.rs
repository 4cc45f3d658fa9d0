//! Proves an image right, or says what is wrong, and mends it.
//!
//! The check walks everything that the header reaches ([`walk`]), counts how often each host
//! cluster is referred to ([`counts`]), and compares that with the refcounts. Leaks are clusters
//! with a refcount above the count: only space is lost. A refcount below the count, or a table that
//! points where it cannot, is a corruption. [`repair`] makes refcounts and COPIED flags what the
//! count says.

pub(super) mod counts;
mod repair;
mod snapshots;
mod walk;

use super::header::incompatible;
use super::image::Image;
use crate::error::Result;
pub use crate::image::{Check, Repair};

impl Image {
    /// Checks the image, and repairs what `repair` allows. Nothing else may use the image meanwhile.
    ///
    /// # Errors
    /// Only where the check itself cannot go on; what it finds is in the [`Check`].
    pub fn check(&self, repair: Repair) -> Result<Check> {
        if !self.read_only {
            self.write_back()?;
            self.release_freed()?;
            self.write_back()?;
        }
        let mut check = Check::default();
        let snapshots = self.check_snapshot_table(&mut check, repair)?;
        let mut walk = walk::Walk::new(self, &mut check)?;
        walk.run(&snapshots)?;
        let counts = walk.finish();
        let end = counts.end();
        check.image_end_offset = end << self.shape.cluster.bits();
        let fixed =
            repair::Compare { image: self, check: &mut check, repair, counts: &counts }.run()?;
        if fixed {
            self.write_back()?;
        }
        if repair == Repair::All {
            self.mend_snapshot_table(&mut check, &snapshots)?;
        }
        repair::Flags { image: self, check: &mut check, repair, stored: repair::Stored::default() }
            .run()?;
        Ok(check)
    }

    /// Checks and mends, and checks again what was mended: the counts of what is still wrong are
    /// the second look's. An image that is right afterwards loses its dirty and corrupt marks.
    pub(super) fn check_and_mend(&self, repair: Repair) -> Result<Check> {
        let mut check = self.check(repair)?;
        if repair == Repair::None {
            return Ok(check);
        }
        if check.corruptions_fixed > 0 || check.leaks_fixed > 0 {
            let again = self.check(Repair::None)?;
            let (corruptions_fixed, leaks_fixed) = (check.corruptions_fixed, check.leaks_fixed);
            let mut messages = check.messages;
            messages.extend(again.messages.iter().cloned());
            messages.truncate(Check::MAX_MESSAGES);
            check = Check { corruptions_fixed, leaks_fixed, messages, ..again };
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
