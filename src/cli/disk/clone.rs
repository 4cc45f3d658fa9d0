//! `vdisk clone` and `vdisk unseal`: linked clones and the base they stand on.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args as ClapArgs;
use vdisk::block::BlockDevice;
use vdisk::change;
use vdisk::change::Base;
use vdisk::filesystem::ext4::mounted::growable;
use vdisk::{Error, Result};

use crate::cli::disk::{convert, resize};
use crate::cli::image::Which;
use crate::cli::open::disk::{self, Use};
use crate::cli::open::options::{Moment, Opening};
use crate::cli::open::rest::Rest;
use crate::cli::terminal::size;

/// Make linked clones of a base: they hold only what changes. The base is sealed.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk to stand on, or an image.
    base: PathBuf,
    /// The clones to make; none must exist.
    #[arg(required_unless_present = "count")]
    clones: Vec<PathBuf>,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    store: Which,
    /// Make each clone, and the file system in it, that large: one that vdisk made, as an image's.
    #[arg(long, value_parser = size::parse, conflicts_with = "full")]
    size: Option<u64>,
    /// Make independent copies of all contents instead; the disk is not sealed.
    #[arg(long)]
    full: bool,
    /// Copy the persistent bitmaps of a full copy's source too: incremental backups go on from it.
    #[arg(long, requires = "full")]
    bitmaps: bool,
    /// Make this many clones, with names from --name.
    #[arg(long, requires = "name", conflicts_with = "clones")]
    count: Option<u32>,
    /// Names by number, from 0: 'web-{}.qcow2', or 'web-{:04}.qcow2' with four digits.
    #[arg(long, requires = "count")]
    name: Option<String>,
}

/// Make a base on which no clone stands any more an ordinary disk again.
#[derive(ClapArgs)]
pub struct UnsealArgs {
    /// The base, or a snapshot's layer.
    disk: PathBuf,
    /// Go on although clones stand on it: they can be read no more once it changes
    #[arg(long)]
    even_if_cloned: bool,
    #[command(flatten)]
    opening: Opening,
}

pub fn run(args: &Args) -> Result<u8> {
    let names = match (args.count, &args.name) {
        (Some(count), Some(pattern)) => {
            numbered(pattern, count)?.into_iter().map(PathBuf::from).collect()
        }
        _ => args.clones.clone(),
    };
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = names.iter().find(|n| !seen.insert(*n)) {
        return Err(Error::invalid("is named twice").at_path(twice));
    }
    if let Some(taken) = names.iter().find(|n| n.symlink_metadata().is_ok()) {
        let exists = std::io::ErrorKind::AlreadyExists.into();
        return Err(Error::io("could not be created, and no clone was made", exists).at_path(taken));
    }
    let named = args.store.base(&args.base)?;
    if args.full {
        let using = args.opening.reading(&args.moment);
        let config = convert::config_of(&named, &args.opening, &args.moment, &args.store)?;
        let along = convert::Along { bitmaps: args.bitmaps, config };
        let rest = Rest::new().disk(&named);
        names.iter().fold(rest, |rest, name| rest.made(name)).close()?;
        let source = disk::open(&named, &using)?;
        let copy = |name: &PathBuf| convert::flatten(&source, name, &along);
        return names.iter().try_for_each(copy).map(|()| 0);
    }
    let (file, options) = args.opening.file_at(&named, &args.moment)?;
    let config = args.store.config(&args.base)?;
    let rest = Rest::new().disk(&file);
    names.iter().fold(rest, |rest, name| rest.made(name)).close()?;
    if let Some(size) = args.size {
        let base = disk::open(&named, &args.opening.reading(&args.moment))?;
        if size < base.size() {
            let text = format!("has {} bytes, and a clone has at least as many", base.size());
            return Err(Error::invalid(text).at_path(&named));
        }
        let base: Arc<dyn BlockDevice> = base;
        growable(&base).map_err(|e| e.at_path(&named))?;
    }
    let base = Base::seal_with(&file, &options, &names)?;
    let base = base.with_config(config);
    let stop = crate::cli::terminal::stop::on_signals()?;
    base.clone_all(&names, &mut |_| !stop.asked())?;
    drop(base);
    if let Some(size) = args.size.and_then(|size| size.checked_next_multiple_of(512)) {
        for name in &names {
            let clone = disk::open(name, &Use::writing())?;
            resize::files(clone, size).map_err(|e| e.at_path(name))?;
        }
    }
    Ok(0)
}

pub fn unseal(args: &UnsealArgs) -> Result<u8> {
    args.opening.govern(&args.disk)?;
    Rest::new().disk(&args.disk).close()?;
    for clone in change::unseal(&args.disk, args.even_if_cloned)? {
        eprintln!("vdisk: warning: {} stands on it, unprotected from now on", clone.display());
    }
    Ok(0)
}

/// The names that a pattern with one `{}` or `{:0N}` stands for.
pub fn numbered(pattern: &str, count: u32) -> Result<Vec<String>> {
    let wrong = || Error::invalid(format!("'{pattern}' needs one {{}} or {{:04}} for the number"));
    let (front, rest) = pattern.split_once('{').ok_or_else(wrong)?;
    let (inside, back) = rest.split_once('}').ok_or_else(wrong)?;
    let width = match inside.strip_prefix(":0") {
        Some(digits) => digits.parse::<usize>().ok().filter(|w| *w <= 20).ok_or_else(wrong)?,
        None if inside.is_empty() => 0,
        None => return Err(wrong()),
    };
    if back.contains(['{', '}']) {
        return Err(wrong());
    }
    Ok((0..count).map(|n| format!("{front}{n:0width$}{back}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_gives_numbered_names() {
        let names = |p| numbered(p, 2).unwrap();
        assert_eq!(names("web-{:04}.q"), ["web-0000.q", "web-0001.q"]);
        assert_eq!(names("{}"), ["0", "1"]);
        for bad in ["web", "{:4}", "{}{}", "{", "{:0x}"] {
            assert!(numbered(bad, 1).is_err(), "{bad}");
        }
    }
}
