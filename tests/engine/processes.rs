//! Starting other programs without disturbing tests that lock files.
//!
//! Between fork and exec a child has all of this process's files, and with them their locks, also
//! of files that another thread closes meanwhile: what that thread opens next is in use.

use std::process::{Child, Command, Output, Stdio};
use std::sync::RwLock;

use crate::require::{Need, have};

static FORK: RwLock<()> = RwLock::new(());

/// Runs `work` while no child is on its way from fork to exec.
pub fn undisturbed<T>(work: impl FnOnce() -> T) -> T {
    let _guard = FORK.read().unwrap_or_else(|e| e.into_inner());
    work()
}

/// Starts a program.
pub fn spawn(command: &mut Command) -> Child {
    let _guard = FORK.write().unwrap_or_else(|e| e.into_inner());
    command.spawn().unwrap()
}

/// Runs a program to its end.
pub fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(command).wait_with_output().unwrap()
}

/// Whether QEMU's tools are there.
pub fn have_qemu() -> bool {
    let _guard = FORK.write().unwrap_or_else(|e| e.into_inner());
    have(Need::Qemu)
}
