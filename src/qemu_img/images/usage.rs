//! What a command is going to do with an image, which decides how it is opened.

use vdisk::open::OpenOptions;
use vdisk::storage::Access;

/// What a command does with an image.
#[derive(Debug, Clone, Copy, Default)]
pub struct Use {
    /// Writes to it.
    pub write: bool,
    /// Reads although others write.
    pub shared: bool,
    /// Checks it, and perhaps mends it: nothing is repaired on opening.
    pub check: bool,
    /// Only looks at what the image says of itself.
    pub describe: bool,
    /// What is written is left to the host's page cache.
    pub unsynced: bool,
    /// Looks at what the image says of itself only: an encrypted one needs no key.
    pub looks: bool,
}

impl Use {
    /// Only reads; `shared` although others write.
    pub fn reading(shared: bool) -> Use {
        Use { shared, ..Use::default() }
    }

    /// Reads what images say of themselves; `shared` although others write.
    pub fn looking(shared: bool) -> Use {
        Use { looks: true, ..Use::reading(shared) }
    }

    /// Reads and writes.
    pub fn writing() -> Use {
        Use { write: true, ..Use::default() }
    }

    pub(super) fn options(self) -> OpenOptions {
        OpenOptions {
            read_only: !self.write,
            shared: self.shared && !self.write,
            // A reader takes a chain as it is, like any other program.
            unprotected: !self.write,
            probe_backing: true,
            ..OpenOptions::default()
        }
    }

    /// What it does to the file, and suffers others to do.
    pub fn access(self) -> Access {
        match (self.write, self.shared) {
            (true, _) => Access::Write,
            (false, true) => Access::ReadShared,
            (false, false) => Access::Read,
        }
    }
}
