//! What a check of a layer finds, and what it may mend. How it is checked is the format's business.

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

    /// Adds a line, unless there are too many.
    pub fn say(&mut self, message: String) {
        if self.messages.len() < Check::MAX_MESSAGES {
            self.messages.push(message);
        }
    }

    /// Counts a corruption and says it.
    pub fn corruption(&mut self, message: String) {
        self.corruptions += 1;
        self.say(format!("ERROR {message}"));
    }

    /// Whether nothing is wrong (any more).
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.errors == 0
    }
}
