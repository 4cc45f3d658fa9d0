//! `vdisk rm DISK:PATH`: files in a disk.

use std::ffi::OsString;

use vdisk::filesystem::ext4::mounted::Mounted;
use vdisk::filesystem::{path, tree};
use vdisk::{Error, ErrorKind, Result};

use super::target::in_disk;
use super::{DIRECTORY, TYPE, Which};

/// How files in a disk are removed.
#[derive(clap::Args)]
pub struct RemoveArgs {
    /// Of files in a disk: directories and what is in them, too
    #[arg(long, short)]
    recursive: bool,
    /// Of files in a disk: say nothing of what is not there
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    pub which: Which,
}

/// Removes what `word` names in a disk.
pub fn run(word: &OsString, args: &RemoveArgs) -> Result<()> {
    let (disk, at) = in_disk(word)?;
    let fs = args.which.open(&disk, true)?;
    one(&fs, &at, args).and_then(|()| fs.close()).map_err(|e| e.at_path(&disk))
}

fn one(fs: &Mounted, at: &[u8], args: &RemoveArgs) -> Result<()> {
    let place = match path::find(fs, at, false) {
        Err(error) if error.kind() == ErrorKind::NotFound && args.force => return Ok(()),
        place => place?,
    };
    let Some(file) = place.file else {
        return if args.force { Ok(()) } else { path::file(fs, at, false).map(drop) };
    };
    if place.name.is_empty() {
        return Err(Error::invalid("the root directory cannot be removed, only what is in it"));
    }
    if file.mode & TYPE != DIRECTORY {
        return fs.unlink(place.directory, &place.name);
    }
    if !args.recursive {
        let shown = String::from_utf8_lossy(at);
        return Err(Error::invalid(format!("{shown} is a directory: --recursive removes it")));
    }
    tree::remove(fs, file.inode)?;
    fs.remove_directory(place.directory, &place.name)
}
