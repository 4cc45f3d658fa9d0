//! `vdisk pull` and `vdisk push`: images from registries and to them.

use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::json;
use vdisk::oci::export::Exporting;
use vdisk::oci::import::ImportOptions;
use vdisk::oci::manifest::Platform;
use vdisk::oci::registry::disk::{pull_disk, push_disk};
use vdisk::oci::registry::pull::{PullOptions, pull};
use vdisk::oci::registry::push::push;
use vdisk::oci::registry::{Name, Options};
use vdisk::{Error, Result};

use super::Which;
use super::config::Config;
use crate::cli::open::disk;
use crate::cli::open::options::{Moment, Opening};
use crate::cli::terminal::output::{self, Progress};
use crate::cli::terminal::{size, stop};

/// How a registry is spoken to.
#[derive(ClapArgs, Clone)]
struct Speaking {
    /// Speak only https, with certificates that the system vouches for; =false takes any, and http.
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true",
        require_equals = true, action = clap::ArgAction::Set)]
    tls_verify: bool,
    /// The file of credentials, as `podman login` writes it; also from REGISTRY_AUTH_FILE.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
}

impl Speaking {
    fn options(&self) -> Options {
        Options { verify_tls: self.tls_verify, auth_file: self.authfile.clone() }
    }
}

/// Bring an image from a registry into the store
///
/// NAME is [REGISTRY/]PATH[:TAG|@DIGEST]; without a registry docker.io is meant. Of an image for several platforms the
/// one for this processor comes. What is there already is not fetched again, and an interrupted pull goes on.
#[derive(ClapArgs)]
pub struct PullArgs {
    /// The image.
    name: String,
    /// Bring a disk that was pushed as one: its files go into this directory.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["platform", "size", "store"])]
    to: Option<PathBuf>,
    /// What it is to run on, where there are several: OS/ARCH[/VARIANT].
    #[arg(long)]
    platform: Option<String>,
    /// The size of its disk: what its files and all that is written to its clones have room in.
    #[arg(long, default_value = "10G", value_parser = size::parse)]
    size: u64,
    #[command(flatten)]
    speaking: Speaking,
    #[command(flatten)]
    store: Which,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Send a disk to a registry as an image: each delta a layer
///
/// Layers that came with an image leave as they came. What the registry has already is not sent again.
#[derive(ClapArgs)]
pub struct PushArgs {
    /// The disk, or an image of the store.
    disk: PathBuf,
    /// Where to: [REGISTRY/]PATH[:TAG].
    name: String,
    /// As what: an image, or the disk's own files, which `vdisk pull --to` brings back.
    #[arg(long = "as", value_enum, default_value_t = What::Image)]
    what: What,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    /// The partition that holds the files.
    #[arg(long)]
    partition: Option<u32>,
    #[command(flatten)]
    config: Config,
    #[command(flatten)]
    speaking: Speaking,
    #[command(flatten)]
    store: Which,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// As what a disk is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// An image: each delta a layer of files.
    Image,
    /// The layers' files as they are, with their ids.
    Disk,
}

/// Runs `vdisk pull`.
pub fn run_pull(args: &PullArgs) -> Result<u8> {
    let name = Name::parse(&args.name)?;
    if let Some(dir) = &args.to {
        return to(dir, &name, args);
    }
    let platform =
        args.platform.as_deref().map_or_else(|| Ok(Platform::host()), Platform::parse)?;
    let store = args.store.open()?;
    let stop = stop::on_signals()?;
    let how = PullOptions {
        registry: args.speaking.options(),
        platform,
        import: ImportOptions { size: args.size },
    };
    let bar = Progress::new("pulling", 0);
    let told = |done: u64, total: u64| {
        bar.of(total);
        bar.at(done);
        !stop.asked()
    };
    let done = pull(&store, &name, &how, &told)?;
    drop(bar);
    super::say(&store, &done, args.json)
}

/// Brings a disk's files.
fn to(dir: &Path, name: &Name, args: &PullArgs) -> Result<u8> {
    let stop = stop::on_signals()?;
    let bar = Progress::new("pulling", 0);
    let told = |done: u64, total: u64| {
        if total > 0 {
            bar.of(total);
            bar.at(done);
        }
        !stop.asked()
    };
    let head = pull_disk(dir, name, &args.speaking.options(), &told)?;
    drop(bar);
    match args.json {
        true => output::json(&json!({ "name": name.to_string(), "disk": output::path(&head) }))?,
        false => output::text(&format!("{}\n", head.display()))?,
    }
    Ok(0)
}

/// Runs `vdisk push`.
pub fn run_push(args: &PushArgs) -> Result<u8> {
    let name = Name::parse(&args.name)?;
    let stop = stop::on_signals()?;
    let file = args.store.base(&args.disk)?;
    let chain = disk::open(&file, &args.opening.reading(&args.moment))?;
    let store = args.store.existing()?;
    let exporting = Exporting { store: store.as_ref(), disk: &chain, partition: args.partition };
    let bar = Progress::new("pushing", 0);
    let told = |done: u64, total: u64| {
        bar.of(total);
        bar.at(done);
        !stop.asked()
    };
    let options = args.speaking.options();
    let changes = args.config.changes();
    if args.what == What::Disk && !changes.is_empty() {
        return Err(Error::invalid("a disk that is sent as one keeps its configuration as it is"));
    }
    let done = match args.what {
        What::Image => push(&exporting, &name, &changes, &options, &told),
        What::Disk => push_disk(&chain, &name, &options, &told),
    };
    drop(bar);
    let done = done.map_err(|e: Error| e.at_path(&args.disk))?;
    if args.json {
        output::json(&json!({
            "name": name.to_string(),
            "digest": done.digest,
            "blobs": done.blobs,
            "sent": done.sent,
            "mounted": done.mounted,
        }))?;
    } else {
        output::text(&format!("{}\n", done.digest))?;
        let there = done.blobs - done.sent;
        eprintln!("{name}: {} blobs sent, {there} were there", done.sent);
    }
    Ok(0)
}
