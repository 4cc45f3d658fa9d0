//! A passphrase on its way from whoever knows it to a key slot.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

/// A passphrase: wiped when the last copy of it is dropped, and never printed.
#[derive(Clone)]
pub struct Passphrase(Arc<Zeroizing<Vec<u8>>>);

impl Passphrase {
    /// The passphrase of these bytes, all of which count.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Passphrase {
        Passphrase(Arc::new(bytes))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase")
    }
}
