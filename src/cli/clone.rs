//! `vdisk clone` and `vdisk unseal`: linked clones and the base they stand on.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use vdisk::chain::{self, Base};
use vdisk::{Error, Result};

use super::convert;

/// Make linked clones of a base: they hold only what changes. The base is sealed.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk to stand on.
    base: PathBuf,
    /// The clones to make; none must exist.
    #[arg(required_unless_present = "count")]
    clones: Vec<PathBuf>,
    /// Make independent copies of all contents instead; the disk is not sealed.
    #[arg(long)]
    full: bool,
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
    /// The base.
    disk: PathBuf,
}

pub fn run(args: &Args) -> Result<u8> {
    let names = match (args.count, &args.name) {
        (Some(count), Some(pattern)) => numbered(pattern, count)?,
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
    if args.full {
        return names.iter().try_for_each(|name| convert::flatten(&args.base, name)).map(|()| 0);
    }
    let base = Base::seal(&args.base)?;
    let stop = super::stop::on_signals()?;
    base.clone_all(&names, &mut |_| !stop.asked())?;
    Ok(0)
}

pub fn unseal(args: &UnsealArgs) -> Result<u8> {
    chain::unseal(&args.disk)?;
    Ok(0)
}

/// The names that a pattern with one `{}` or `{:0N}` stands for.
fn numbered(pattern: &str, count: u32) -> Result<Vec<PathBuf>> {
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
    Ok((0..count).map(|n| PathBuf::from(format!("{front}{n:0width$}{back}"))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_gives_numbered_names() {
        let names = |p| -> Vec<String> {
            let paths = numbered(p, 2).unwrap();
            paths.iter().map(|p| p.display().to_string()).collect()
        };
        assert_eq!(names("web-{:04}.q"), ["web-0000.q", "web-0001.q"]);
        assert_eq!(names("{}"), ["0", "1"]);
        for bad in ["web", "{:4}", "{}{}", "{", "{:0x}"] {
            assert!(numbered(bad, 1).is_err(), "{bad}");
        }
    }
}
