//! `vdisk export`: a disk as an image for others.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use vdisk::oci::export::{Exporting, upper};
use vdisk::{Error, Result};

use super::Which;
use super::config::Config;
use crate::cli::open::disk;
use crate::cli::open::options::{Moment, Opening};
use crate::cli::open::rest::Rest;
use crate::cli::terminal::stop;

/// Write a disk as an image: each delta as a layer
///
/// TARGET is oci:DIR:TAG, oci-archive:FILE[:TAG], or FILE.tar for all files as one tar. Layers that came with an image
/// leave as they came.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk, or with --layer an overlay's upper directory.
    disk: PathBuf,
    /// Where it goes to.
    target: OsString,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    /// The partition that holds the files.
    #[arg(long)]
    partition: Option<u32>,
    /// Write an overlay's upper directory as a layer: TARGET is FILE.tar, or - for standard output.
    #[arg(long)]
    layer: bool,
    #[command(flatten)]
    config: Config,
    #[command(flatten)]
    store: Which,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<u8> {
    let stop = stop::on_signals()?;
    let mut progress = |_| !stop.asked();
    if args.layer {
        let Target::Tar(file) = target(&args.target)? else {
            return Err(Error::invalid("a layer goes to FILE.tar, or - for standard output"));
        };
        let rest = Rest::new().read(&args.disk);
        made(rest, &file).close()?;
        let write = |out: &mut dyn Write| upper(&args.disk, out, &mut progress);
        return tar(write, &file).map(|()| 0);
    }
    let using = args.opening.reading(&args.moment);
    let chain = disk::open(&args.disk, &using)?;
    let store = args.store.existing()?;
    let exporting = Exporting { store: store.as_ref(), disk: &chain, partition: args.partition };
    let changes = args.config.changes();
    let target = target(&args.target)?;
    let rest = match &store {
        Some(store) => Rest::new().read(store.dir()),
        None => Rest::new(),
    };
    let rest = rest.looked_at(&args.disk);
    match &target {
        Target::Layout(dir, _) => made(rest.tree(dir), dir),
        Target::Archive(file, _) | Target::Tar(file) => made(rest, file),
    }
    .close()?;
    let done = match target {
        Target::Layout(dir, tag) => exporting.layout(&dir, &tag, &changes, &mut progress),
        Target::Archive(file, tag) => exporting.archive(&file, &tag, &changes, &mut progress),
        Target::Tar(file) => tar(|out| exporting.tar(out, &mut progress), &file),
    };
    done.map_err(|e| e.at_path(&args.disk)).map(|()| 0)
}

/// Lets a file be made, unless it goes to standard output.
fn made(rest: Rest, file: &Path) -> Rest {
    if file.as_os_str() == "-" { rest } else { rest.made(file) }
}

/// One tar, which takes the place of another when it is whole.
fn tar(mut write: impl FnMut(&mut dyn Write) -> Result<()>, file: &Path) -> Result<()> {
    let failed = |e| Error::io("could not be written", e).at_path(file);
    if file.as_os_str() == "-" {
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        write(&mut out)?;
        return out.flush().map_err(failed);
    }
    let dir = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let part = dir.join(format!(".vdisk-export-{}.tar", std::process::id()));
    let written = (|| {
        let mut out = std::io::BufWriter::new(std::fs::File::create(&part).map_err(failed)?);
        write(&mut out)?;
        let out = out.into_inner().map_err(|e| failed(e.into_error()))?;
        out.sync_all().map_err(failed)?;
        std::fs::rename(&part, file).map_err(failed)
    })();
    written.inspect_err(|_| drop(std::fs::remove_file(&part)))
}

enum Target {
    Layout(PathBuf, String),
    Archive(PathBuf, String),
    Tar(PathBuf),
}

fn target(word: &OsStr) -> Result<Target> {
    let bytes = word.as_bytes();
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let tag = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if let Some(rest) = bytes.strip_prefix(b"oci:") {
        return match rest.iter().rposition(|b| *b == b':') {
            Some(at) => Ok(Target::Layout(path(&rest[..at]), tag(&rest[at + 1..]))),
            None => Err(Error::invalid("an image in a layout has a tag: oci:DIR:TAG")),
        };
    }
    if let Some(rest) = bytes.strip_prefix(b"oci-archive:") {
        return Ok(match rest.iter().rposition(|b| *b == b':') {
            Some(at) => Target::Archive(path(&rest[..at]), tag(&rest[at + 1..])),
            None => Target::Archive(path(rest), "latest".to_owned()),
        });
    }
    if bytes == b"-" || bytes.ends_with(b".tar") {
        return Ok(Target::Tar(path(bytes)));
    }
    let text = "a disk is exported to oci:DIR:TAG, oci-archive:FILE, FILE.tar, or - for a tar on standard output";
    Err(Error::invalid(text))
}
