//! Telling another process of this program how far a container or a virtual machine is.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use vdisk::{Error, Result};

/// The command has started.
pub const STARTED: &str = "started";
/// It has ended.
pub const ENDED: &str = "ended";

/// Where it is told, if anywhere.
#[derive(Debug, Clone, Default)]
pub struct Marks(Option<Arc<File>>);

impl Marks {
    /// Tells it to whoever reads this FIFO.
    pub fn to(path: Option<&Path>) -> Result<Marks> {
        let open = |path: &Path| {
            let open = File::options().write(true).open(path);
            open.map_err(|e| Error::io("could not be opened", e).at_path(path))
        };
        Ok(Marks(path.map(open).transpose()?.map(Arc::new)))
    }

    /// Whether anybody is told.
    pub fn heard(&self) -> bool {
        self.0.is_some()
    }

    /// Tells one thing. Who does not hear it any more has no use for it.
    pub fn say(&self, word: &str) {
        if let Some(mut file) = self.0.as_deref() {
            let _ = file.write_all(format!("{word}\n").as_bytes());
        }
    }
}
