//! Opening the disks that the user names.

use std::path::Path;
use std::sync::Arc;

use vdisk::chain::{self, Chain, Format, OpenOptions};
use vdisk::{Error, ErrorKind, Result};

use super::{memory, passphrase};

/// What a command does with a disk.
#[derive(Debug, Clone, Default)]
pub struct Use<'a> {
    /// Writes to it.
    pub write: bool,
    /// Writes, but into a delta that is thrown away.
    pub ephemeral: bool,
    /// Looks at this snapshot, not at the disk as it is now.
    pub snapshot: Option<&'a str>,
    /// The format, where the user says it.
    pub format: Option<Format>,
    /// Takes bases that have changed as they are now, and only says so.
    pub accept_base: bool,
}

impl Use<'_> {
    /// Only reads.
    pub fn reading() -> Use<'static> {
        Use::default()
    }

    /// Reads and writes.
    pub fn writing() -> Use<'static> {
        Use { write: true, ..Use::default() }
    }
}

/// Opens a disk for a command.
pub fn open(path: &Path, using: &Use<'_>) -> Result<Arc<Chain>> {
    if using.snapshot.is_some() && using.write && !using.ephemeral {
        let message = "a snapshot is looked at with --read-only or --ephemeral";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let options = OpenOptions {
        read_only: !using.write || using.ephemeral,
        format: using.format,
        accept_base: using.accept_base,
        passphrase: passphrase::given()?,
        cache: memory::given()?,
        ..OpenOptions::default()
    };
    let chain = match using.snapshot {
        Some(name) => chain::snapshot::open_at(path, name, &options)?,
        None => chain::open(path, &options)?,
    };
    chain.notes().iter().for_each(|note| eprintln!("vdisk: warning: {note}"));
    Ok(Arc::new(if using.ephemeral { chain::ephemeral(chain, options.cache)? } else { chain }))
}
