//! Stopping well: a long command that the user interrupts, a process that serves until it is told to
//! end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
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

/// Holds back the signals that end a process which serves a disk, for whoever waits for them. To be
/// called before any other thread starts: threads inherit it.
pub fn hold_endings() -> Result<SigSet> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().map_err(|e| Error::io("cannot hold signals back", e.into()))?;
    Ok(set)
}
