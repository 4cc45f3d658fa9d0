//! What is done where the host has no space for what is written: somebody else is asked to make some,
//! once for all who wait for it.
//!
//! Who that is, and what he lets go of, is not known here.

use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::chain::{Chain, Layer};

/// Makes space on the host for a disk whose head is that layer; whether there is more than before.
pub type MakeSpace = dyn Fn(&Layer) -> bool + Send + Sync;

/// Who failed while another made space had better try again.
const RECENT: Duration = Duration::from_secs(1);

/// Who makes space for a chain, and when he last did.
#[derive(Default)]
pub(super) struct Space {
    maker: OnceLock<Box<MakeSpace>>,
    /// Held while space is made.
    last: Mutex<Option<Instant>>,
}

impl Chain {
    /// Lets `maker` be asked where the host has no space for what is written. Of several, the first is.
    pub(crate) fn on_full(&self, maker: Box<MakeSpace>) {
        let _ = self.space.maker.set(maker);
    }

    /// Whether there may be more space than before.
    pub(super) fn make_space(&self) -> bool {
        let Some(maker) = self.space.maker.get() else { return false };
        let mut last = self.space.last.lock().unwrap_or_else(|e| e.into_inner());
        if last.is_some_and(|then| then.elapsed() < RECENT) {
            return true;
        }
        let made = maker(&self.head());
        *last = made.then(Instant::now);
        made
    }
}
