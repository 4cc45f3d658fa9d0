//! Clients of NBD servers with TLS: QEMU's, libnbd's and the drop-in, and what they know.

use crate::certificates::{Authority, Wanted};
use crate::exports::ours;
use crate::host::{Done, Work};
use crate::require::{Need, have};

/// A server's and a client's.
pub const BOTH: [Wanted<'_>; 2] = [Wanted::SERVER, Wanted::CLIENT];

/// A test's directory with `disk.qcow2`, an empty disk of 64 MiB, and the directories `certs`, with all
/// that a server and a client need, and `other`, with the same of another authority.
pub fn with_certificates() -> (Work, Authority) {
    let work = Work::new();
    work.vdisk("create disk.qcow2 64M").succeeds();
    let authority = Authority::new(work.path("authority"));
    authority.fill(&work.path("certs"), &BOTH);
    Authority::new(work.path("another")).fill(&work.path("other"), &BOTH);
    (work, authority)
}

/// Whether all programs are there.
pub fn have_all() -> bool {
    [Need::Qemu, Need::Nbd, Need::Tls].into_iter().all(have)
}

/// Host, port and export of an URI.
pub fn parts(uri: &str) -> (&str, &str, &str) {
    let (_, rest) = uri.split_once("://").unwrap();
    let (server, export) = rest.split_once('/').unwrap();
    let (host, port) = server.rsplit_once(':').unwrap();
    (host, port, export)
}

/// What a program knows of a server, and is known by.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    /// The directory with certificates.
    pub dir: &'a str,
    /// Where it takes the server to be.
    pub host: &'a str,
    /// Which name the server has to prove, if it is another.
    pub hostname: Option<&'a str>,
}

impl<'a> Known<'a> {
    /// A client with the certificates in `dir`.
    pub fn by(dir: &'a str) -> Known<'a> {
        Known { dir, host: "localhost", hostname: None }
    }

    /// As QEMU's programs take it.
    pub fn options(self, uri: &str) -> String {
        let (_, port, export) = parts(uri);
        let hostname = self.hostname.map_or(String::new(), |name| format!(",tls-hostname={name}"));
        format!("driver=nbd,host={},port={port},export={export},tls-creds=t{hostname}", self.host)
    }

    /// The object for QEMU's programs.
    pub fn object(self) -> String {
        format!("--object tls-creds-x509,id=t,dir={},endpoint=client", self.dir)
    }

    /// As libnbd's programs and the drop-in take it.
    pub fn uri(self, work: &Work, uri: &str) -> String {
        let (_, port, export) = parts(uri);
        let dir = work.path(self.dir).display().to_string();
        let hostname = self.hostname.map_or(String::new(), |name| format!("&tls-hostname={name}"));
        format!("nbds://{}:{port}/{export}?tls-certificates={dir}{hostname}", self.host)
    }

    /// What each client makes of the server: QEMU's, libnbd's, and the drop-in in both manners.
    pub fn all(self, work: &Work, uri: &str) -> [Done; 4] {
        let qemu = format!("info {} --image-opts {}", self.object(), self.options(uri));
        [
            work.qemu_img(&qemu),
            work.run("nbdinfo", [self.uri(work, uri)]),
            ours(work, &qemu),
            ours(work, &format!("info {}", self.uri(work, uri))),
        ]
    }

    /// The same without libnbd: not all versions know of another name than the address's.
    pub fn all_with_hostname(self, work: &Work, uri: &str) -> [Done; 3] {
        let [qemu, _, options, uri] = self.all(work, uri);
        [qemu, options, uri]
    }
}
