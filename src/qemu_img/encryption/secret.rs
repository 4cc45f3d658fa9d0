//! Secrets that images are opened with. A command line defines them once, for all images it names.

use std::fs::File;
use std::io::Read as _;
use std::sync::{Mutex, MutexGuard};

use aes::Aes256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use cbc::cipher::block_padding::Pkcs7;
use cbc::cipher::{BlockModeDecrypt as _, KeyIvInit as _};
use vdisk::luks::Passphrase;
use zeroize::Zeroizing;

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::options::opts::List;

/// The longest secret, in bytes.
const MAX_LEN: u64 = 8 << 20;
/// What the command line defined so far, by id.
static SECRETS: Mutex<Vec<(String, Passphrase)>> = Mutex::new(Vec::new());

fn secrets() -> MutexGuard<'static, Vec<(String, Passphrase)>> {
    SECRETS.lock().unwrap_or_else(|e| e.into_inner())
}

/// Defines the secret called `id`, which no other is.
pub fn define(id: &str, list: &List) -> Outcome<()> {
    let value = Passphrase::new(value(list)?);
    secrets().push((id.to_owned(), value));
    Ok(())
}

/// Whether there is a secret called `id`.
pub fn is_known(id: &str) -> bool {
    secrets().iter().any(|(known, _)| known == id)
}

/// The secret called `id`, as the text that it must be.
pub fn lookup(id: &str) -> Outcome<Passphrase> {
    let found = find(id)?;
    if std::str::from_utf8(found.bytes()).is_err() {
        return Err(Fail::new(format!("Data from secret {id} is not valid UTF-8")));
    }
    Ok(found)
}

fn find(id: &str) -> Outcome<Passphrase> {
    let found = secrets().iter().find(|(known, _)| known == id).map(|(_, value)| value.clone());
    found.ok_or_else(|| Fail::new(format!("No secret with id '{id}'")))
}

/// The bytes that the options of a secret give or name.
fn value(list: &List) -> Outcome<Zeroizing<Vec<u8>>> {
    const KNOWN: [&str; 8] = ["qom-type", "id", "data", "file", "format", "keyid", "iv", "loaded"];
    if let Some((other, _)) = list.0.iter().find(|(key, _)| !KNOWN.contains(&key.as_str())) {
        return Err(Fail::new(format!("Parameter '{other}' is unexpected")));
    }
    let is_base64 = match list.get("format") {
        None | Some("raw") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(Fail::new(format!("Parameter 'format' does not accept value '{other}'")));
        }
    };
    let given = match (list.get("data"), list.get("file")) {
        (Some(_), Some(_)) => {
            return Err(Fail::new("'file' and 'data' are mutually exclusive"));
        }
        (None, None) => return Err(Fail::new("Either 'file' or 'data' must be provided")),
        (Some(data), None) => Zeroizing::new(data.as_bytes().to_vec()),
        (None, Some(file)) => from_file(file)?,
    };
    let given = if is_base64 { from_base64(&given)? } else { given };
    match list.get("keyid") {
        Some(key) => {
            let key = find(key)?;
            let iv = list.get("iv");
            let iv = iv.ok_or_else(|| Fail::new("IV is required to decrypt secret"))?;
            decrypt(&given, &key, iv)
        }
        None => Ok(given),
    }
}

fn from_file(path: &str) -> Outcome<Zeroizing<Vec<u8>>> {
    let failed = |e: std::io::Error| {
        let errno = e.raw_os_error().unwrap_or(nix::libc::EIO);
        Fail::new(format!(
            "Unable to read {path}: Failed to open file “{path}”: {}",
            crate::qemu_img::fail::os_text(errno)
        ))
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    File::open(path).map_err(failed)?.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(Fail::new(format!("Unable to read {path}: a secret has 8 MiB at most")));
    }
    Ok(bytes)
}

/// Base64, with or without padding, in lines or in one.
fn from_base64(text: &[u8]) -> Outcome<Zeroizing<Vec<u8>>> {
    let bad = || Fail::new("Base64 data contains invalid characters");
    let known = |b: &u8| b.is_ascii_alphanumeric() || b"+/=\r\n".contains(b);
    if !text.iter().all(known) {
        return Err(bad());
    }
    let digits = text.iter().copied().filter(|b| !b"=\r\n".contains(b));
    let digits = Zeroizing::new(digits.collect::<Vec<u8>>());
    STANDARD_NO_PAD.decode(&*digits).map(Zeroizing::new).map_err(|_| bad())
}

/// Secrets may come encrypted by another one: AES-256 in CBC mode.
fn decrypt(text: &[u8], key: &Passphrase, iv: &str) -> Outcome<Zeroizing<Vec<u8>>> {
    const BLOCK: usize = 16;
    let iv = from_base64(iv.as_bytes())?;
    let key = key.bytes();
    if key.len() != 32 {
        return Err(Fail::new("Key should be 32 bytes in length"));
    }
    if iv.len() != BLOCK {
        return Err(Fail::new(format!("IV should be {BLOCK} bytes in length not {}", iv.len())));
    }
    if !text.len().is_multiple_of(BLOCK) {
        let len = text.len();
        return Err(Fail::new(format!("Length {len} must be a multiple of block size {BLOCK}")));
    }
    let bad = || Fail::new("Incorrect number of padding bytes found on decrypted data");
    let cipher = cbc::Decryptor::<Aes256>::new_from_slices(key, &iv).map_err(|_| bad())?;
    let mut plain = Zeroizing::new(text.to_vec());
    let len = cipher.decrypt_padded::<Pkcs7>(&mut plain).map_err(|_| bad())?.len();
    plain.truncate(len);
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Outcome<Vec<u8>> {
        value(&List::parse(text, Some("qom-type"))).map(|v| v.to_vec())
    }

    #[test]
    fn secrets_are_given_or_named_plain_or_in_base64() {
        assert_eq!(read("secret,id=a,data=abc").unwrap(), b"abc");
        assert_eq!(read("secret,id=a,data=MTIzNDU2,format=base64").unwrap(), b"123456");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words");
        std::fs::write(&path, "MTIz\nNDU2\n").unwrap();
        let path = path.display();
        assert_eq!(read(&format!("secret,file={path},format=base64")).unwrap(), b"123456");
        for (bad, why) in [
            ("secret,id=a", "Either 'file' or 'data' must be provided"),
            ("secret,data=a,file=b", "'file' and 'data' are mutually exclusive"),
            ("secret,data=a,format=hex", "Parameter 'format' does not accept value 'hex'"),
            ("secret,data=a,colour=red", "Parameter 'colour' is unexpected"),
            ("secret,data=a*b,format=base64", "Base64 data contains invalid characters"),
        ] {
            assert_eq!(read(bad).unwrap_err().text(), why);
        }
    }

    #[test]
    fn a_secret_may_be_encrypted_by_another() {
        let master = "secret,format=base64,data=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        define("master-of-the-test", &List::parse(master, Some("qom-type"))).unwrap();
        // openssl enc -aes-256-cbc -K 0001..1f -iv 00..00, of "hunter2".
        let text = "secret,id=x,keyid=master-of-the-test,iv=AAAAAAAAAAAAAAAAAAAAAA==,\
                    format=base64,data=nMlq0khtTouaTDh6cQDvCA==";
        assert_eq!(read(text).unwrap(), b"hunter2");
    }
}
