//! `vdisk import`, `vdisk export` and `vdisk image`: images and the store that they are kept in.

mod config;
pub mod export;
pub mod registry;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args as ClapArgs, Subcommand};
use serde_json::{Value, json};
use vdisk::jail::{Jail, Reach, Work};
use vdisk::oci::config::for_clones;
use vdisk::oci::import::{self, ImportOptions, Imported, Source};
use vdisk::oci::store::{Record, Store, Unused};
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::jail;
use crate::cli::terminal::output;
use crate::cli::terminal::{ask, size, stop};

/// Which store.
#[derive(ClapArgs, Clone)]
#[group(skip)]
pub struct Which {
    /// The directory of the store of images and kernels; also from VDISK_STORE.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

impl Which {
    /// Its directory, which may not be there yet.
    pub fn dir(&self) -> Result<PathBuf> {
        self.store.clone().map_or_else(Store::default_dir, Ok)
    }

    /// The words that say the same to another process of this program.
    pub fn words(&self) -> Vec<OsString> {
        let word = |dir: &PathBuf| ["--store".into(), dir.into()];
        self.store.iter().flat_map(word).collect()
    }

    fn open(&self) -> Result<Store> {
        Store::open(&self.dir()?)
    }

    /// The store, where there is one.
    pub fn existing(&self) -> Result<Option<Store>> {
        match (self.dir(), &self.store) {
            (Ok(dir), _) if dir.is_dir() => Store::open(&dir).map(Some),
            (Err(e), Some(_)) => Err(e),
            _ => Ok(None),
        }
    }

    /// What stands for the base that a user named: the file, or where there is none, the topmost layer of the image of
    /// that name.
    pub fn base(&self, named: &Path) -> Result<PathBuf> {
        if named.symlink_metadata().is_ok() {
            return Ok(named.to_owned());
        }
        let Some(name) = named.to_str() else { return Ok(named.to_owned()) };
        let dir = match self.dir() {
            Ok(dir) if dir.is_dir() => dir,
            _ => return Ok(named.to_owned()),
        };
        let store = Store::open(&dir)?;
        match store.image(name) {
            Ok(record) => store.top(&record),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Invalid) => {
                let text = "there is neither a disk nor an image of that name";
                Err(Error::new(ErrorKind::NotFound, text).at_path(named))
            }
            Err(e) => Err(e),
        }
    }
}

impl Which {
    /// What clones of what a user named are told of what is run in them, where that is an image.
    pub fn config(&self, named: &Path) -> Result<Option<Vec<u8>>> {
        match (named.symlink_metadata(), named.to_str(), self.existing()?) {
            (Err(_), Some(name), Some(store)) => for_clones(&store, name),
            _ => Ok(None),
        }
    }
}

/// Make an image of what other programs made: each layer becomes a delta on those below
///
/// SOURCE is oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:TAG], or a root file system as
/// FILE.tar (also compressed with gzip, zstd or xz), a directory, or - for a tar from standard input.
#[derive(ClapArgs)]
pub struct ImportArgs {
    /// Where it comes from.
    source: OsString,
    /// The image's name, with or without a tag.
    name: String,
    /// The size of its disk: what its files and all that is written to its clones have room in.
    #[arg(long, default_value = "10G", value_parser = size::parse)]
    size: u64,
    /// Whose the files of a directory are: as seen, or all root's. Root's default is as seen, others' is root.
    #[arg(long, value_enum)]
    owners: Option<Owners>,
    #[command(flatten)]
    store: Which,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Whose the files of a directory are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Owners {
    /// The numbers that they have here.
    Seen,
    /// Root, all of them.
    Root,
}

/// List, show and remove images
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the images.
    List {
        #[command(flatten)]
        store: Which,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show an image: its layers, their files, its configuration.
    Show {
        /// The image.
        name: String,
        #[command(flatten)]
        store: Which,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Forget an image. Its layers stay until `vdisk image prune`.
    Rm {
        /// The image.
        name: String,
        #[command(flatten)]
        store: Which,
    },
    /// Show what is run in a disk or an image, and as whom; with options, change it.
    Config(config::Args),
    /// Remove layers on which no image and no clone stands.
    Prune {
        #[command(flatten)]
        store: Which,
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs `vdisk import`.
pub fn import(args: &ImportArgs) -> Result<u8> {
    let store = args.store.open()?;
    let stop = stop::on_signals()?;
    // Who is not root has files of his own, which are root's in a container.
    let root = nix::unistd::geteuid().is_root();
    let source = source(&args.source, args.owners.map_or(!root, |o| o == Owners::Root))?;
    let options = ImportOptions { size: args.size };
    enclose(&source, &store)?;
    let done = import::import(&store, &source, &args.name, options, &mut |_, _| !stop.asked())?;
    say(&store, &done, args.json)
}

/// Closes the jail around an import: all that it opens is known before anything is read.
fn enclose(source: &Source, store: &Store) -> Result<()> {
    let mut jail = Jail::new(Work::Command);
    match source {
        Source::Layout(path, _) | Source::Archive(path, _) => jail.reach(path, Reach::Read),
        Source::Tar(path) | Source::Directory { path, .. } => jail.reach(path, Reach::Read),
        Source::Stdin => {}
    }
    jail.reach(store.dir(), Reach::Change);
    jail::close(jail)
}

/// Says what was imported.
fn say(store: &Store, done: &Imported, json: bool) -> Result<u8> {
    if json {
        output::json(&json!({
            "name": done.record.name,
            "layers": done.record.layers.len(),
            "layers_made": done.new,
            "disk": output::path(store.top(&done.record)?),
        }))?;
    } else {
        let shared = done.record.layers.len() - done.new;
        eprintln!(
            "{}: {} layers, {shared} of them were there",
            done.record.name,
            done.record.layers.len()
        );
    }
    Ok(0)
}

/// Closes the jail around work that only reads what a store keeps of images.
fn close_on(store: Store) -> Result<Store> {
    let mut jail = Jail::new(Work::Command);
    jail.reach(store.dir(), Reach::Read);
    jail::close(jail)?;
    Ok(store)
}

/// The same, around work that removes from it what nobody stands on: clones are looked for where they were made.
fn close_on_changes(store: Store) -> Result<Store> {
    let mut jail = Jail::new(Work::Command);
    jail.reach(Path::new("/"), Reach::Read);
    jail.reach(store.dir(), Reach::Change);
    jail::close(jail)?;
    Ok(store)
}

/// Runs `vdisk image`.
pub fn run(args: &Args) -> Result<u8> {
    match &args.verb {
        Verb::List { store, json } => list(&close_on(store.open()?)?, *json),
        Verb::Show { name, store, json } => show(&close_on(store.open()?)?, name, *json),
        Verb::Rm { name, store } => {
            let store = close_on_changes(store.open()?)?;
            let _locked = store.lock()?;
            let record = store.forget(name)?;
            let unused = store.prune(true)?;
            eprintln!(
                "{} is forgotten; `vdisk image prune` would free {}",
                record.name,
                size::human(total(&unused))
            );
            Ok(())
        }
        Verb::Config(args) => config::run(args),
        Verb::Prune { store, dry_run, yes, json } => {
            prune(&close_on_changes(store.open()?)?, *dry_run, *yes, *json)
        }
    }
    .map(|()| 0)
}

fn list(store: &Store, json: bool) -> Result<()> {
    let images = store.images()?;
    if json {
        let rows: Vec<Value> = images
            .iter()
            .map(|r| json!({ "name": r.name, "disk_size": r.disk_size, "layers": r.layers.len(), "config": r.config }))
            .collect();
        return output::json(&rows);
    }
    let mut text = String::new();
    for image in images {
        let size = size::human(image.disk_size);
        text += &format!("{:<40} {size:>10}  {} layers\n", image.name, image.layers.len());
    }
    output::text(&text)
}

fn show(store: &Store, name: &str, json: bool) -> Result<()> {
    let record = store.image(name)?;
    let config: Value = serde_json::from_slice(&store.json(&record.config)?)
        .map_err(|e| Error::corrupt(format!("the image's configuration cannot be read: {e}")))?;
    let layers = layers(store, &record)?;
    if json {
        return output::json(&json!({
            "name": record.name,
            "disk_size": record.disk_size,
            "config_digest": record.config,
            "manifest_digest": record.manifest,
            "layers": layers,
            "config": config,
        }));
    }
    let mut text = format!("{}\ndisk: {}\n", record.name, size::human(record.disk_size));
    for (number, layer) in layers.iter().enumerate() {
        let field = |name: &str| layer.get(name).and_then(Value::as_str).unwrap_or_default();
        let bytes = layer.get("allocated").and_then(Value::as_u64).unwrap_or(0);
        text += &format!("layer {number}: {} {}\n", field("file"), size::human(bytes));
    }
    output::text(&text)
}

fn layers(store: &Store, record: &Record) -> Result<Vec<Value>> {
    use std::os::unix::fs::MetadataExt;
    let ids = record.layer_ids()?;
    let rows = ids.iter().zip(&record.layers).map(|(id, layer)| {
        let path = store.layer(*id);
        let meta = path.metadata().map_err(|e| Error::io("cannot be read", e).at_path(&path))?;
        Ok(json!({
            "file": output::path(&path),
            "allocated": meta.blocks() * 512,
            "chain_id": layer.chain_id,
            "diff_id": layer.diff_id,
            "digest": layer.digest,
        }))
    });
    rows.collect()
}

fn prune(store: &Store, dry_run: bool, yes: bool, json: bool) -> Result<()> {
    let _locked = store.lock()?;
    let unused = store.prune(true)?;
    if !dry_run && !unused.is_empty() {
        let what = format!("{} files, {}", unused.len(), size::human(total(&unused)));
        ask::confirm(&format!("{what} will be removed for good"), yes)?;
        store.prune(false)?;
    }
    if json {
        let rows: Vec<Value> = unused
            .iter()
            .map(|u| json!({ "path": output::path(&u.path), "bytes": u.bytes }))
            .collect();
        return output::json(
            &json!({ "removed": rows, "freed": total(&unused), "dry_run": dry_run }),
        );
    }
    let mut text = String::new();
    for one in &unused {
        text += &format!("{} {}\n", one.path.display(), size::human(one.bytes));
    }
    output::text(&text)
}

fn total(unused: &[Unused]) -> u64 {
    unused.iter().map(|u| u.bytes).sum()
}

/// What a user means by a source.
fn source(word: &OsStr, root_owns: bool) -> Result<Source> {
    let bytes = word.as_bytes();
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    if bytes == b"-" {
        return Ok(Source::Stdin);
    }
    let tagged = |rest: &[u8]| -> (PathBuf, Option<String>) {
        // A directory or a file may have a colon in its name.
        if path(rest).exists() {
            return (path(rest), None);
        }
        let mut parts = rest.splitn(2, |b| *b == b':');
        let (first, tag) = (parts.next().unwrap_or_default(), parts.next());
        (path(first), tag.map(|tag| String::from_utf8_lossy(tag).into_owned()))
    };
    if let Some(rest) = bytes.strip_prefix(b"oci:") {
        let (dir, tag) = tagged(rest);
        return Ok(Source::Layout(dir, tag));
    }
    for prefix in [&b"oci-archive:"[..], b"docker-archive:"] {
        if let Some(rest) = bytes.strip_prefix(prefix) {
            let (file, tag) = tagged(rest);
            return Ok(Source::Archive(file, tag));
        }
    }
    let file = path(bytes);
    match file.is_dir() {
        true if file.join("oci-layout").is_file() => Ok(Source::Layout(file, None)),
        true => Ok(Source::Directory { path: file, root_owns }),
        false => Ok(Source::Tar(file)),
    }
}
