//! NBD as a client: a disk that another program serves, over a socket.
//!
//! [`wire`] knows the numbers and layouts of the protocol, [`handshake`] agrees on an export,
//! [`Client`] asks and understands [`replies`], [`Disk`] is the export as an image. Whatever a server
//! sends is checked and bounded before it is believed; every wait ends. The server is another room,
//! which speaks the same [`wire`] over the same [`stream`], with the same [`tls`]. Specification: "The
//! NBD protocol" (fixed newstyle, structured replies, metadata contexts, TLS).

mod address;
#[cfg(feature = "jail")]
mod beside;
mod client;
mod disk;
mod handshake;
mod replies;
pub(crate) mod stream;
pub mod tls;
pub(crate) mod wire;

#[cfg(test)]
mod tests;

pub use address::Address;
#[cfg(feature = "jail")]
pub use beside::connect_beside;
pub use client::{Client, Stretch};
pub use disk::Disk;

use rustls::pki_types::ServerName;

use crate::error::{Error, Result};
use tls::{ClientCredentials, Side};

/// Which export of a server, and what to ask about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where the server listens.
    pub address: Address,
    /// The export's name; the server's default one where none is given.
    pub export: Option<String>,
    /// The metadata context that is asked for instead of `base:allocation`: a hole is then what is
    /// marked in it.
    pub context: Option<String>,
    /// Nothing is said without TLS, where it is given.
    pub tls: Option<Tls>,
}

/// How a connection is made secure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// What the server is checked by.
    pub credentials: ClientCredentials,
    /// The name that the server's certificate has to be for; that of the address's host where none is
    /// given. A socket in the file system has no host.
    pub hostname: Option<String>,
}

impl Target {
    /// This end of TLS, where it is asked for.
    ///
    /// # Errors
    /// Those of the credentials; [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) where nobody says
    /// which name the server has.
    fn side(&self) -> Result<Option<Side>> {
        let Some(Tls { credentials, hostname }) = &self.tls else { return Ok(None) };
        let name = hostname.as_deref().or(self.address.host());
        let name = match credentials.verify_peer {
            true => name.ok_or_else(|| Error::invalid("No hostname for certificate validation"))?,
            // Nobody looks at it.
            false => "localhost",
        };
        let known = ServerName::try_from(name.to_owned());
        let known = known.map_err(|_| Error::invalid(format!("'{name}' is no name of a host")))?;
        Ok(Some(Side::Client(credentials.config()?, known)))
    }

    /// The target as an URI, without its context, and as QEMU shows it without TLS.
    pub fn uri(&self) -> String {
        match (&self.address, &self.export) {
            (Address::Unix(path), Some(name)) => {
                format!("nbd+unix:///{name}?socket={}", path.display())
            }
            (Address::Unix(path), None) => format!("nbd+unix://?socket={}", path.display()),
            (Address::Tcp { host, port }, Some(name)) => format!("nbd://{host}:{port}/{name}"),
            (Address::Tcp { host, port }, None) => format!("nbd://{host}:{port}"),
        }
    }
}
