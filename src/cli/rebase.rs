//! `vdisk rebase`: another base, or none.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use vdisk::Result;
use vdisk::chain::rebase::{Contents, accept_base, flatten, rebase};

/// Put a disk on another base, or make it stand alone.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    /// The new base. The disk's contents stay what they are.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["flatten", "accept_base"])]
    backing: Option<PathBuf>,
    /// Only change the name of the base: what the disk shows of it changes with it.
    #[arg(long = "unsafe", requires = "backing")]
    trust: bool,
    /// Copy what the disk shows of its base into it, so that it needs none.
    #[arg(long, conflicts_with_all = ["backing", "trust"])]
    flatten: bool,
    /// Take the bases below it as they are now: record what changed, and where one has moved to.
    #[arg(long, conflicts_with_all = ["backing", "trust", "flatten"])]
    accept_base: bool,
}

pub fn run(args: &Args) -> Result<u8> {
    if args.accept_base {
        let recorded = accept_base(&args.disk)?;
        if recorded.is_empty() {
            eprintln!("nothing to record: no base below it has changed or moved");
        }
        recorded.iter().for_each(|line| eprintln!("{line}"));
        return Ok(0);
    }
    let stop = super::stop::on_signals()?;
    let mut go_on = |_, _| !stop.asked();
    match &args.backing {
        Some(base) => {
            let contents = if args.trust { Contents::Trust } else { Contents::Keep };
            rebase(&args.disk, base, contents, &mut go_on)?;
        }
        None => flatten(&args.disk, &mut go_on)?,
    }
    Ok(0)
}
