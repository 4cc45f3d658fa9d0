//! The passphrase of encrypted disks: one for a command, from a file that it names.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::OnceLock;

use vdisk::luks::Passphrase;
use vdisk::{Error, Result};
use zeroize::Zeroizing;

/// The longest passphrase, in bytes.
const MAX_LEN: u64 = 8 << 20;

static FILE: OnceLock<PathBuf> = OnceLock::new();
static PASSPHRASE: OnceLock<Passphrase> = OnceLock::new();

/// Notes which file the command line names.
pub fn keep(file: Option<PathBuf>) {
    if let Some(file) = file {
        // The command line is parsed once.
        let _ = FILE.set(file);
    }
}

/// The words that name the same file to another process of this program.
pub fn words() -> Vec<OsString> {
    FILE.get().map_or_else(Vec::new, |file| vec!["--passphrase-file".into(), file.into()])
}

/// The passphrase, all of the file's bytes; `None` where the command line names no file. The file
/// is read when it is first asked for, and once.
pub fn given() -> Result<Option<Passphrase>> {
    let Some(path) = FILE.get() else { return Ok(None) };
    if let Some(known) = PASSPHRASE.get() {
        return Ok(Some(known.clone()));
    }
    let failed = |e| Error::io("the passphrase could not be read", e).at_path(path);
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    File::open(path).map_err(failed)?.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(Error::invalid("a passphrase has 8 MiB at most").at_path(path));
    }
    Ok(Some(PASSPHRASE.get_or_init(|| Passphrase::new(bytes)).clone()))
}
