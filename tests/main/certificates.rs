//! Certificates for tests, made by openssl(1): authorities, and what they sign for servers and clients.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Keys that are made in no time.
const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
const CONFIG: &str = "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\nserial=serial\n\
    default_md=sha256\npolicy=p\ncopy_extensions=copyall\nunique_subject=no\ncrlnumber=crlnumber\n\
    crl_extensions=crl\n[crl]\nauthorityKeyIdentifier=keyid\n[p]\ncommonName=supplied\n";

/// Who signs certificates. Its files are in a directory of its own.
pub struct Authority {
    dir: PathBuf,
}

/// A certificate to be made.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// `server` or `client`: who shows it.
    pub whose: &'a str,
    /// `subjectAltName`, as openssl takes it.
    pub names: &'a str,
    /// Whether it has had its day.
    pub expired: bool,
}

impl Wanted<'_> {
    /// One of a server on this host, by its name and its address.
    pub const SERVER: Wanted<'static> =
        Wanted { whose: "server", names: "DNS:localhost,IP:127.0.0.1", expired: false };
    /// One of a client.
    pub const CLIENT: Wanted<'static> =
        Wanted { whose: "client", names: "DNS:client", expired: false };
}

impl Authority {
    /// A new one in the directory `dir`, which is made.
    pub fn new(dir: PathBuf) -> Authority {
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("ca.conf"), CONFIG).unwrap();
        fs::write(dir.join("index.txt"), "").unwrap();
        fs::write(dir.join("crlnumber"), "01\n").unwrap();
        let authority = Authority { dir };
        let words = "-x509 -days 2 -subj /CN=authority -keyout ca-key.pem -out ca-cert.pem \
            -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign";
        authority.openssl(["req"].into_iter().chain(KEY).chain(words.split_whitespace()));
        authority
    }

    /// Puts `ca-cert.pem` and the certificates that are wanted into the directory `dir`, made where it
    /// is missing.
    pub fn fill(&self, dir: &Path, wanted: &[Wanted<'_>]) {
        fs::create_dir_all(dir).unwrap();
        fs::copy(self.dir.join("ca-cert.pem"), dir.join("ca-cert.pem")).unwrap();
        for wanted in wanted {
            self.sign(dir, *wanted);
        }
    }

    fn sign(&self, dir: &Path, Wanted { whose, names, expired }: Wanted<'_>) {
        let at = |name: &str| dir.join(format!("{whose}-{name}.pem")).display().to_string();
        let (key, cert) = (at("key"), at("cert"));
        let words = format!(
            "-subj /CN={whose} -out request.pem -addext subjectAltName={names} \
             -addext basicConstraints=critical,CA:FALSE -addext extendedKeyUsage={whose}Auth"
        );
        let words = words.split_whitespace().chain(["-keyout", &key]);
        self.openssl(["req"].into_iter().chain(KEY).chain(words));
        let time = match expired {
            true => "-startdate 20200101000000Z -enddate 20200102000000Z",
            false => "-days 2",
        };
        let words = "-batch -notext -create_serial -in request.pem";
        let words = words.split_whitespace().chain(time.split_whitespace());
        self.ca(words.chain(["-out", &cert]));
    }

    /// Puts a list that revokes a certificate into `ca-crl.pem` in the directory `dir`.
    pub fn revoke(&self, certificate: &Path, dir: &Path) {
        self.ca(["-revoke", &certificate.display().to_string()]);
        let list = dir.join("ca-crl.pem").display().to_string();
        self.ca(["-gencrl", "-crldays", "2", "-out", &list]);
    }

    fn ca<'a>(&self, words: impl IntoIterator<Item = &'a str>) {
        let own = "ca -config ca.conf -cert ca-cert.pem -keyfile ca-key.pem";
        self.openssl(own.split_whitespace().chain(words));
    }

    fn openssl<'a>(&self, words: impl IntoIterator<Item = &'a str>) {
        let mut command = Command::new("openssl");
        command.args(words).current_dir(&self.dir).stdin(Stdio::null());
        let done = command.output().unwrap();
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
}
