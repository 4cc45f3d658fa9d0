//! Looking at the headers of many files at once: thousands of clones beside a base.

use std::path::PathBuf;
use std::thread;

use crate::open::disk::{Peek, peek};

/// Fewer files than this are not worth another thread.
const SHARE: usize = 128;
/// The most threads.
const THREADS: usize = 8;

/// What `look` finds of each item, in order; several threads share the work where it is worth it.
pub(crate) fn each<T: Sync, R: Send>(items: &[T], look: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let able = thread::available_parallelism().map_or(1, |n| n.get().min(THREADS));
    let share = items.len().div_ceil(able).max(SHARE);
    if items.len() <= share {
        return items.iter().map(look).collect();
    }
    let look = &look;
    thread::scope(|scope| {
        let parts = items.chunks(share);
        let running: Vec<_> = parts
            .map(|part| scope.spawn(move || part.iter().map(look).collect::<Vec<R>>()))
            .collect();
        let mut found = Vec::with_capacity(items.len());
        for (part, thread) in items.chunks(share).zip(running) {
            // A thread that could not finish leaves its part to this one.
            found.extend(thread.join().unwrap_or_else(|_| part.iter().map(look).collect()));
        }
        found
    })
}

/// Those of the files that are qcow2 images, with what their headers say. What cannot be read is
/// left out.
pub(crate) fn peek_all(paths: Vec<PathBuf>) -> Vec<(PathBuf, Peek)> {
    let seen = each(&paths, |path| peek(path).ok().flatten());
    paths.into_iter().zip(seen).filter_map(|(path, peek)| Some((path, peek?))).collect()
}
