//! `--object`: what a command line defines by an id, once, for all images it names.

use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::qemu_img::encryption::secret;
use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::names::credentials;
use crate::qemu_img::options::opts::{self, List};

/// Objects of other programs of QEMU's, which these commands have no use for.
const OTHERS: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "cryptodev-backend",
    "iothread",
    "main-loop",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "rng-builtin",
    "rng-egd",
    "rng-random",
    "secret_keyring",
    "throttle-group",
    "tls-cipher-suites",
];

/// The ids that are taken.
static IDS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Defines what one `--object` says.
pub fn define(text: &str) -> Outcome<()> {
    if text == "help" {
        println!("List of user creatable objects:\n  secret\n  tls-creds-x509");
        return Err(Fail::silent(0));
    }
    let list = match text.starts_with('{') {
        true => from_json(text)?,
        false => List::parse(text, Some("qom-type")),
    };
    let kind = list.get("qom-type").ok_or_else(|| missing("qom-type"))?;
    let define = match kind {
        "secret" => secret::define,
        "tls-creds-x509" => credentials::define,
        "tls-creds-anon" | "tls-creds-psk" => {
            let text =
                format!("{kind} is not supported here: tls-creds-x509 is, with certificates");
            return Err(Fail::new(text));
        }
        kind if OTHERS.contains(&kind) => {
            return Err(Fail::new(format!("invalid object type: {kind}")));
        }
        kind => {
            return Err(Fail::new(format!("Parameter 'qom-type' does not accept value '{kind}'")));
        }
    };
    if opts::asks_for_help(text) {
        println!("{kind} options:\n{}", help(kind));
        return Err(Fail::silent(0));
    }
    let id = list.get("id").ok_or_else(|| missing("id"))?;
    if !is_identifier(id) {
        return Err(Fail::new(
            "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', \
             '_', starting with a letter.",
        ));
    }
    let mut ids = IDS.lock().unwrap_or_else(PoisonError::into_inner);
    if ids.iter().any(|known| known == id) {
        return Err(Fail::new(format!(
            "attempt to add duplicate property '{id}' to object (type 'container')"
        )));
    }
    define(id, &list)?;
    ids.push(id.to_owned());
    Ok(())
}

fn help(kind: &str) -> &'static str {
    match kind {
        "secret" => {
            "  data=<string>\n  file=<string>\n  format=<QCryptoSecretFormat>\n  iv=<string>\n  \
             keyid=<string>"
        }
        _ => {
            "  dir=<string>\n  endpoint=<QCryptoTLSCredsEndpoint>\n  sanity-check=<bool>\n  \
             verify-peer=<bool>"
        }
    }
}

fn missing(name: &str) -> Fail {
    Fail::new(format!("Parameter '{name}' is missing"))
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

/// The members of a JSON object.
fn from_json(text: &str) -> Outcome<List> {
    let bad = || Fail::new("JSON parse error, invalid object");
    let value: Value = serde_json::from_str(text).map_err(|_| bad())?;
    let members = value.as_object().ok_or_else(bad)?.iter();
    let pairs = members.map(|(key, value)| match value {
        Value::String(text) => (key.clone(), text.clone()),
        Value::Bool(on) => (key.clone(), if *on { "on" } else { "off" }.to_owned()),
        other => (key.clone(), other.to_string()),
    });
    Ok(List(pairs.collect()))
}
