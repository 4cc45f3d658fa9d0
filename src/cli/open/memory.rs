//! How much memory a disk's metadata may take: one setting for a command, from the command line or
//! the environment.

use std::ffi::OsString;
use std::sync::OnceLock;

use vdisk::open::OpenOptions;
use vdisk::{Error, Result};

use crate::cli::terminal::size;

/// The environment's word for it.
const VARIABLE: &str = "VDISK_CACHE_SIZE";
/// The least that makes sense, in bytes.
const LEAST: u64 = 256 << 10;

static GIVEN: OnceLock<u64> = OnceLock::new();

/// Notes what the command line says.
pub fn keep(bytes: Option<u64>) {
    if let Some(bytes) = bytes {
        // The command line is parsed once.
        let _ = GIVEN.set(bytes);
    }
}

/// The words that say the same to another process of this program.
pub fn words() -> Vec<OsString> {
    let words = |bytes: &u64| vec!["--cache-size".into(), bytes.to_string().into()];
    GIVEN.get().map_or_else(Vec::new, words)
}

/// Bytes of metadata to keep in memory for a disk.
pub fn given() -> Result<u64> {
    let bytes = match (GIVEN.get(), std::env::var(VARIABLE)) {
        (Some(bytes), _) => *bytes,
        (None, Ok(text)) => {
            size::parse(&text).map_err(|e| Error::invalid(format!("{VARIABLE}: {e}")))?
        }
        (None, Err(_)) => return Ok(OpenOptions::CACHE),
    };
    if bytes < LEAST {
        return Err(Error::invalid(format!(
            "a disk needs {} of cache at least",
            size::human(LEAST)
        )));
    }
    Ok(bytes)
}
