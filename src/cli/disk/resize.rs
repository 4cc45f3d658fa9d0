//! `vdisk resize`: a disk of another size.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args as ClapArgs;
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::control::Request;
use vdisk::filesystem::ext4::mounted::{grow, growable};
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::options::Opening;
use crate::cli::open::{disk, held, jail};
use crate::cli::terminal::{output, size};

/// What a disk consists of.
const SECTOR: u64 = 512;

/// Change the size of a disk.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    /// The new size, or with + or - the change.
    #[arg(value_name = "[+|-]SIZE", value_parser = parse, allow_hyphen_values = true)]
    size: Change,
    #[command(flatten)]
    opening: Opening,
    /// Make it smaller, and lose what is stored past the new end.
    #[arg(long)]
    shrink: bool,
    /// Make the file system in it as large, too: one that vdisk made, on a disk that nobody uses.
    #[arg(long, conflicts_with = "shrink")]
    files: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    To(u64),
    Grow(u64),
    Shrink(u64),
}

fn parse(text: &str) -> std::result::Result<Change, String> {
    Ok(match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => Change::Grow(size::parse(more)?),
        (_, Some(less)) => Change::Shrink(size::parse(less)?),
        _ => Change::To(size::parse(text)?),
    })
}

pub fn run(args: &Args) -> Result<u8> {
    // Who holds the disk knows its size; else it is opened.
    let (disk, old) = match held::ask(&args.disk, &Request::Info)? {
        Some(info) => (None, held::number(&info, "virtual_size")?),
        None => {
            let disk = disk::open(&args.disk, &args.opening.writing())?;
            let old = disk.size();
            jail::close_on_changes(&disk)?;
            (Some(disk), old)
        }
    };
    let new = match args.size {
        Change::To(size) => Some(size),
        Change::Grow(more) => old.checked_add(more).filter(|s| *s < 1 << 63),
        Change::Shrink(less) => old.checked_sub(less),
    };
    let new = new.and_then(|size| size.checked_next_multiple_of(SECTOR));
    let new = new.ok_or_else(|| {
        let message = format!("no disk of {old} bytes can be changed by that much");
        Error::invalid(message).at_path(&args.disk)
    })?;
    if new < old && !args.shrink {
        let message = format!(
            "would lose its last {} bytes, and with them what is stored there; say --shrink if the \
             guest does not use them",
            old - new
        );
        return Err(Error::invalid(message).at_path(&args.disk));
    }
    match disk {
        Some(disk) if args.files => {
            files(disk, new).map_err(|e| e.at_path(&args.disk))?;
        }
        Some(disk) => disk.resize(new)?,
        None if args.files => {
            let text = "is in use: the file system in it grows when nobody uses it, or by resize2fs in there";
            return Err(Error::new(ErrorKind::InUse, text).at_path(&args.disk));
        }
        None => {
            let asked = held::ask(&args.disk, &Request::Resize { size: new })?;
            asked.ok_or_else(|| {
                let text = "was in use a moment ago and is not any more: try again";
                Error::new(ErrorKind::Busy, text).at_path(&args.disk)
            })?;
        }
    }
    output::text(&format!("{}: {old} -> {new} bytes\n", args.disk.display()))?;
    Ok(0)
}

/// Makes a disk and the file system in it `size` bytes large.
pub fn files(disk: Arc<Chain>, size: u64) -> Result<()> {
    let device: Arc<dyn BlockDevice> = disk.clone();
    growable(&device)?;
    disk.resize(size)?;
    grow(&device).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_makes_a_size_a_change() {
        assert_eq!(parse("1G"), Ok(Change::To(1 << 30)));
        assert_eq!(parse("+64K"), Ok(Change::Grow(65536)));
        assert_eq!(parse("-1M"), Ok(Change::Shrink(1 << 20)));
        assert!(parse("+-1").is_err() && parse("").is_err());
    }
}
