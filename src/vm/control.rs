//! How a guest's end is made known to everyone who works for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};

/// Why a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It powered off.
    PowerOff,
    /// It reset itself through the keyboard controller: how guests without ACPI power off.
    Reset,
    /// It crashed: a triple fault.
    TripleFault,
    /// The host ended it.
    Stopped,
}

/// The first reason for which a guest ends counts; all others come too late.
pub struct Control {
    over: AtomicBool,
    outcome: Mutex<Option<Result<Ended>>>,
    changed: Condvar,
    /// Readable once the guest is over, and never read: for threads that poll.
    wake: EventFd,
}

impl Control {
    /// Control of a guest that runs.
    pub(super) fn new() -> Result<Control> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|e| Error::io("cannot make an event", e.into()))?;
        Ok(Control {
            over: AtomicBool::new(false),
            outcome: Mutex::new(None),
            changed: Condvar::new(),
            wake,
        })
    }

    /// Ends the guest.
    pub fn end(&self, outcome: Result<Ended>) {
        let mut first = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.over.swap(true, Ordering::SeqCst) {
            *first = Some(outcome);
            // The counter cannot be full: this is its only write.
            let _ = self.wake.write(1);
            self.changed.notify_all();
        }
    }

    /// Whether the guest has ended.
    pub fn over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Becomes readable when the guest ends.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Waits for the guest's end. To be called once.
    pub(super) fn wait(&self) -> Result<Ended> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match outcome.take() {
                Some(outcome) => return outcome,
                None => {
                    outcome = self.changed.wait(outcome).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}
