//! An instance without a keeper: what runs in the foreground, and is forgotten when it ends. The process that runs it is
//! found, asked and told of as a keeper is; it keeps no log and starts nothing again.

use std::path::PathBuf;
use std::sync::Arc;

use super::keeper::{Shared, Way};
use super::link::Switches;
use super::place::{self, Claim};
use super::record::{Phase, Record, now};
use super::serve::Orders;
use crate::control::Server;
use crate::error::Result;

/// What this process runs.
pub struct Alone {
    shared: Arc<Shared>,
    server: Option<Server>,
}

impl Alone {
    /// Lets others find and steer what `record` says. Threads are started.
    pub fn serve(record: Record, switches: Arc<dyn Switches>) -> Result<Alone> {
        let turn = Some(record.pid);
        let claim = Claim::new(Record { plain: true, remove: true, turn, ..record })?;
        let name = place::socket(claim.record());
        let shared = Arc::new(Shared::of(claim, Some(Way::Here(switches))));
        let mut alone = Alone { shared, server: None };
        let server = Server::listen(&name, Arc::new(Orders(Arc::clone(&alone.shared))));
        alone.server = Some(server.inspect_err(|_| alone.forget())?);
        Ok(alone)
    }

    /// Its record's directory.
    pub fn dir(&self) -> Result<PathBuf> {
        place::of(&self.shared.record())
    }

    /// What writes down that it has started.
    pub fn started(&self) -> impl Fn() + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || {
            // What is not listed runs all the same.
            let _ = shared.note(|record| {
                record.phase = Phase::Running;
                record.started = Some(now());
            });
        }
    }

    /// It has ended, with this exit status: leaves nothing of it, and tells who waits.
    pub fn end(mut self, status: u8) {
        let _ = self.shared.finish(status, false);
        if let Some(server) = self.server.take() {
            server.end(&Ok(()));
        }
    }

    fn forget(&self) {
        let _ = self.shared.finish(1, false);
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // One that failed: nobody is to find it.
        if self.server.take().is_some() {
            self.forget();
        }
    }
}
