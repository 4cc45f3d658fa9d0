//! Where servers listen, and the way there.

use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::stream::{Socket, Stream};
use crate::error::{Error, ErrorKind, Result};

/// How long to wait for a server to accept a connection.
const CONNECT: Duration = Duration::from_secs(30);

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A host and a port.
    Tcp {
        /// Name or address.
        host: String,
        /// The number.
        port: String,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => path.display().fmt(f),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl Address {
    /// The name or address of the host, where there is one.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Address::Unix(_) => None,
            Address::Tcp { host, .. } => Some(bare(host)),
        }
    }

    /// Connects.
    pub(super) fn connect(&self) -> Result<Stream> {
        #[cfg(feature = "jail")]
        if let Some(socket) = super::beside::ask(self) {
            return socket.map(Stream::new);
        }
        self.reach(None).map(Stream::new)
    }

    /// Connects by this process itself; to a socket in the file system by its `full` path, where this stands
    /// in another directory than who has named it.
    pub(super) fn reach(&self, full: Option<&Path>) -> Result<Socket> {
        let failed = |e: io::Error| {
            let text = format!("Failed to connect to '{self}': {}", words(&e));
            Error::new(ErrorKind::Io, text)
        };
        let (host, port) = match self {
            Address::Unix(path) => {
                return UnixStream::connect(full.unwrap_or(path)).map(Socket::Unix).map_err(failed);
            }
            Address::Tcp { host, port } => (bare(host), port),
        };
        let unresolved = |why: &str| {
            let text = format!("address resolution failed for {self}: {why}");
            Error::new(ErrorKind::NotFound, text)
        };
        let port = port.parse::<u16>();
        let port = port.map_err(|_| unresolved("Servname not supported for ai_socktype"))?;
        let all = (host, port).to_socket_addrs().map_err(|e| {
            let text = words(&e);
            unresolved(text.rsplit(": ").next().unwrap_or_default())
        })?;
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in all {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(failed)?;
                    return Ok(Socket::Tcp(stream));
                }
                Err(e) => last = e,
            }
        }
        Err(failed(last))
    }
}

/// An address in brackets is one of IPv6.
fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

/// The words of a failed system call, without the error number.
fn words(error: &io::Error) -> String {
    let mut text = error.to_string();
    if let Some(at) = text.rfind(" (os error") {
        text.truncate(at);
    }
    text
}
