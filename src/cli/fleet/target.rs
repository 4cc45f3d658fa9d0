//! Which instances are meant.

use std::fs;
use std::path::{Path, PathBuf};

use vdisk::instance::{Record, parse_name, place};
use vdisk::{Error, ErrorKind, Result};

use super::glob;
use crate::cli::image::Which;
use crate::cli::instance::named::clone_named;

/// An instance, or a clone that is kept for one of which there is no record: the host was restarted.
pub struct Target {
    pub name: String,
    pub record: Option<Record>,
    pub disk: PathBuf,
    /// Whether the store keeps its disk for it.
    pub clone: bool,
}

/// Those that fit the patterns, by name.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a pattern that none fits; [`ErrorKind::Unsupported`] for an instance of which
/// nothing is kept.
pub fn find(globs: &[String], which: &Which) -> Result<Vec<Target>> {
    let records = place::list()?.into_iter().filter(|record| !record.plain);
    let mut all: Vec<Target> = records.map(of_record).collect();
    // Of several of one name, which only ended ones are, the last counts: `place::list` gives the oldest first.
    all.reverse();
    let mut names = std::collections::HashSet::new();
    all.retain(|target| names.insert(target.name.clone()));
    for (name, disk) in kept(which)? {
        if names.insert(name.clone()) {
            all.push(Target { name, record: None, disk, clone: true });
        }
    }
    for pattern in globs {
        if !all.iter().any(|target| glob::fits(pattern, &target.name)) {
            let text = format!("there is no instance {pattern:?}: `vdisk ps --all` lists them");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
    }
    all.retain(|target| globs.iter().any(|pattern| glob::fits(pattern, &target.name)));
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all.iter().try_for_each(refuse_passing)?;
    Ok(all)
}

fn of_record(record: Record) -> Target {
    Target {
        name: record.name.clone(),
        disk: PathBuf::from(&record.disk),
        clone: record.clone,
        record: Some(record),
    }
}

fn refuse_passing(target: &Target) -> Result<()> {
    match &target.record {
        Some(record) if record.image.is_some() && !record.clone => {
            let text = format!(
                "{} runs in a throw-away clone, of which nothing is kept: stop it, and run the image anew",
                target.name
            );
            Err(Error::unsupported(text))
        }
        _ => Ok(()),
    }
}

/// The clones that the store keeps for instances, by their names.
fn kept(which: &Which) -> Result<Vec<(String, PathBuf)>> {
    let Some(store) = which.existing()? else { return Ok(Vec::new()) };
    let any = clone_named(&store, "any");
    let dir = any.parent().unwrap_or(Path::new("."));
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| Error::io("cannot be listed", e).at_path(dir))?,
    };
    let name = |path: &Path| {
        let name = path.file_name()?.to_str()?.strip_suffix(".qcow2")?;
        parse_name(name).ok()
    };
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter_map(|path| Some((name(&path)?, path))).collect())
}
