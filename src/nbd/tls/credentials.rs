//! Certificates and keys in a directory, by the names that QEMU and nbdkit give them: `ca-cert.pem`,
//! `ca-crl.pem`, and `server-` or `client-` with `cert.pem` and `key.pem`. All are PEM (RFC 7468).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{
    Resumption, WebPkiServerVerifier, danger, verify_server_cert_signed_by_trust_anchor,
};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::{
    NoServerSessionStorage, ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, ServerConfig,
    SignatureScheme,
};
use zeroize::Zeroizing;

use super::fault;
use crate::error::{Error, ErrorKind, Result};

const AUTHORITIES: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";
/// The longest file that is read.
const MAX_LEN: u64 = 4 << 20;

/// What a server proves itself with.
#[derive(Clone)]
pub struct ServerCredentials(Arc<ServerConfig>);

impl ServerCredentials {
    /// Reads `server-cert.pem` and `server-key.pem` in `dir`. With `verify_peer` clients have to show a
    /// certificate of one of the authorities in `ca-cert.pem` that `ca-crl.pem`, if there is one, does
    /// not revoke.
    ///
    /// # Errors
    /// Those of the files; [`ErrorKind::Invalid`] where they are no certificates and keys, or do not
    /// belong together, or where the server's own certificate is none that clients would take.
    pub fn load(dir: &Path, verify_peer: bool) -> Result<ServerCredentials> {
        let dir = Directory(dir);
        let provider = provider();
        let (chain, key) = dir.identity("server")?;
        let authorities = match dir.authorities() {
            Err(e) if e.kind() == ErrorKind::NotFound && !verify_peer => None,
            found => Some(Arc::new(found?)),
        };
        if let Some(authorities) = &authorities {
            check_own(&dir, &chain, authorities, &provider)?;
        }
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().map_err(unusable)?;
        let builder = match authorities.filter(|_| verify_peer) {
            Some(authorities) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(authorities, provider);
                let verifier = verifier.with_crls(dir.revoked()?);
                let verifier = verifier.allow_unknown_revocation_status();
                let made = verifier.enforce_revocation_expiration().build();
                builder.with_client_cert_verifier(made.map_err(|e| dir.no_list(e))?)
            }
            None => builder.with_no_client_auth(),
        };
        let made = builder.with_single_cert(chain, key);
        let mut config = made.map_err(|e| dir.refuse("server-key.pem", e))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(ServerCredentials(Arc::new(config)))
    }

    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.0.clone()
    }
}

/// What a client checks a server by, and proves itself with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCredentials {
    /// The directory with `ca-cert.pem`, `ca-crl.pem` where some certificates were revoked, and where
    /// servers want to know their clients `client-cert.pem` and `client-key.pem`.
    pub dir: PathBuf,
    /// Whether the server has to be the one that it should be. Without that what is said is hidden
    /// from those who only listen, and from nobody else.
    pub verify_peer: bool,
}

impl ClientCredentials {
    /// Reads the files.
    ///
    /// # Errors
    /// Those of the files; [`ErrorKind::Invalid`] where they are no certificates and keys, or do not
    /// belong together.
    pub fn check(&self) -> Result<()> {
        self.config().map(|_| ())
    }

    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>> {
        let dir = Directory(&self.dir);
        let provider = provider();
        let authorities = Arc::new(dir.authorities()?);
        let verifier = WebPkiServerVerifier::builder_with_provider(authorities, provider.clone());
        let verifier = verifier.with_crls(dir.revoked()?).allow_unknown_revocation_status();
        let made = verifier.enforce_revocation_expiration().build();
        let verifier = made.map_err(|e| dir.no_list(e))?;
        let builder = ClientConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().map_err(unusable)?;
        let builder = match self.verify_peer {
            true => builder.with_webpki_verifier(verifier),
            false => {
                let anybody = Arc::new(Anybody(provider));
                builder.dangerous().with_custom_certificate_verifier(anybody)
            }
        };
        let has = |name| dir.0.join(name).exists();
        let mut config = match has("client-cert.pem") || has("client-key.pem") {
            true => {
                let (chain, key) = dir.identity("client")?;
                let made = builder.with_client_auth_cert(chain, key);
                made.map_err(|e| dir.refuse("client-key.pem", e))?
            }
            false => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn unusable(e: TlsError) -> Error {
    Error::invalid(format!("TLS cannot be used: {e}"))
}

/// Refuses a server's certificate that no client would take: better now than at each of them.
fn check_own(
    dir: &Directory<'_>,
    chain: &[CertificateDer<'_>],
    authorities: &RootCertStore,
    provider: &CryptoProvider,
) -> Result<()> {
    let [own, between @ ..] = chain else { return Ok(()) };
    let all = provider.signature_verification_algorithms.all;
    let checked = ParsedCertificate::try_from(own).and_then(|own| {
        verify_server_cert_signed_by_trust_anchor(&own, authorities, between, UnixTime::now(), all)
    });
    checked.map_err(|e| {
        let why = match &e {
            TlsError::InvalidCertificate(why) => fault(why),
            other => format!("cannot be used: {other}"),
        };
        Error::invalid(format!("the certificate {why}")).at_path(dir.0.join("server-cert.pem"))
    })
}

/// A directory with the files.
struct Directory<'a>(&'a Path);

impl Directory<'_> {
    fn refuse(&self, name: &str, why: impl std::fmt::Display) -> Error {
        Error::invalid(format!("cannot be used: {why}")).at_path(self.0.join(name))
    }

    fn no_list(&self, why: VerifierBuilderError) -> Error {
        let text = match why {
            VerifierBuilderError::InvalidCrl(why) => {
                format!("it is no revocation list of X.509's version 2: {why:?}")
            }
            other => other.to_string(),
        };
        self.refuse(REVOKED, text)
    }

    /// A file's bytes, which may be a key.
    fn read(&self, name: &str) -> Result<Zeroizing<Vec<u8>>> {
        let path = self.0.join(name);
        let read = || -> io::Result<Zeroizing<Vec<u8>>> {
            let file = File::open(&path)?;
            // Room for all of it: what grows leaves copies behind.
            let len = file.metadata()?.len().min(MAX_LEN);
            let mut bytes = Zeroizing::new(Vec::with_capacity(len as usize + 1));
            file.take(MAX_LEN + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|e| Error::io("cannot be read", e).at_path(&path))?;
        if bytes.len() as u64 > MAX_LEN {
            return Err(self.refuse(name, "it is longer than any certificate or key"));
        }
        Ok(bytes)
    }

    /// All parts of one kind in a file.
    fn parts<T: PemObject>(&self, name: &str) -> Result<Vec<T>> {
        let bytes = self.read(name)?;
        let parts: std::result::Result<Vec<T>, pem::Error> = T::pem_slice_iter(&bytes).collect();
        parts.map_err(|e| self.refuse(name, e))
    }

    fn authorities(&self) -> Result<RootCertStore> {
        let mut all = RootCertStore::empty();
        for one in self.parts(AUTHORITIES)? {
            all.add(one).map_err(|e| self.refuse(AUTHORITIES, e))?;
        }
        match all.is_empty() {
            true => Err(self.refuse(AUTHORITIES, "there is no certificate in it")),
            false => Ok(all),
        }
    }

    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        match self.parts(REVOKED) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Ok(lists) if lists.is_empty() => Err(self.refuse(REVOKED, "there is no list in it")),
            found => found,
        }
    }

    /// A certificate with those between it and the authority, and its key.
    fn identity(
        &self,
        whose: &str,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let name = format!("{whose}-cert.pem");
        let chain: Vec<CertificateDer<'static>> = self.parts(&name)?;
        if chain.is_empty() {
            return Err(self.refuse(&name, "there is no certificate in it"));
        }
        let name = format!("{whose}-key.pem");
        let bytes = self.read(&name)?;
        let is_encrypted = bytes.windows(9).any(|part| part == b"ENCRYPTED");
        let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|e| match e {
            _ if is_encrypted => {
                let why =
                    "the key is encrypted; openssl pkey -in FILE -out FILE2 makes a plain one";
                self.refuse(&name, why)
            }
            pem::Error::NoItemsFound => self.refuse(&name, "there is no private key in it"),
            e => self.refuse(&name, e),
        })?;
        Ok((chain, key))
    }
}

/// Takes any server that has the key to the certificate that it shows.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<danger::ServerCertVerified, TlsError> {
        Ok(danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<danger::HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<danger::HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
