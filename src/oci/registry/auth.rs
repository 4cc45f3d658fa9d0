//! Credentials for registries, from the files that podman and docker keep them in (containers-auth.json(5)).
//!
//! Of the files that there are, the first one that knows the registry counts. Where a file leaves them to a helper
//! program, that is asked. Nothing is written.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::name::Name;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of such a file at most.
const MAX_FILE: u64 = 4 << 20;
/// What some write where the user is to be named whose secret is a token.
const TOKEN_USER: &str = "<token>";

/// Who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user and a password.
    User(String, String),
    /// A token that others are got for.
    Identity(String),
}

/// The credentials for an image; `None` where nobody knows any. `file` takes the place of the usual files.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a file that is none; [`ErrorKind::NotFound`] for one that was named and is not there, and
/// for a helper program that is not.
pub fn credentials(name: &Name, file: Option<&Path>) -> Result<Option<Credentials>> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = file.map(Path::to_owned).or_else(|| set("REGISTRY_AUTH_FILE")) {
        let raw = read(&path)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "is to hold credentials, and is not there")
                .at_path(&path)
        })?;
        return find(&raw, name).map_err(|e| e.at_path(&path));
    }
    for path in usual(&set) {
        if let Some(raw) = read(&path)?
            && let Some(found) = find(&raw, name).map_err(|e| e.at_path(&path))?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn usual(set: &dyn Fn(&'static str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = set("HOME");
    let user = nix::unistd::getuid();
    let runtime = match set("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("containers/auth.json"),
        None => PathBuf::from(format!("/run/containers/{user}/auth.json")),
    };
    let config = set("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
    let docker = set("DOCKER_CONFIG").or_else(|| Some(home?.join(".docker")));
    let mut all = vec![runtime];
    all.extend(config.map(|dir| dir.join("containers/auth.json")));
    all.extend(docker.map(|dir| dir.join("config.json")));
    all
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    use std::io::Read;
    let failed = |e| Error::io("cannot be read", e).at_path(path);
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let mut raw = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut raw).map_err(failed)?;
    Ok(Some(raw))
}

/// What a file says about an image: the longest part of its name that the file knows counts.
fn find(raw: &[u8], name: &Name) -> Result<Option<Credentials>> {
    let file: Value = serde_json::from_slice(raw)
        .map_err(|e| Error::corrupt(format!("credentials cannot be read: {e}")))?;
    let helper = file.get("credHelpers").and_then(|all| all.get(&name.host));
    if let Some(helper) = helper.and_then(Value::as_str) {
        return ask(helper, &server(&name.host));
    }
    if let Some(auths) = file.get("auths").and_then(Value::as_object) {
        for key in keys(name) {
            let entry = auths.iter().find(|(known, _)| normal(known) == key);
            if let Some(found) = entry.map(|(_, entry)| said(entry)).transpose()?.flatten() {
                return Ok(Some(found));
            }
        }
    }
    match file.get("credsStore").and_then(Value::as_str) {
        Some(helper) if !helper.is_empty() => ask(helper, &server(&name.host)),
        _ => Ok(None),
    }
}

/// `HOST/a/b`, `HOST/a`, `HOST`.
fn keys(name: &Name) -> Vec<String> {
    let full = format!("{}/{}", name.host, name.path);
    let cut = |key: &String| key.rfind('/').and_then(|at| key.get(..at)).map(str::to_owned);
    std::iter::successors(Some(full), cut).collect()
}

/// Docker writes some as addresses.
fn normal(key: &str) -> String {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let host = match bare {
        Some(bare) => bare.split('/').next().unwrap_or(bare),
        None => key.strip_suffix('/').unwrap_or(key),
    };
    match host {
        "index.docker.io" | "registry-1.docker.io" | "index.docker.io/v1" => "docker.io".to_owned(),
        host => host.to_owned(),
    }
}

fn server(host: &str) -> String {
    match host {
        "docker.io" => "https://index.docker.io/v1/".to_owned(),
        host => host.to_owned(),
    }
}

fn said(entry: &Value) -> Result<Option<Credentials>> {
    let word = |key: &str| entry.get(key).and_then(Value::as_str).filter(|w| !w.is_empty());
    if let Some(token) = word("identitytoken") {
        return Ok(Some(Credentials::Identity(token.to_owned())));
    }
    if let (Some(user), Some(password)) = (word("username"), word("password")) {
        return Ok(Some(Credentials::User(user.to_owned(), password.to_owned())));
    }
    let Some(auth) = word("auth") else { return Ok(None) };
    let damaged = || Error::corrupt("an entry of credentials is no user and password in base64");
    let bytes = STANDARD.decode(auth.trim()).map_err(|_| damaged())?;
    let text = String::from_utf8(bytes).map_err(|_| damaged())?;
    let (user, password) = text.split_once(':').ok_or_else(damaged)?;
    // Docker fills with zeroes.
    let password = password.trim_end_matches('\0');
    Ok(Some(Credentials::User(user.to_owned(), password.to_owned())))
}

/// Asks `docker-credential-HELPER`.
fn ask(helper: &str, server: &str) -> Result<Option<Credentials>> {
    if helper.contains('/') {
        return Err(Error::invalid(format!("'{helper}' is no helper for credentials")));
    }
    let program = format!("docker-credential-{helper}");
    let failed = |e| Error::io(format!("{program}, which has the credentials, cannot be run"), e);
    let mut command = Command::new(&program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        // One that does not want to know says so by how it ends.
        let _ = input.write_all(server.as_bytes());
    }
    let done = child.wait_with_output().map_err(failed)?;
    if !done.status.success() {
        // That is how it says that it knows none.
        return Ok(None);
    }
    let answer: Value = serde_json::from_slice(&done.stdout)
        .map_err(|e| Error::corrupt(format!("what {program} says cannot be read: {e}")))?;
    let word = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (user, secret) = (word("Username"), word("Secret"));
    Ok(Some(match user == TOKEN_USER {
        true => Credentials::Identity(secret),
        false => Credentials::User(user, secret),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(raw: &str, name: &str) -> Option<String> {
        match find(raw.as_bytes(), &Name::parse(name).unwrap()).unwrap()? {
            Credentials::User(user, password) => Some(format!("{user}/{password}")),
            Credentials::Identity(token) => Some(token),
        }
    }

    #[test]
    fn the_longest_part_of_a_name_that_a_file_knows_counts() {
        let file = r#"{"auths": {
            "localhost:5000": {"auth": "YTpi"},
            "localhost:5000/team": {"username": "t", "password": "x"},
            "https://index.docker.io/v1/": {"auth": "ZDplOmY="},
            "quay.io": {"identitytoken": "tok", "auth": ""}
        }}"#;
        assert_eq!(user(file, "localhost:5000/a/b").unwrap(), "a/b");
        assert_eq!(user(file, "localhost:5000/team/b").unwrap(), "t/x");
        assert_eq!(user(file, "localhost:5000/teams/b").unwrap(), "a/b");
        assert_eq!(user(file, "debian").unwrap(), "d/e:f");
        assert_eq!(user(file, "quay.io/x/y").unwrap(), "tok");
        assert_eq!(user(file, "elsewhere.org/x"), None);
        let name = Name::parse("x.org/y").unwrap();
        assert!(find(br#"{"auths":{"x.org":{"auth":"!"}}}"#, &name).is_err());
        assert!(find(b"no json", &name).is_err());
    }

    #[test]
    fn a_helper_that_is_not_there_is_named() {
        let file = r#"{"credHelpers": {"x.org": "vdisk-has-none-such"}}"#;
        let error = find(file.as_bytes(), &Name::parse("x.org/y").unwrap()).err().unwrap();
        assert!(error.to_string().contains("docker-credential-vdisk-has-none-such"), "{error}");
    }
}
