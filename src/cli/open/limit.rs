//! How many files this process may have open: each layer of a chain is one.

use std::sync::OnceLock;

use rustix::process::{Resource, getrlimit, setrlimit};

static FOUND: OnceLock<u64> = OnceLock::new();

/// Allows this process as many open files as the hard limit says.
pub fn raise() {
    let mut limit = getrlimit(Resource::Nofile);
    let Some(found) = limit.current else { return };
    FOUND.get_or_init(|| found);
    limit.current = limit.maximum;
    // Where that fails, opening says so when it comes to it.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// How many open files this process was started with, for programs that it starts: those that
/// know only 1024 of them, as `select` does, fail with more. `None` for no limit.
pub fn found() -> Option<u64> {
    FOUND.get().copied()
}
