//! What is run in a disk, and as whom (OCI image specification, config.md): the configuration that goes with it.
//!
//! A clone of an image gets it in its label, and each new head of that disk from the one before, so that snapshots keep
//! what they had. Where a disk has none, the image in the store that it stands on says it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::changes::Changes;
use super::manifest::parse;
use super::store::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Label;
use crate::open::disk::OpenOptions;
use crate::open::{MAX_DEPTH, open_image, peek, resolve};

/// What is run in a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// Variables, `NAME=VALUE`.
    #[serde(default, deserialize_with = "or_nothing")]
    pub env: Vec<String>,
    /// The program that is always run, and its first arguments; empty where there is none.
    #[serde(default, deserialize_with = "or_nothing")]
    pub entrypoint: Vec<String>,
    /// What is run, or the arguments that follow the entrypoint.
    #[serde(default, deserialize_with = "or_nothing")]
    pub cmd: Vec<String>,
    /// The working directory; empty for the root.
    #[serde(default, rename = "WorkingDir", deserialize_with = "or_nothing")]
    pub workdir: String,
    /// The user and the group, by name or number: `USER[:GROUP]`; empty for root.
    #[serde(default, deserialize_with = "or_nothing")]
    pub user: String,
    /// The signal that asks it to stop, by name or number; empty for SIGTERM.
    #[serde(default, deserialize_with = "or_nothing")]
    pub stop_signal: String,
    /// Directories whose contents are to outlive it.
    #[serde(default, deserialize_with = "keys")]
    pub volumes: Vec<String>,
    /// Ports that it listens on: `PORT[/tcp|/udp]`.
    #[serde(default, deserialize_with = "keys")]
    pub exposed_ports: Vec<String>,
    /// Labels.
    #[serde(default, deserialize_with = "or_nothing")]
    pub labels: BTreeMap<String, String>,
}

/// Programs write null for what is not set.
fn or_nothing<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Sets are objects whose values say nothing.
fn keys<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Vec<String>, D::Error> {
    let all: Option<BTreeMap<String, serde::de::IgnoredAny>> = Option::deserialize(from)?;
    Ok(all.unwrap_or_default().into_keys().collect())
}

/// The configuration of the disk whose head, or one of whose snapshots, is at `path`. Nothing is locked: the disk may be
/// in use. `store` is asked about images that the disk stands on. What has none runs nothing.
///
/// # Errors
/// Where the disk cannot be read; [`ErrorKind::Corrupt`] where its configuration is none.
pub fn of_disk(path: &Path, store: Option<&Store>) -> Result<RunConfig> {
    match raw_of_disk(path, store)? {
        Some(raw) => parse(&raw, "the disk's configuration").map_err(|e| e.at_path(path)),
        None => Ok(RunConfig::default()),
    }
}

/// The configuration of an image in the store.
pub fn of_image(store: &Store, name: &str) -> Result<RunConfig> {
    parse(&raw_of_image(store, name)?, "the image's configuration")
}

/// The same as the JSON object that it is in an image.
pub fn raw_of_disk(path: &Path, store: Option<&Store>) -> Result<Option<Vec<u8>>> {
    let images = match store {
        Some(store) => store.images()?,
        None => Vec::new(),
    };
    let mut at = path.to_owned();
    for _ in 0..MAX_DEPTH {
        let found = match peek(&at) {
            // What is below may be gone, or another's.
            Err(_) if at != path => return Ok(None),
            found => found?,
        };
        let Some(found) = found else { return Ok(None) };
        if let Some(raw) = found.identity.label.and_then(|label| label.config) {
            return Ok(Some(raw));
        }
        if let Some(store) = store {
            let real = at.canonicalize().unwrap_or_else(|_| at.clone());
            let dir = store.layers_dir().canonicalize().unwrap_or_default();
            let is =
                |top: &Path| real.parent() == Some(&dir) && real.file_name() == top.file_name();
            for image in &images {
                if is(&store.top(image)?) {
                    return run_of(&store.json(&image.config)?).map(Some);
                }
            }
        }
        let Some(below) = found.identity.backing else { return Ok(None) };
        at = resolve(&at, &below.name)?;
    }
    Ok(None)
}

/// What an image in the store says of what is run, as a JSON object.
pub fn raw_of_image(store: &Store, name: &str) -> Result<Vec<u8>> {
    run_of(&store.json(&store.image(name)?.config)?)
}

/// What clones of an image get in their labels; `None` where it is too long: the image says it then.
pub fn for_clones(store: &Store, name: &str) -> Result<Option<Vec<u8>>> {
    Ok(Some(raw_of_image(store, name)?).filter(|raw| raw.len() <= Label::MAX_CONFIG))
}

/// The part of an image's configuration that says what is run.
fn run_of(config: &[u8]) -> Result<Vec<u8>> {
    let config: Value = parse(config, "the image's configuration")?;
    let run = config.get("config").filter(|run| run.is_object()).cloned();
    text(&run.unwrap_or_else(|| json!({})))
}

/// Changes the configuration of the disk at `path`, which nobody may be using.
///
/// # Errors
/// [`ErrorKind::InUse`]; [`ErrorKind::Sealed`] for a layer that others stand on, [`ErrorKind::Unsupported`] for one
/// that is not qcow2; [`ErrorKind::Invalid`] where it is too long.
pub fn change(path: &Path, store: Option<&Store>, changes: &Changes) -> Result<()> {
    let raw = raw_of_disk(path, store)?.unwrap_or_else(|| b"{}".to_vec());
    let raw = changed(&raw, changes)?;
    let layer = open_image(path, &OpenOptions::writable())?;
    let mut identity = layer.image.identity()?;
    let label = identity.label.get_or_insert_default();
    if label.role != crate::image::Role::Head {
        let text = "is no head: a snapshot's and a base's configuration stay what they were";
        return Err(Error::new(ErrorKind::Sealed, text).at_path(path));
    }
    label.config = Some(raw);
    layer.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

/// Changes the configuration of an image in the store: its name means another image then, of the same layers.
pub fn change_image(store: &Store, name: &str, changes: &Changes) -> Result<()> {
    let _locked = store.lock()?;
    let mut record = store.image(name)?;
    let mut config: Value = parse(&store.json(&record.config)?, "the image's configuration")?;
    let damaged = || Error::corrupt("the image's configuration is no object");
    let run = config.as_object_mut().ok_or_else(damaged)?;
    let run = run.entry("config").or_insert_with(|| json!({}));
    if run.is_null() {
        *run = json!({});
    }
    changes.apply(run.as_object_mut().ok_or_else(damaged)?)?;
    record.config = store.keep_json(&text(&config)?)?.to_string();
    // It says that of the image as it was.
    record.manifest = None;
    store.put(&record)
}

fn changed(raw: &[u8], changes: &Changes) -> Result<Vec<u8>> {
    let mut run: Map<String, Value> = parse(raw, "the disk's configuration")?;
    changes.apply(&mut run)?;
    text(&Value::Object(run))
}

fn text(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::invalid(format!("no JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_says_is_read_and_nothing_where_it_says_nothing() {
        let raw = br#"{"Env":["A=b"],"Cmd":null,"Entrypoint":["/e","x"],"WorkingDir":"/w","User":"1:2",
            "StopSignal":"SIGINT","Volumes":{"/v":{}},"ExposedPorts":{"80/tcp":{}},"Labels":{"k":"v"},
            "Healthcheck":{"Test":["NONE"]}}"#;
        let config: RunConfig = parse(raw, "it").unwrap();
        assert_eq!((config.env, config.cmd), (vec!["A=b".to_owned()], Vec::new()));
        assert_eq!(
            (&config.entrypoint[..], &config.workdir[..]),
            (&["/e".to_owned(), "x".to_owned()][..], "/w")
        );
        assert_eq!((&config.user[..], &config.stop_signal[..]), ("1:2", "SIGINT"));
        assert_eq!((&config.volumes[0][..], &config.exposed_ports[0][..]), ("/v", "80/tcp"));
        assert_eq!(config.labels["k"], "v");
        assert_eq!(parse::<RunConfig>(b"{}", "it").unwrap(), RunConfig::default());
        assert!(run_of(b"[]").unwrap() == b"{}" && run_of(b"x").is_err());
    }
}
