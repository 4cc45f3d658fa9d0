//! Commands that meet at a disk: each waits its turn.
//!
//! Files are waited for where they are locked. What is left to do here is to say a command again
//! that found another at work, or its plan outdated, before it did anything.

use std::ffi::OsString;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use vdisk::storage::{Manners, set_manners};
use vdisk::{Error, ErrorKind, Result};

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

static WAIT: OnceLock<Duration> = OnceLock::new();

/// Parses a number of seconds.
pub fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("'{text}' is no number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|_| "is out of bounds".to_owned())
}

/// Says how this process stands in line for files.
pub fn queue(stays: bool, wait: Duration) {
    let _ = WAIT.set(wait);
    set_manners(Manners { passing: !stays, wait });
}

/// The words that say the same to another process of this program.
pub fn words() -> Vec<OsString> {
    let word = |wait: &Duration| format!("--wait={}", wait.as_secs_f64()).into();
    WAIT.get().map(word).into_iter().collect()
}

/// Runs a part of a command, again as [`take`] does, for as long as this process waits in line.
pub fn again<T>(part: impl FnMut() -> Result<T>) -> Result<T> {
    take(WAIT.get().copied().unwrap_or_default(), part)
}

/// Runs a command, again for up to `wait` where another one was at work on its disk.
pub fn take<T>(wait: Duration, mut command: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + wait;
    loop {
        match command() {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < until => {
                let spread = Duration::from_millis(u64::from(std::process::id() % 13));
                thread::sleep(PAUSE + spread);
            }
            Err(e) if e.kind() == ErrorKind::Busy && !wait.is_zero() => {
                let text = format!("{} (waited {:.0?})", e.message(), wait);
                let waited = Error::new(ErrorKind::Busy, text);
                return Err(match e.path() {
                    Some(path) => waited.at_path(path),
                    None => waited,
                });
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_a_number_of_seconds() {
        assert_eq!(seconds("10"), Ok(Duration::from_secs(10)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "x", "-1", "inf", "NaN", "1e30"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_meets_another_command_is_said_again() {
        let busy = || Err(Error::new(ErrorKind::Busy, "another"));
        let mut times = 0;
        let done = take(Duration::from_secs(60), || {
            times += 1;
            if times < 3 { busy() } else { Ok(7) }
        });
        assert_eq!((done.ok(), times), (Some(7), 3));
        let mut times = 0;
        let refused = take(Duration::ZERO, || {
            times += 1;
            busy()
        });
        assert_eq!((refused.unwrap_err().kind(), times), (ErrorKind::Busy, 1));
    }
}
