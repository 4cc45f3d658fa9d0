//! What a user says of an image's configuration, and `vdisk image config`.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use serde_json::Value;
use vdisk::instance::signal;
use vdisk::oci::changes::Changes;
use vdisk::oci::config::{
    RunConfig, change, change_image, of_disk, of_image, raw_of_disk, raw_of_image,
};
use vdisk::oci::store::Store;
use vdisk::{Error, Result};

use super::Which;
use crate::cli::open::rest::Rest;
use crate::cli::terminal::output;

/// Which disk or image.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk, or where there is none of that name, the image.
    disk: PathBuf,
    #[command(flatten)]
    config: Config,
    #[command(flatten)]
    store: Which,
    /// Print JSON, as an image's configuration has it.
    #[arg(long)]
    json: bool,
}

/// Runs `vdisk image config`.
pub fn run(args: &Args) -> Result<()> {
    let store = args.store.existing()?;
    let store = store.as_ref();
    let changes = args.config.changes();
    let image = match (args.disk.symlink_metadata(), args.disk.to_str(), store) {
        (Err(_), Some(name), Some(store)) => Some((store, name)),
        _ => None,
    };
    enclose(args, image.map(|(store, _)| store), store, !changes.is_empty())?;
    if !changes.is_empty() {
        match image {
            Some((store, name)) => change_image(store, name, &changes)?,
            None => change(&args.disk, store, &changes)?,
        }
    }
    if args.json {
        let raw = match image {
            Some((store, name)) => Some(raw_of_image(store, name)?),
            None => raw_of_disk(&args.disk, store)?,
        };
        let failed = |e| Error::corrupt(format!("the configuration cannot be read: {e}"));
        let raw = raw.as_deref().unwrap_or(b"{}");
        return output::json(&serde_json::from_slice::<Value>(raw).map_err(failed)?);
    }
    let config = match image {
        Some((store, name)) => of_image(store, name)?,
        None => of_disk(&args.disk, store)?,
    };
    output::text(&text(&config))
}

/// Closes the jail around it: what an image says stands in its store, and what a disk says in its own label or in
/// that of one that it stands on.
fn enclose(args: &Args, image: Option<&Store>, store: Option<&Store>, changes: bool) -> Result<()> {
    let rest = match image {
        Some(store) if changes => Rest::new().made(&store.dir().join("images")),
        Some(_) => Rest::new(),
        None if changes => Rest::new().disk(&args.disk),
        None => Rest::new().looked_at(&args.disk),
    };
    let store = image.or(store);
    store.into_iter().fold(rest, |rest, store| rest.read(store.dir())).close()
}

/// A line for each thing that is set.
fn text(config: &RunConfig) -> String {
    let labels = config.labels.iter().map(|(name, value)| format!("{name}={value}"));
    let one = |text: &String| vec![text.clone()];
    let all = [
        ("env", config.env.clone()),
        ("entrypoint", config.entrypoint.clone()),
        ("cmd", config.cmd.clone()),
        ("workdir", one(&config.workdir)),
        ("user", one(&config.user)),
        ("stop signal", one(&config.stop_signal)),
        ("volumes", config.volumes.clone()),
        ("ports", config.exposed_ports.clone()),
        ("labels", labels.collect()),
    ];
    let set = all.iter().filter(|(_, words)| words.iter().any(|word| !word.is_empty()));
    set.map(|(what, words)| format!("{what}: {}\n", words.join(" "))).collect()
}

/// Changes of a configuration.
#[derive(ClapArgs, Clone)]
pub struct Config {
    /// A variable of the programs' environment; may be given more than once.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The program that is always run, split at spaces.
    #[arg(long)]
    entrypoint: Option<String>,
    /// What is run, or the entrypoint's arguments, split at spaces.
    #[arg(long)]
    cmd: Option<String>,
    /// The working directory.
    #[arg(long)]
    workdir: Option<String>,
    /// The user, by name or number.
    #[arg(long)]
    user: Option<String>,
    /// The signal that asks it to stop, by name or number: `vdisk stop` sends it.
    #[arg(long, value_name = "SIGNAL", value_parser = stop_signal)]
    stop_signal: Option<String>,
    /// A label of the image; may be given more than once.
    #[arg(long, value_name = "NAME=VALUE")]
    label: Vec<String>,
}

impl Config {
    /// What is to be otherwise.
    pub fn changes(&self) -> Changes {
        let words = |text: &String| text.split_whitespace().map(str::to_owned).collect();
        Changes {
            env: self.env.clone(),
            entrypoint: self.entrypoint.as_ref().map(words),
            cmd: self.cmd.as_ref().map(words),
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            stop_signal: self.stop_signal.clone(),
            labels: self.label.clone(),
        }
    }
}

/// As it was written: images say it either way.
fn stop_signal(text: &str) -> std::result::Result<String, String> {
    signal::parse(text).map(|_| text.to_owned())
}
