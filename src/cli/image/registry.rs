//! `vdisk pull` and `vdisk push`: images from registries and to them.

use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::json;
use vdisk::chain::Chain;
use vdisk::jail::{Jail, Reach, Work, leave_network};
use vdisk::oci::export::Exporting;
use vdisk::oci::import::ImportOptions;
use vdisk::oci::manifest::Platform;
use vdisk::oci::registry::disk::{pull_disk, push_disk};
use vdisk::oci::registry::pull::{PullOptions, fetch};
use vdisk::oci::registry::push::push;
use vdisk::oci::registry::{Access, Name, Options};
use vdisk::oci::store::Store;
use vdisk::{Error, Result};

use super::Which;
use super::config::Config;
use crate::cli::open::options::{Moment, Opening};
use crate::cli::open::{disk, jail};
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
    fn access(&self, name: &Name) -> Result<Access> {
        let options = Options { verify_tls: self.tls_verify, auth_file: self.authfile.clone() };
        Access::to(name, &options)
    }
}

/// What is read to find a host by its name: as a file, and where others keep what is a link there.
const RESOLVER: [&str; 10] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/localtime",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
];
/// Where hosts have the certificates that they trust; none of them has keys.
const TRUSTED: [&str; 12] = [
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust",
    "/etc/ca-certificates",
    "/usr/lib/ssl/certs",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/var/lib/ca-certificates",
];

/// A jail around what a registry says: it connects to servers of the internet. Who asks is known, and what the
/// C library needs to look names up is loaded.
fn jail_for(access: &Access) -> Jail {
    access.look_up();
    let mut jail = Jail::new(Work::Client);
    let named = ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().filter_map(std::env::var_os);
    let places = named.flat_map(|paths| std::env::split_paths(&paths).collect::<Vec<_>>());
    let places = places.chain(RESOLVER.into_iter().chain(TRUSTED).map(PathBuf::from));
    places.for_each(|path| jail.reach(&path, Reach::Read));
    jail
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
    let access = args.speaking.access(&name)?;
    let store = args.store.open()?;
    let stop = stop::on_signals()?;
    let how = PullOptions { platform, import: ImportOptions { size: args.size } };
    let mut jail = jail_for(&access);
    jail.reach(store.dir(), Reach::Change);
    jail::close(jail)?;
    let bar = Progress::new("pulling", 0);
    let told = |done: u64, total: u64| {
        bar.of(total);
        bar.at(done);
        !stop.asked()
    };
    let fetched = fetch(&store, &access, &how, &told)?;
    // What is in the layers is for this process alone.
    leave_network();
    let done = fetched.import(&told)?;
    drop(bar);
    super::say(&store, &done, args.json)
}

/// Brings a disk's files.
fn to(dir: &Path, name: &Name, args: &PullArgs) -> Result<u8> {
    let stop = stop::on_signals()?;
    let access = args.speaking.access(name)?;
    let made = std::fs::create_dir_all(dir);
    made.map_err(|e| Error::io("could not be made", e).at_path(dir))?;
    let mut jail = jail_for(&access);
    jail.reach(dir, Reach::Change);
    jail::close(jail)?;
    let bar = Progress::new("pulling", 0);
    let told = |done: u64, total: u64| {
        if total > 0 {
            bar.of(total);
            bar.at(done);
        }
        !stop.asked()
    };
    let head = pull_disk(dir, &access, &told)?;
    drop(bar);
    match args.json {
        true => output::json(&json!({ "name": name.to_string(), "disk": output::path(&head) }))?,
        false => output::text(&format!("{}\n", head.display()))?,
    }
    Ok(0)
}

/// Closes the jail around what is sent: it is made ready in the store, or where files are for a while.
fn enclose_push(
    args: &PushArgs,
    access: &Access,
    chain: &Chain,
    store: Option<&Store>,
) -> Result<()> {
    let mut jail = jail_for(access);
    jail::disk(&mut jail, chain, false)?;
    if let Some(store) = store {
        jail.reach(store.dir(), Reach::Change);
    }
    if store.is_none() || args.what == What::Disk {
        jail.reach(&std::env::temp_dir(), Reach::Change);
    }
    jail::close(jail)
}

/// Runs `vdisk push`.
pub fn run_push(args: &PushArgs) -> Result<u8> {
    let name = Name::parse(&args.name)?;
    let stop = stop::on_signals()?;
    let file = args.store.base(&args.disk)?;
    let changes = args.config.changes();
    if args.what == What::Disk && !changes.is_empty() {
        return Err(Error::invalid("a disk that is sent as one keeps its configuration as it is"));
    }
    let access = args.speaking.access(&name)?;
    let chain = disk::open(&file, &args.opening.reading(&args.moment))?;
    let store = args.store.existing()?;
    enclose_push(args, &access, &chain, store.as_ref())?;
    let exporting = Exporting { store: store.as_ref(), disk: &chain, partition: args.partition };
    let bar = Progress::new("pushing", 0);
    let told = |done: u64, total: u64| {
        bar.of(total);
        bar.at(done);
        !stop.asked()
    };
    let done = match args.what {
        What::Image => push(&exporting, &access, &changes, &told),
        What::Disk => push_disk(&chain, &access, &told),
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
