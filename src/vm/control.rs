//! How a guest's end and its pauses are made known to everyone who works for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, ErrorKind, Result};

/// How long processors may take to stop.
const TO_PAUSE: Duration = Duration::from_secs(10);
/// How often they are asked: a signal that comes just before a processor enters the guest is lost.
const NUDGE_AGAIN: Duration = Duration::from_millis(2);

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
    /// Looked at by the processors' threads before each turn; what it means stands in `state`.
    pausing: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Readable once the guest is over, and never read: for threads that poll.
    wake: EventFd,
}

#[derive(Default)]
struct State {
    outcome: Option<Result<Ended>>,
    paused: bool,
    /// Threads of processors that run, and those of them that stand still.
    running: usize,
    parked: usize,
}

impl Control {
    /// Control of a guest that runs.
    pub(super) fn new() -> Result<Control> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|e| Error::io("cannot make an event", e.into()))?;
        Ok(Control {
            over: AtomicBool::new(false),
            pausing: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
            wake,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the guest.
    pub fn end(&self, outcome: Result<Ended>) {
        let mut state = self.state();
        if !self.over.swap(true, Ordering::SeqCst) {
            state.outcome = Some(outcome);
            // The counter cannot be full: this is its only write.
            let _ = self.wake.write(1);
            self.changed.notify_all();
        }
    }

    /// Whether the guest has ended.
    pub fn over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Stops all processors and returns when they stand still; what devices have under way is carried
    /// out all the same. Without effect on a guest that is paused or over.
    ///
    /// # Errors
    /// A processor does not come to a stop, as its console's reader does not read: then none stands.
    pub fn pause(&self) -> Result<()> {
        let mut state = self.state();
        state.paused = true;
        self.pausing.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        let stop = Instant::now() + TO_PAUSE;
        while state.parked < state.running && !self.over() && state.paused {
            let left = stop.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.go_on(&mut state);
                let text = "the guest does not come to a stop: is its console read?";
                return Err(Error::new(ErrorKind::InUse, text));
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Lets the processors go on.
    pub fn resume(&self) {
        self.go_on(&mut self.state());
    }

    fn go_on(&self, state: &mut State) {
        state.paused = false;
        self.pausing.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Whether the guest is paused.
    pub fn paused(&self) -> bool {
        self.state().paused
    }

    /// How many processors are to stand still when the guest is paused.
    pub(super) fn runs(&self, processors: usize) {
        self.state().running = processors;
    }

    /// Where a processor's thread stands still while the guest is paused.
    pub(super) fn gate(&self) {
        if !self.pausing.load(Ordering::SeqCst) {
            return;
        }
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        while state.paused && !self.over() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
    }

    /// Becomes readable when the guest ends.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Waits for the guest's end, and calls `nudge` for as long as processors are to stop and have not.
    /// To be called once.
    pub(super) fn wait(&self, nudge: impl Fn()) -> Result<Ended> {
        let mut state = self.state();
        loop {
            if let Some(outcome) = state.outcome.take() {
                return outcome;
            }
            state = if state.paused && state.parked < state.running {
                nudge();
                let waited = self.changed.wait_timeout(state, NUDGE_AGAIN);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn processors_stand_still_from_a_pause_to_its_end() {
        let control = Arc::new(Control::new().unwrap());
        control.runs(2);
        let turns = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let processors: Vec<_> = (0..2)
            .map(|_| {
                let (control, turns) = (Arc::clone(&control), Arc::clone(&turns));
                std::thread::spawn(move || {
                    while !control.over() {
                        control.gate();
                        turns.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        for _ in 0..50 {
            control.pause().unwrap();
            assert!(control.paused());
            let before = turns.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(turns.load(Ordering::SeqCst), before);
            control.resume();
            while turns.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        }
        control.pause().unwrap();
        control.end(Ok(Ended::Stopped));
        processors.into_iter().for_each(|thread| thread.join().unwrap());
        control.pause().unwrap();
        assert_eq!(control.wait(|| {}).unwrap(), Ended::Stopped);
    }
}
