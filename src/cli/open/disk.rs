//! Opening the disks that the user names.

use std::path::Path;
use std::sync::Arc;

use vdisk::chain::Chain;
use vdisk::change;
use vdisk::open;
use vdisk::open::{Format, OpenOptions};
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::{options as opening, passphrase};

/// What a command does with a disk.
#[derive(Debug, Clone, Default)]
pub struct Use<'a> {
    /// Writes to it.
    pub write: bool,
    /// Writes, but into a delta that is thrown away.
    pub ephemeral: bool,
    /// Looks at its tables only, which nobody encrypts.
    pub tables: bool,
    /// Looks at this snapshot, not at the disk as it is now.
    pub snapshot: Option<&'a str>,
    /// The format, where the user says it.
    pub format: Option<Format>,
    /// Opens what it names wherever that stands, as the user says.
    pub follow: bool,
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
        accept_base: using.accept_base,
        ..opening::options(using.format, using.follow)?
    };
    let chain = match using.snapshot {
        Some(name) => change::snapshot::open_at(path, name, &options)?,
        None => change::open(path, &options)?,
    };
    if !using.tables {
        refuse_locked(&chain)?;
    }
    chain.notes().iter().for_each(|note| eprintln!("vdisk: warning: {note}"));
    Ok(Arc::new(if using.ephemeral { open::ephemeral(chain, options.cache)? } else { chain }))
}

/// Refuses a disk whose data cannot be read for want of a passphrase, also where none of it were read.
fn refuse_locked(chain: &Chain) -> Result<()> {
    if passphrase::given()?.is_some() {
        return Ok(());
    }
    match chain.all_layers().iter().find(|layer| layer.image.encrypted()) {
        None => Ok(()),
        Some(layer) => {
            let text = "is encrypted, and no passphrase was given: --passphrase-file names the file with it";
            Err(Error::new(ErrorKind::Denied, text).at_path(&layer.path))
        }
    }
}
