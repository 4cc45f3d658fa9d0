//! Stopping a long command well when the user interrupts it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use vdisk::{Error, Result};

/// Whether an interrupt came.
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether the user asked to stop.
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// From now on an interrupt is noted and no longer ends the process.
pub fn on_signals() -> Result<Stop> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, flag.clone())
            .map_err(|e| Error::io("signals could not be handled", e))?;
    }
    Ok(Stop(flag))
}
