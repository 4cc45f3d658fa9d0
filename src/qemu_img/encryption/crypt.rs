//! Encryption as options say it: the secret that opens an image, how a new one is encrypted, and what
//! `info` tells of it.

use std::time::Duration;

use serde_json::{Map, Value, json};
use vdisk::luks::{Hash, Header, NO_SLOT, Options, Passphrase, SLOTS, Spec};
use vdisk::qcow2::{self, Encryption, Method};

use crate::qemu_img::encryption::secret;
use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::chosen::Chosen;

/// How a qcow2 header says that its data are encrypted.
const METHODS: [&str; 3] = ["", "aes", "luks"];

/// What is said of a wrong passphrase.
const WRONG: &str = "Invalid password, cannot unlock any keyslot";

/// The passphrase for a qcow2 image that the user named; `None` for one that is not encrypted, and
/// where its header is all that is `looked` at.
pub fn of_qcow2(
    source: &Source,
    header: &qcow2::Header,
    looked: bool,
) -> Outcome<Option<Passphrase>> {
    let method = METHODS.get(header.crypt_method as usize).copied().unwrap_or_default();
    match &source.key.format {
        Some(said) if method.is_empty() => {
            return Err(Fail::new(format!(
                "No encryption in image header, but options specified format '{said}'"
            )));
        }
        Some(said) if said != method => {
            return Err(Fail::new(format!(
                "Header reported '{method}' encryption format but options specify '{said}'"
            )));
        }
        _ if method.is_empty() || looked => return Ok(None),
        _ => {}
    }
    needed(source.key.secret.as_deref(), "encrypt.").map(Some)
}

/// The passphrase for a LUKS image; as [`of_qcow2`].
pub fn of_luks(source: &Source, looked: bool) -> Outcome<Option<Passphrase>> {
    if looked {
        return Ok(None);
    }
    needed(source.key.secret.as_deref(), "").map(Some)
}

/// What is missing where a layer that nobody gave a secret for is encrypted.
pub fn locked(format: &str) -> Fail {
    needed_for(if format == "luks" { "" } else { "encrypt." })
}

fn needed(secret: Option<&str>, prefix: &str) -> Outcome<Passphrase> {
    secret::lookup(secret.ok_or_else(|| needed_for(prefix))?)
}

fn needed_for(prefix: &str) -> Fail {
    Fail::new(format!("Parameter '{prefix}key-secret' is required for cipher"))
}

/// Why an image could not be opened, in the words for wrong passphrases where it is one.
pub fn open_failed(error: &vdisk::Error) -> Fail {
    Fail::new(if error.message() == NO_SLOT { WRONG.to_owned() } else { reason(error) })
}

/// How a new qcow2 image is encrypted.
pub fn for_qcow2(chosen: &Chosen) -> Outcome<Option<Encryption>> {
    const PREFIX: &str = "encrypt.";
    let format = chosen.text("encrypt.format");
    if chosen.has("encryption") && format.is_some() {
        return Err(Fail::new(
            "'encrypt.format' and its alias 'encryption' can't be used at the same time",
        ));
    }
    let old = chosen.switch("encryption").unwrap_or(false).then_some("aes");
    let Some(format) = format.or(old) else {
        return match chosen.given_with(PREFIX).next() {
            Some(_) => Err(Fail::new("Parameter 'encrypt.format' is missing")),
            None => Ok(None),
        };
    };
    let method = match format {
        "aes" => {
            let allowed = ["encrypt.format", "encrypt.key-secret"];
            if let Some(other) = chosen.given_with(PREFIX).find(|name| !allowed.contains(name)) {
                return Err(Fail::new(format!("Parameter '{other}' is unexpected")));
            }
            Method::Aes
        }
        "luks" => Method::Luks(luks_options(chosen, PREFIX)?),
        other => {
            return Err(Fail::new(format!("Parameter 'format' does not accept value '{other}'")));
        }
    };
    let passphrase = needed(chosen.text("encrypt.key-secret"), PREFIX)?;
    Ok(Some(Encryption { passphrase, method }))
}

/// How a new LUKS image is encrypted.
pub fn for_luks(chosen: &Chosen) -> Outcome<(Passphrase, Options)> {
    let options = luks_options(chosen, "")?;
    Ok((needed(chosen.text("key-secret"), "")?, options))
}

/// The cipher, hash and time of a new LUKS header; their names begin with `prefix`.
fn luks_options(chosen: &Chosen, prefix: &str) -> Outcome<Options> {
    let get = |name: &str, known: &[&str]| match chosen.text(&format!("{prefix}{name}")) {
        Some(value) if !known.contains(&value) => {
            Err(Fail::new(format!("Parameter '{name}' does not accept value '{value}'")))
        }
        value => Ok(value.map(str::to_owned)),
    };
    let cipher = get("cipher-alg", &CIPHERS)?.unwrap_or_else(|| "aes-256".to_owned());
    let mode = get("cipher-mode", &["ecb", "cbc", "xts", "ctr"])?;
    let mode = mode.unwrap_or_else(|| "xts".to_owned());
    let vector = get("ivgen-alg", &["plain", "plain64", "essiv"])?;
    let vector_hash = get("ivgen-hash-alg", &HASHES)?;
    let hash = get("hash-alg", &HASHES)?.unwrap_or_else(|| "sha256".to_owned());
    let vector = match vector.as_deref() {
        Some("essiv") => format!("essiv:{}", vector_hash.as_deref().unwrap_or("sha256")),
        other => other.unwrap_or("plain64").to_owned(),
    };
    let unsupported = |what: &str| Fail::new(format!("Algorithm '{what}' not supported"));
    let (name, bits) = cipher.split_once('-').ok_or_else(|| unsupported(&cipher))?;
    let bytes = bits.parse::<u32>().map_err(|_| unsupported(&cipher))? / 8;
    let bytes = if mode == "xts" { bytes * 2 } else { bytes };
    let spec = Spec::parse(name, &format!("{mode}-{vector}"), bytes)
        .map_err(|_| unsupported(&format!("{cipher}-{mode}-{vector}")))?;
    let hash = Hash::parse(&hash).map_err(|_| unsupported(&hash))?;
    // 0 is the same as not to say it.
    let time = chosen.number(&format!("{prefix}iter-time")).filter(|t| *t > 0);
    let default = Options::default();
    Ok(Options { spec, hash, iter_time: time.map_or(default.iter_time, Duration::from_millis) })
}

/// What LUKS options may name; not all of it is supported.
const CIPHERS: [&str; 13] = [
    "aes-128",
    "aes-192",
    "aes-256",
    "des",
    "3des",
    "cast5-128",
    "serpent-128",
    "serpent-192",
    "serpent-256",
    "twofish-128",
    "twofish-192",
    "twofish-256",
    "sm4",
];
const HASHES: [&str; 8] =
    ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"];

/// What `info` tells of a LUKS header.
pub fn describe(header: &Header) -> Map<String, Value> {
    let (cipher, mode) = header.spec().names();
    let (mode, vector) = mode.split_once('-').unwrap_or((mode, ""));
    let (vector, vector_hash) = vector.split_once(':').unwrap_or((vector, ""));
    let keys = if mode == "xts" { 2 } else { 1 };
    let bits = header.spec().key_len() * 8 / keys;
    let slots = (0..SLOTS).filter_map(|index| header.slot(index)).map(|slot| match slot {
        (Some(rounds), stripes, offset) => {
            json!({ "active": true, "iters": rounds, "stripes": stripes, "key-offset": offset })
        }
        (None, _, offset) => json!({ "active": false, "key-offset": offset }),
    });
    let all = json!({
        "ivgen-alg": vector,
        "detached-header": header.payload_offset() == 0,
        "hash-alg": header.hash().name(),
        "cipher-alg": format!("{cipher}-{bits}"),
        "uuid": header.uuid(),
        "cipher-mode": mode,
        "slots": slots.collect::<Vec<_>>(),
        "payload-offset": header.payload_offset(),
        "master-key-iters": header.digest_iterations(),
    });
    let mut map = all.as_object().cloned().unwrap_or_default();
    if !vector_hash.is_empty() {
        map.insert("ivgen-hash-alg".to_owned(), json!(vector_hash));
    }
    map
}

/// What `info` tells of the encryption of a qcow2 image; `None` for a plain one.
pub fn describe_qcow2(image: &qcow2::Image) -> Outcome<Option<Value>> {
    let method = METHODS.get(image.header().crypt_method as usize).copied().unwrap_or_default();
    if method.is_empty() {
        return Ok(None);
    }
    let header = image.luks_header().map_err(|e| Fail::new(reason(&e)))?;
    let mut map = header.as_ref().map(describe).unwrap_or_default();
    map.insert("format".to_owned(), json!(method));
    Ok(Some(Value::Object(map)))
}
