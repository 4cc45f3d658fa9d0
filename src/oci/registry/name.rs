//! What an image is called in a registry, as podman and docker read it: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`.

use std::fmt;

use crate::error::{Error, Result};
use crate::oci::digest::Digest;

/// What is meant where no registry is named.
const DEFAULT: &str = "docker.io";
/// Bytes of a name at most (OCI distribution specification, and its tags).
const LONGEST: usize = 255;
const LONGEST_TAG: usize = 128;

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The registry, with its port.
    pub host: String,
    /// The repository in it.
    pub path: String,
    /// The tag; `latest` where neither that nor a digest was named.
    pub tag: Option<String>,
    /// The digest of the manifest; it counts before a tag.
    pub digest: Option<Digest>,
}

impl Name {
    /// Reads a name. What begins with no registry is in docker.io, and there one of its own images where it has no path.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for what no registry would take.
    pub fn parse(text: &str) -> Result<Name> {
        let wrong = |why: &str| Error::invalid(format!("'{text}' names no image: {why}"));
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (rest, None),
        };
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((rest, tag)) if !tag.contains('/') => (rest, Some(tag)),
            _ => (rest, None),
        };
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) if is_host(host) => (host, path.to_owned()),
            _ => (DEFAULT, rest.to_owned()),
        };
        let host = if host == "index.docker.io" { DEFAULT } else { host };
        let path = match host == DEFAULT && !path.contains('/') {
            true => format!("library/{path}"),
            false => path,
        };
        let begins = host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[');
        if !begins || !host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.:[]_".contains(&b)) {
            return Err(wrong("the registry is none"));
        }
        if path.len() > LONGEST || !path.split('/').all(is_component) {
            return Err(wrong("a repository has small letters, digits, and . _ - between them"));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(wrong("the tag is none"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some("latest"),
            (tag, _) => tag,
        };
        Ok(Name { host: host.to_owned(), path, tag: tag.map(str::to_owned), digest })
    }

    /// How a registry is asked for it: by its digest, or its tag.
    pub fn reference(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.clone().unwrap_or_else(|| "latest".to_owned()),
        }
    }

    /// Where the registry is.
    pub(super) fn address(&self) -> &str {
        if self.host == DEFAULT { "registry-1.docker.io" } else { &self.host }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, tag) => write!(f, ":{}", tag.as_deref().unwrap_or("latest")),
        }
    }
}

fn is_host(part: &str) -> bool {
    part == "localhost" || part.contains(['.', ':'])
}

/// Small letters and digits, between which `.`, `_`, `__` or any number of `-` stand.
fn is_component(part: &str) -> bool {
    let small = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends = [part.as_bytes().first(), part.as_bytes().last()];
    let fine = part.bytes().all(|b| small(&b) || b"._-".contains(&b));
    let odd = ["..", "___", "._", "_.", ".-", "-.", "_-", "-_"];
    fine && ends.iter().all(|end| end.is_some_and(small)) && !odd.iter().any(|o| part.contains(o))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= LONGEST_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_other_programs_read_them() {
        let digest = Digest::of(b"x");
        for (text, full) in [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("docker.io/debian:12", "docker.io/library/debian:12".to_owned()),
            ("index.docker.io/a/b", "docker.io/a/b:latest".to_owned()),
            ("a/b:c", "docker.io/a/b:c".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            ("localhost:5000/a/b/c:1", "localhost:5000/a/b/c:1".to_owned()),
            ("docker://quay.io/x/y", "quay.io/x/y:latest".to_owned()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".to_owned()),
            (&format!("quay.io/x/y:1@{digest}"), format!("quay.io/x/y@{digest}")),
        ] {
            assert_eq!(Name::parse(text).unwrap().to_string(), full, "{text}");
        }
        assert_eq!(Name::parse("debian").unwrap().address(), "registry-1.docker.io");
        for bad in
            ["", "A", "a b", "a//b", "-a", "a:", "a:.x", "a@sha256:00", "../a", "a..b", "x.y/"]
        {
            assert!(Name::parse(bad).is_err(), "{bad}");
        }
    }
}
