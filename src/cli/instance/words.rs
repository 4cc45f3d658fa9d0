//! The words of `vdisk run`'s options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use vdisk::container::Volume;

use crate::cli::terminal::size;

pub fn memory(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        // Below, the container's own first steps would not fit.
        bytes if bytes < 4 << 20 => Err("must be at least 4M".into()),
        bytes => Ok(bytes),
    }
}

pub fn rate(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes < 4096 => Err("must be at least 4K a second".into()),
        bytes => Ok(bytes),
    }
}

pub fn milli_cpus(text: &str) -> Result<u64, String> {
    let cpus: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    // The kernel's shortest quota, a millisecond in a period of 100, and more than any host has.
    if (0.01..=65536.0).contains(&cpus) {
        Ok((cpus * 1000.0).round() as u64)
    } else {
        Err("must be from 0.01 to 65536".into())
    }
}

pub fn variable() -> impl clap::builder::TypedValueParser<Value = (OsString, OsString)> {
    use clap::builder::TypedValueParser as _;
    clap::builder::OsStringValueParser::new().try_map(|text| {
        let bytes = text.as_bytes();
        let (name, value) = match bytes.iter().position(|&byte| byte == b'=') {
            Some(at) => (&bytes[..at], OsString::from_vec(bytes[at + 1..].to_vec())),
            None => (bytes, std::env::var_os(&text).unwrap_or_default()),
        };
        match name {
            [] => Err("a variable needs a name"),
            name => Ok((OsStr::from_bytes(name).to_owned(), value)),
        }
    })
}

/// `SOURCE:DIR[:ro|:rw]`; the last colons count, so that a source may have some.
pub fn volume() -> impl clap::builder::TypedValueParser<Value = Volume> {
    use clap::builder::TypedValueParser as _;
    clap::builder::OsStringValueParser::new().try_map(|text| split_volume(&text))
}

fn split_volume(text: &OsStr) -> Result<Volume, String> {
    let bytes = text.as_bytes();
    let (bytes, read_only) = match bytes.rsplitn(2, |&byte| byte == b':').collect::<Vec<_>>()[..] {
        [b"ro", rest] => (rest, true),
        [b"rw", rest] => (rest, false),
        [word, rest] if rest.contains(&b':') && !word.contains(&b'/') => {
            let word = String::from_utf8_lossy(word);
            return Err(format!("{word:?} is no option of a volume: ro and rw are"));
        }
        _ => (bytes, false),
    };
    let [at, source] = bytes.rsplitn(2, |&byte| byte == b':').collect::<Vec<_>>()[..] else {
        return Err("must be SOURCE:DIR or SOURCE:DIR:ro".into());
    };
    let (source, at) = (OsStr::from_bytes(source), Path::new(OsStr::from_bytes(at)));
    if source.is_empty() || !at.is_absolute() {
        return Err("must be SOURCE:DIR, with DIR from the container's root on".into());
    }
    let source = std::path::absolute(source).map_err(|e| e.to_string())?;
    Ok(Volume { source, at: at.to_owned(), read_only })
}

/// What `--security-opt` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    NoNewPrivileges,
    Unfiltered,
}

pub fn security(text: &str) -> Result<Security, String> {
    match text.replace(':', "=").as_str() {
        "no-new-privileges" | "no-new-privileges=true" => Ok(Security::NoNewPrivileges),
        "seccomp=unconfined" => Ok(Security::Unfiltered),
        _ => Err("must be no-new-privileges or seccomp=unconfined".into()),
    }
}

/// Words of an entrypoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entrypoint(pub Vec<OsString>);

/// A program, or a JSON list of words.
pub fn entrypoint(text: &str) -> Result<Entrypoint, String> {
    if text.starts_with('[') {
        let words: Vec<String> = serde_json::from_str(text).map_err(|e| e.to_string())?;
        return Ok(Entrypoint(words.into_iter().map(OsString::from).collect()));
    }
    Ok(Entrypoint(Some(text).filter(|t| !t.is_empty()).map(OsString::from).into_iter().collect()))
}

pub fn hostname(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if !text.is_empty() && text.len() <= 64 && text.chars().all(fits) && !text.starts_with('-') {
        Ok(text.to_owned())
    } else {
        Err("must be at most 64 letters, digits, '-' and '.'".into())
    }
}

/// The disk's file name as a host name: `/srv/web_1.qcow2` is `web-1`.
pub fn hostname_of(disk: &Path) -> String {
    let stem = disk.file_stem().unwrap_or_default().to_string_lossy();
    let fits = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = stem.chars().map(fits).take(63).collect();
    match name.trim_matches('-') {
        "" => "vdisk".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_users_write_them() {
        assert_eq!(memory("64M"), Ok(64 << 20));
        assert!(memory("0").is_err() && memory("x").is_err());
        assert_eq!(milli_cpus("1.5"), Ok(1500));
        assert!(milli_cpus("0").is_err() && milli_cpus("nan").is_err());
        assert!(rate("10M").is_ok() && rate("1").is_err());
    }

    #[test]
    fn volumes_are_read_as_podman_reads_them() {
        let read = |text: &str| split_volume(OsStr::new(text));
        let volume = |source: &str, at: &str, read_only| {
            Ok(Volume { source: source.into(), at: at.into(), read_only })
        };
        assert_eq!(read("/a:/b"), volume("/a", "/b", false));
        assert_eq!(read("/a:/b:ro"), volume("/a", "/b", true));
        assert_eq!(read("/a:c:/b:rw"), volume("/a:c", "/b", false));
        for text in ["", "/a", ":/b", "/a:b", "/a:/b:z9"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_lends_its_name_to_the_host() {
        assert_eq!(hostname_of(Path::new("/srv/web_1.qcow2")), "web-1");
        assert_eq!(hostname_of(Path::new("/srv/...")), "vdisk");
    }
}
