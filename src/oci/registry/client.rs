//! What is asked of a registry (OCI distribution specification): manifests and blobs, there and back.

use std::net::ToSocketAddrs as _;
use std::path::PathBuf;

use ureq::http::{HeaderName, Method, Response, StatusCode, header};
use ureq::{Body, Proxy};

use super::auth::{Credentials, credentials};
use super::http::{Asking, Content, Http, bounded, escaped, location, said};
use super::name::Name;
use crate::error::{Error, ErrorKind, Result};
use crate::oci::digest::Digest;
use crate::oci::manifest::MAX_JSON;

/// What is read as a manifest.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";
/// The port of https.
const HTTPS: u16 = 443;
const BYTES: &str = "application/octet-stream";

/// How registries are spoken to.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether only https is spoken, with certificates that the system vouches for.
    pub verify_tls: bool,
    /// The file of credentials; the usual ones without.
    pub auth_file: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Options {
        Options { verify_tls: true, auth_file: None }
    }
}

/// A repository in a registry, how it is spoken to, and who asks. Nobody was asked yet.
pub struct Access {
    name: Name,
    verify_tls: bool,
    known: Option<Credentials>,
}

impl Access {
    /// To the repository of `name`. Where credentials are a program's to tell, it is run.
    ///
    /// # Errors
    /// Where those who should know the credentials do not answer.
    pub fn to(name: &Name, options: &Options) -> Result<Access> {
        let known = credentials(name, options.auth_file.as_deref())?;
        Ok(Access { name: name.clone(), verify_tls: options.verify_tls, known })
    }

    /// What it is called there.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Has the host name looked up that is asked first, so that what the host's C library needs for names is
    /// loaded: a process that maps no programs cannot load it later.
    pub fn look_up(&self) {
        let _ = match Proxy::try_from_env() {
            Some(proxy) => (proxy.host(), proxy.port()).to_socket_addrs(),
            None => {
                let address = self.name.address();
                let has_port =
                    address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
                match has_port {
                    true => address.to_socket_addrs(),
                    false => (address, HTTPS).to_socket_addrs(),
                }
            }
        };
    }
}

/// A repository in a registry that answers.
pub struct Registry {
    http: Http,
    name: Name,
    scope: String,
}

/// A manifest, byte for byte, and its kind.
pub struct Manifest {
    /// Its bytes.
    pub raw: Vec<u8>,
    /// Its media type.
    pub media_type: String,
}

impl Registry {
    /// The one there; `writing` says that something is to be put there.
    pub fn new(access: &Access, writing: bool) -> Result<Registry> {
        let Access { name, verify_tls, known } = access;
        let http = Http::new(name.address(), *verify_tls, known.clone())?;
        let rights = if writing { "pull,push" } else { "pull" };
        let scope = format!("repository:{}:{rights}", name.path);
        Ok(Registry { http, name: name.clone(), scope })
    }

    /// The manifest that `reference`, a tag or a digest, leads to. What is named by digest is that.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn manifest(&self, reference: &str) -> Result<Manifest> {
        let url = self.http.url(&format!("{}/manifests/{reference}", self.name.path));
        let mut asking = Asking::new(Method::GET, url, &self.scope);
        asking.headers.push((header::ACCEPT, MANIFESTS.to_owned()));
        let mut answer = self.http.ask(&asking)?;
        let what = format!("{}/{}, {reference}", self.name.host, self.name.path);
        if answer.status() != StatusCode::OK {
            return Err(refused(&mut answer, &what));
        }
        let kind = answer.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let media_type = kind.unwrap_or_default().split(';').next().unwrap_or_default().to_owned();
        let raw = bounded(&mut answer, MAX_JSON)?;
        if let Ok(digest) = Digest::parse(reference)
            && Digest::of(&raw) != digest
        {
            return Err(Error::corrupt(format!(
                "{what}: holds something else than its digest says"
            )));
        }
        Ok(Manifest { raw, media_type })
    }

    /// A small blob.
    pub fn small(&self, digest: Digest) -> Result<Vec<u8>> {
        let mut answer = self.blob(digest, 0)?.0;
        let raw = bounded(&mut answer, MAX_JSON)?;
        match Digest::of(&raw) == digest {
            true => Ok(raw),
            false => {
                Err(Error::corrupt(format!("{digest} holds something else than its digest says")))
            }
        }
    }

    /// A blob from byte `from` on, and where what comes begins: a registry may not know how to begin in the middle.
    pub fn blob(&self, digest: Digest, from: u64) -> Result<(Response<Body>, u64)> {
        let url = self.http.url(&format!("{}/blobs/{digest}", self.name.path));
        let mut asking = Asking::new(Method::GET, url, &self.scope);
        if from > 0 {
            asking.headers.push((header::RANGE, format!("bytes={from}-")));
        }
        let mut answer = self.http.ask(&asking)?;
        match answer.status() {
            StatusCode::OK => Ok((answer, 0)),
            StatusCode::PARTIAL_CONTENT if from > 0 => {
                let range = answer.headers().get(header::CONTENT_RANGE);
                let range = range.and_then(|r| r.to_str().ok()).unwrap_or_default();
                match range.starts_with(&format!("bytes {from}-")) {
                    true => Ok((answer, from)),
                    false => Err(Error::corrupt(format!(
                        "{digest}: bytes from {from} on were asked for, and '{range}' came"
                    ))),
                }
            }
            _ => Err(refused(&mut answer, &digest.to_string())),
        }
    }

    /// Whether a blob is there.
    pub fn has(&self, digest: Digest) -> Result<bool> {
        let url = self.http.url(&format!("{}/blobs/{digest}", self.name.path));
        let mut answer = self.http.ask(&Asking::new(Method::HEAD, url, &self.scope))?;
        match answer.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(refused(&mut answer, &digest.to_string())),
        }
    }

    /// Takes a blob over from another repository of the registry; `false` where that does not give it.
    pub fn mount(&self, digest: Digest, from: &str) -> Result<bool> {
        let path = &self.name.path;
        let digest = escaped(&digest.to_string());
        let url =
            self.http.url(&format!("{path}/blobs/uploads/?mount={digest}&from={}", escaped(from)));
        let scope = format!("{} repository:{from}:pull", self.scope);
        let answer = match self.http.ask(&Asking::new(Method::POST, url.clone(), &scope)) {
            // Who may not read there sends it.
            Err(e) if e.kind() == ErrorKind::Denied => return Ok(false),
            answer => answer?,
        };
        if let (StatusCode::ACCEPTED, Some(to)) = (answer.status(), location(answer.headers())) {
            // An upload was begun in its place.
            let cancel = Asking::new(Method::DELETE, self.http.elsewhere(&url, &to)?, &self.scope);
            drop(self.http.ask(&cancel));
        }
        Ok(answer.status() == StatusCode::CREATED)
    }

    /// Sends a blob.
    pub fn send<'c>(&'c self, digest: Digest, content: &'c Content<'c>) -> Result<()> {
        let url = self.http.url(&format!("{}/blobs/uploads/", self.name.path));
        let mut answer = self.http.ask(&Asking::new(Method::POST, url.clone(), &self.scope))?;
        if answer.status() != StatusCode::ACCEPTED {
            return Err(refused(&mut answer, &digest.to_string()));
        }
        let to = location(answer.headers())
            .ok_or_else(|| Error::corrupt(format!("{url} does not say where to upload")))?;
        let to = self.http.elsewhere(&url, &to)?;
        let joint = if to.contains('?') { '&' } else { '?' };
        let to = format!("{to}{joint}digest={}", escaped(&digest.to_string()));
        let mut asking = Asking::new(Method::PUT, to, &self.scope);
        asking.headers.push((header::CONTENT_TYPE, BYTES.to_owned()));
        asking.content = Some(content);
        let mut answer = self.http.ask(&asking)?;
        match answer.status() {
            StatusCode::CREATED => Ok(()),
            _ => Err(refused(&mut answer, &digest.to_string())),
        }
    }

    /// Puts a manifest where `reference`, a tag or its digest, leads to.
    pub fn put_manifest(&self, reference: &str, manifest: &Manifest) -> Result<()> {
        let url = self.http.url(&format!("{}/manifests/{reference}", self.name.path));
        let mut asking = Asking::new(Method::PUT, url, &self.scope);
        let kind: HeaderName = header::CONTENT_TYPE;
        asking.headers.push((kind, manifest.media_type.clone()));
        let content = || -> Result<(Box<dyn std::io::Read>, u64)> {
            let raw = manifest.raw.clone();
            let len = raw.len() as u64;
            Ok((Box::new(std::io::Cursor::new(raw)), len))
        };
        asking.content = Some(&content);
        let mut answer = self.http.ask(&asking)?;
        match answer.status() {
            StatusCode::CREATED => Ok(()),
            _ => Err(refused(&mut answer, &self.name.to_string())),
        }
    }
}

fn refused(answer: &mut Response<Body>, what: &str) -> Error {
    let status = answer.status();
    let text = format!("{what}: the registry answers {status}{}", said(answer));
    let kind = match status.as_u16() {
        404 => ErrorKind::NotFound,
        401 | 403 => ErrorKind::Denied,
        429 => ErrorKind::Busy,
        400..=499 => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    };
    Error::new(kind, text)
}
