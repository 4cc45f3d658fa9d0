//! A record of which parts of the disk were written since a backup, apart from any format.

use std::ops::Range;

/// One bitmap, with what it says by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in its layer.
    pub name: String,
    /// Bytes of the disk that one bit speaks for: a power of two.
    pub granularity: u64,
    /// Whether it records writes.
    pub records: bool,
    /// The parts of the disk that it calls written, in bytes, in order.
    pub written: Vec<Range<u64>>,
}

impl Bitmap {
    /// The same, none of the disk called written.
    pub fn cleared(&self) -> Bitmap {
        Bitmap { written: Vec::new(), ..self.clone() }
    }
}
