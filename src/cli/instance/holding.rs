//! What a command that holds a disk adds to its control: who its user is, and how he is told.

use std::path::Path;
use std::sync::Arc;

use vdisk::chain::Chain;
use vdisk::change::live::{Live, Quiesce};
use vdisk::change::merge::Progress;
use vdisk::control::{self, Bound, Holder, Kind, Named, Request, Service};
use vdisk::{Error, ErrorKind, Result};

/// Makes the socket for commands about `chain`, the disk at `path`, which is written for `kind`; nothing
/// where its changes go elsewhere. It is not served yet: no thread is started.
pub fn bind(chain: &Arc<Chain>, path: &Path, kind: Arc<dyn Kind>) -> Result<Option<Bound>> {
    match Live::new(chain.clone(), path) {
        Ok(live) => {
            let bound = Holder::bind(live, kind)?;
            if let Some(dir) = control::elsewhere() {
                let text = "control sockets are here, since the usual directory cannot be used: commands \
                            find this disk's user only where TMPDIR is the same";
                eprintln!("vdisk: warning: {}: {text}", dir.display());
            }
            Ok(Some(bound))
        }
        Err(e) if matches!(e.kind(), ErrorKind::ReadOnly | ErrorKind::Invalid) => Ok(None),
        Err(e) => Err(e),
    }
}

/// A process that only says when it ends: nothing can be done to its disk.
pub struct Bystander;

impl Service for Bystander {
    fn holds(&self, _: Named) -> bool {
        false
    }

    fn serve(&self, _: &Request, _: &mut Progress<'_>) -> Result<serde_json::Value> {
        Err(Error::unsupported("nothing can be done to what is mounted here"))
    }
}

/// A disk that its user sees as a whole, and whose file systems only he knows.
pub struct Whole {
    doing: String,
    /// Whom to ask for rest.
    user: &'static str,
    resized: Box<dyn Fn() + Send + Sync>,
    rearranged: Box<dyn Fn() + Send + Sync>,
}

impl Whole {
    /// A disk used for `doing` by `user`; `resized` tells him that its size is another.
    pub fn new(
        doing: String,
        user: &'static str,
        resized: impl Fn() + Send + Sync + 'static,
    ) -> Whole {
        Whole { doing, user, resized: Box::new(resized), rearranged: Box::new(|| {}) }
    }

    /// The same; `rearranged` is called when the disk may have other snapshots.
    pub fn showing(self, rearranged: impl Fn() + Send + Sync + 'static) -> Whole {
        Whole { rearranged: Box::new(rearranged), ..self }
    }
}

impl Kind for Whole {
    fn doing(&self) -> String {
        self.doing.clone()
    }

    fn quiesce(&self) -> Result<&dyn Quiesce> {
        Err(Error::unsupported(format!(
            "the file systems on the disk are {}'s: freeze them there (`fsfreeze`), or take the \
             snapshot without --freeze",
            self.user
        )))
    }

    fn resized(&self, _: u64) -> Result<()> {
        (self.resized)();
        Ok(())
    }

    fn rearranged(&self) {
        (self.rearranged)();
    }
}
