//! Blobs into the store: several at once, each from where an earlier try ended.

use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::Told;
use super::client::Registry;
use crate::error::{Error, ErrorKind, Result};
use crate::oci::digest::Digest;
use crate::oci::part::Part;

/// Blobs that come at once.
const AT_ONCE: usize = 4;
/// Tries in which nothing came, one after the other.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(500);
const PIECE: usize = 128 << 10;

/// A blob that is wanted.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// What it is called.
    pub digest: Digest,
    /// Its bytes, as its manifest says.
    pub size: u64,
    /// Where it is to stand.
    pub target: std::path::PathBuf,
}

/// Fetches all that are not there. What was fetched of the others when one fails stays, for the next try.
pub fn download(registry: &Registry, wanted: &[Wanted], told: &Told<'_>) -> Result<()> {
    let total = wanted.iter().map(|w| w.size).sum();
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let more = |bytes: u64| {
        let all = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        told(all, total) && !stop.load(Ordering::Relaxed)
    };
    let mut unique: Vec<&Wanted> = Vec::new();
    for one in wanted {
        match unique.iter().any(|other| other.target == one.target) {
            true => drop(more(one.size)),
            false => unique.push(one),
        }
    }
    in_parallel(&unique, &stop, |one| blob(registry, one, &one.target, &more))
}

/// Does `work` with all of `items` in several threads; the first failure stops the others.
pub fn in_parallel<T: Sync>(
    items: &[T],
    stop: &AtomicBool,
    work: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicU64::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let run = || {
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed) as usize;
            let Some(item) = items.get(at) else { return };
            if let Err(error) = work(item) {
                stop.store(true, Ordering::Relaxed);
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(items.len()) {
            scope.spawn(run);
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn blob(
    registry: &Registry,
    wanted: &Wanted,
    target: &Path,
    more: &(dyn Fn(u64) -> bool + Sync),
) -> Result<()> {
    let Some(mut part) = Part::open(target)? else {
        more(wanted.size);
        return Ok(());
    };
    if part.len() > wanted.size {
        part.reset()?;
    }
    more(part.len());
    let kept = part.len();
    match all_of(registry, wanted, part, more) {
        // What was kept of an earlier try may have been the lie.
        Err(e) if e.kind() == ErrorKind::Corrupt && kept > 0 => match Part::open(target)? {
            Some(part) => all_of(registry, wanted, part, &|_| more(0)),
            None => Ok(()),
        },
        done => done,
    }
}

fn all_of(
    registry: &Registry,
    wanted: &Wanted,
    mut part: Part,
    more: &dyn Fn(u64) -> bool,
) -> Result<()> {
    let mut tries = 0;
    while part.len() < wanted.size {
        let before = part.len();
        match rest(registry, wanted, &mut part, more) {
            Ok(()) => {}
            Err(e) if passes(&e) => {
                tries = if part.len() > before { 0 } else { tries + 1 };
                if tries >= TRIES {
                    return Err(e);
                }
                std::thread::sleep(PAUSE * 2u32.pow(tries));
            }
            Err(e) => return Err(e),
        }
    }
    part.finish(wanted.digest)
}

/// Whether another try may go better.
fn passes(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Io | ErrorKind::Busy)
}

fn rest(
    registry: &Registry,
    wanted: &Wanted,
    part: &mut Part,
    more: &dyn Fn(u64) -> bool,
) -> Result<()> {
    let (answer, begin) = registry.blob(wanted.digest, part.len())?;
    if begin != part.len() {
        part.reset()?;
    }
    let lie = || {
        Error::corrupt(format!(
            "the registry sends more for {} than the {} bytes that its manifest says",
            wanted.digest, wanted.size
        ))
    };
    let left = wanted.size - part.len();
    if answer.body().content_length().is_some_and(|len| len > left) {
        return Err(lie());
    }
    let mut input = answer.into_body().into_with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; PIECE];
    loop {
        let read = match input.read(&mut buffer) {
            Ok(0) if part.len() < wanted.size => {
                return Err(Error::new(ErrorKind::Io, format!("{} broke off", wanted.digest)));
            }
            Ok(read) => read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(Error::io(format!("{} broke off", wanted.digest), e)),
        };
        if read as u64 > wanted.size - part.len() {
            return Err(lie());
        }
        part.append(buffer.get(..read).unwrap_or_default())?;
        if !more(read as u64) {
            return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
        }
        if part.len() == wanted.size {
            // Its digest will tell whether it is right; what follows is a lie all the same.
            return match input.read(&mut buffer) {
                Ok(read) if read > 0 => Err(lie()),
                _ => Ok(()),
            };
        }
    }
}
