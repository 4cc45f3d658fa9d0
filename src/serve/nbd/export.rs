//! What is served, to whom, and the end of a connection.

use std::io;
use std::sync::Arc;

use super::contexts::Contexts;
use crate::block::BlockDevice;
use crate::nbd::tls::ServerCredentials;

/// A connection that is of no use any more: the client left, or said what none may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

impl From<io::Error> for Gone {
    fn from(_: io::Error) -> Gone {
        Gone
    }
}

/// What is served.
pub struct Export {
    /// The disk. Its size may change: whoever connects afterwards is told the new one.
    pub device: Arc<dyn BlockDevice>,
    /// The name that clients ask for; the default export has an empty one.
    pub name: String,
    /// Words for people.
    pub description: String,
    /// What more is told of the disk.
    pub contexts: Contexts,
}

/// Whether what clients say is hidden from others, and who they are known.
#[derive(Clone)]
pub enum Tls {
    /// No: whoever reaches the socket is served.
    Off,
    /// For those who ask for it.
    Offered(ServerCredentials),
    /// For all: who does not begin it is told nothing of the export.
    Required(ServerCredentials),
}
