//! A disk for other programs.

use std::path::Path;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::error::Result;
use crate::serve::nbd::{Contexts, Export, Server, Tls};
use crate::serve::socket::Listener;

/// A server of NBD for one disk. It ends when it is [stopped](NbdServer::stop) or dropped.
pub struct NbdServer(Server);

impl NbdServer {
    /// Serves `disk` under the name `export` at a new socket at `path`, which only its owner can use.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where something else has that name.
    pub fn start(
        disk: Arc<dyn BlockDevice>,
        export: &str,
        path: impl AsRef<Path>,
    ) -> Result<NbdServer> {
        let listener = Listener::unix(path.as_ref())?;
        let export = Export {
            device: disk,
            name: export.to_owned(),
            description: String::new(),
            contexts: Contexts::default(),
        };
        Server::start(export, listener, Tls::Off).map(NbdServer)
    }

    /// Takes no more requests, answers those that are under way, and makes all that was written durable.
    ///
    /// # Errors
    /// What could not be made durable.
    pub fn stop(self) -> Result<()> {
        self.0.stop()
    }
}

impl std::fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdServer").finish_non_exhaustive()
    }
}
