//! TLS for connections: `credentials` reads certificates from a directory as `tls-creds-x509` of QEMU's
//! and `--tls-certificates` of nbdkit's take it, `channel` is the connection. It knows no NBD.
//!
//! Versions 1.2 and 1.3 (RFC 5246, RFC 8446), without resumption: each connection is checked anew.
//! rustls has no pre-shared keys that were agreed on elsewhere (its issue 174), so there are none here.

mod channel;
mod credentials;

pub(super) use channel::Channel;
pub(crate) use channel::Side;
pub use credentials::{ClientCredentials, ServerCredentials};

use std::io;

use rustls::{AlertDescription, CertificateError, Error as TlsError};

/// What went wrong with TLS, in words for people; `None` where `error` is another one.
pub(super) fn words(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<TlsError>()?;
    Some(match error {
        TlsError::InvalidCertificate(why) => format!("the other end's certificate {}", fault(why)),
        TlsError::NoCertificatesPresented => "the other end shows no certificate".to_owned(),
        TlsError::AlertReceived(AlertDescription::CertificateRequired) => {
            "the other end asks for a certificate: client-cert.pem and client-key.pem".to_owned()
        }
        TlsError::AlertReceived(alert) => format!("the other end ends TLS: {alert:?}"),
        other => format!("TLS fails: {other}"),
    })
}

/// What is wrong with a certificate.
fn fault(why: &CertificateError) -> String {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet".to_owned()
        }
        CertificateError::Revoked => "was revoked".to_owned(),
        // Authorities may have one name.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "is signed by none of the authorities in ca-cert.pem".to_owned()
        }
        CertificateError::ExpiredRevocationList
        | CertificateError::ExpiredRevocationListContext { .. } => {
            "cannot be checked: ca-crl.pem has expired".to_owned()
        }
        CertificateError::NotValidForNameContext { expected, .. } => {
            let name = expected.to_str();
            format!(
                "is not one for {name} (its subjectAltName; another can be said as tls-hostname)"
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for this purpose (its extendedKeyUsage)".to_owned()
        }
        other => format!("is refused: {other}"),
    }
}
