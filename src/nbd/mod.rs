//! NBD as a client: a disk that another program serves, over a socket.
//!
//! [`wire`] knows the numbers and layouts of the protocol, [`handshake`] agrees on an export,
//! [`Client`] asks and understands [`replies`], [`Disk`] is the export as an image. Whatever a server
//! sends is checked and bounded before it is believed; every wait ends. The server is another room,
//! which speaks the same [`wire`] over the same [`stream`]. Specification: "The NBD
//! protocol" (fixed newstyle, structured replies, metadata contexts).

mod address;
mod client;
mod disk;
mod handshake;
mod replies;
pub(crate) mod stream;
#[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "the rest is the server's half"))]
pub(crate) mod wire;

#[cfg(test)]
mod tests;

pub use address::Address;
pub use client::{Client, Stretch};
pub use disk::Disk;

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
}

impl Target {
    /// The target as an URI, without its context.
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
