//! Proves an image right, or says what is wrong, and mends it.
//!
//! The check walks everything that the header reaches ([`walk`]), counts how often each host
//! cluster is referred to ([`counts`]), and compares that with the refcounts. Leaks are clusters
//! with a refcount above the count: only space is lost. A refcount below the count, or a table that
//! points where it cannot, is a corruption. [`repair`] makes refcounts and COPIED flags what the
//! count says.

mod counts;
mod repair;
mod walk;

use super::image::{Image, lock};
use crate::error::Result;

/// What a check may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Refcounts that are too high.
    Leaks,
    /// All that can be mended without losing data.
    All,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Check {
    /// Errors that mean lost data, or data loss to come; those mended are not counted.
    pub corruptions: u64,
    /// Clusters that nothing uses and that are not free; those mended are not counted.
    pub leaks: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
    /// Leaks that were mended.
    pub leaks_fixed: u64,
    /// Parts of the image that could not be checked.
    pub errors: u64,
    /// Clusters of the guest disk.
    pub total_clusters: u64,
    /// Guest clusters with a place in the file.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those of them that do not follow the one before.
    pub fragmented_clusters: u64,
    /// The end of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// A line for each finding and repair, at most [`Check::MAX_MESSAGES`].
    pub messages: Vec<String>,
}

impl Check {
    /// More findings than this are only counted.
    pub const MAX_MESSAGES: usize = 10_000;

    fn say(&mut self, message: String) {
        if self.messages.len() < Check::MAX_MESSAGES {
            self.messages.push(message);
        }
    }

    fn corruption(&mut self, message: String) {
        self.corruptions += 1;
        self.say(format!("ERROR {message}"));
    }

    /// Whether nothing is wrong (any more).
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.errors == 0
    }
}

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
        let mut walk = walk::Walk::new(self, &mut check)?;
        walk.run()?;
        let counts = walk.finish();
        let end = counts.end();
        check.image_end_offset = end << self.shape.cluster.bits();
        let fixed =
            repair::Compare { image: self, check: &mut check, repair, counts: &counts }.run()?;
        if fixed {
            self.write_back()?;
        }
        repair::Flags { image: self, check: &mut check, repair }.run()?;
        Ok(check)
    }

    /// The refcount of a cluster, 0 where it cannot be told.
    fn refcount(&self, cluster: u64) -> u64 {
        lock(&self.refcounts).get(cluster).unwrap_or(0)
    }
}
