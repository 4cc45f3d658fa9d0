//! `tls-creds-x509`: what NBD servers are checked by. A command line defines it once, for all servers
//! that it names.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vdisk::Error;
use vdisk::nbd::tls::{ClientCredentials, ServerCredentials};

use crate::qemu_img::encryption::secret;
use crate::qemu_img::fail::{Fail, Outcome, os_text, reason};
use crate::qemu_img::options::opts::List;

/// What the command line defined so far, by id; nothing to use where it is a server's.
static KNOWN: Mutex<Vec<(String, Option<ClientCredentials>)>> = Mutex::new(Vec::new());

fn known() -> MutexGuard<'static, Vec<(String, Option<ClientCredentials>)>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Defines the credentials called `id`, which no other object is.
pub fn define(id: &str, list: &List) -> Outcome<()> {
    const KNOWN: [&str; 6] = ["qom-type", "id", "dir", "endpoint", "verify-peer", "sanity-check"];
    if let Some(key @ ("priority" | "passwordid")) =
        list.0.iter().map(|(key, _)| key.as_str()).find(|key| !KNOWN.contains(key))
    {
        return Err(Fail::new(format!(
            "Parameter '{key}' of tls-creds-x509 is not supported here"
        )));
    }
    if let Some((key, _)) = list.0.iter().find(|(key, _)| !KNOWN.contains(&key.as_str())) {
        return Err(Fail::new(format!("Parameter '{key}' is unexpected")));
    }
    let verify_peer = is_on(list, "verify-peer")?;
    is_on(list, "sanity-check")?;
    let is_server = match list.get("endpoint") {
        None | Some("client") => false,
        Some("server") => true,
        Some(other) => {
            return Err(Fail::new(format!("Parameter 'endpoint' does not accept value '{other}'")));
        }
    };
    let dir = list.get("dir").map(PathBuf::from);
    let dir = dir.ok_or_else(|| Fail::new("Missing 'dir' property value"))?;
    let credentials = match is_server {
        true => {
            ServerCredentials::load(&dir, verify_peer).map_err(|e| unusable(&e))?;
            None
        }
        false => {
            let credentials = ClientCredentials { dir, verify_peer };
            credentials.check().map_err(|e| unusable(&e))?;
            Some(credentials)
        }
    };
    known().push((id.to_owned(), credentials));
    Ok(())
}

/// The credentials called `id`, which a client can use.
pub fn lookup(id: &str) -> Outcome<ClientCredentials> {
    let found = known().iter().find(|(known, _)| known == id).map(|(_, found)| found.clone());
    match found {
        Some(Some(credentials)) => Ok(credentials),
        Some(None) => Err(Fail::new("Expected TLS credentials for a client endpoint")),
        None if secret::is_known(id) => {
            Err(Fail::new(format!("Object with id '{id}' is not TLS credentials")))
        }
        None => Err(Fail::new(format!("No TLS credentials with id '{id}'"))),
    }
}

/// A switch that is on unless it is turned off.
fn is_on(list: &List, key: &str) -> Outcome<bool> {
    match list.get(key) {
        None | Some("on" | "yes" | "true" | "y") => Ok(true),
        Some("off" | "no" | "false" | "n") => Ok(false),
        Some(_) => Err(Fail::new(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

fn unusable(error: &Error) -> Fail {
    let path = error.path().map(|path| path.display().to_string()).unwrap_or_default();
    Fail::new(match error.raw_os_error() {
        Some(errno) => format!("Unable to access credentials {path}: {}", os_text(errno)),
        None => format!("Unable to use credentials {path}: {}", reason(error)),
    })
}
