//! Narrower filters for the threads that do what a guest or a client asks for.

use std::sync::OnceLock;

use super::calls;

/// Whose filters are the process's: its id, which they are made with. Empty where there is no jail.
static JAILED: OnceLock<u32> = OnceLock::new();

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Runs a guest's processor, and starts its devices' threads.
    Processor,
    /// Serves a device's queue.
    Queue,
    /// Takes connections, and serves them.
    Connection,
}

/// Notes that this process is jailed.
pub(super) fn keep(process: u32) {
    // A jail is closed once.
    let _ = JAILED.set(process);
}

/// The jailed process.
pub(super) fn process() -> Option<u32> {
    JAILED.get().copied()
}

/// Bounds this thread, and those that it starts, to what is needed for that: files and sockets that are
/// open. Nothing where the process is in no jail. Where it cannot be had the jail itself still holds.
pub fn narrow(thread: Thread) {
    let Some(process) = JAILED.get() else { return };
    let narrowed = calls::program(&thread.calls(), *process)
        .and_then(|program| seccompiler::apply_filter(&program));
    debug_assert!(narrowed.is_ok(), "{narrowed:?}");
}
