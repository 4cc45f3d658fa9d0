//! How a layer or a disk is to be opened.

use crate::luks::Passphrase;
use crate::open::gate;
use crate::open::gate::Format;
use crate::storage::{Access, FileOptions};

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Refuse writes, and let others read.
    pub read_only: bool,
    /// The head's format; `None` looks at its first bytes. A head that was taken for raw by them
    /// refuses what would make it look like something else.
    pub format: Option<Format>,
    /// Open what the images name as their bases and data wherever it stands: the user says that they
    /// are what they claim to be. Otherwise only what stands by them, or what their labels prove.
    pub follow: bool,
    /// Read although others write: what is read may be out of date or torn.
    pub shared: bool,
    /// Open a layer although it is sealed, frozen or not the one its child was made from.
    pub unprotected: bool,
    /// Take the layers below as they are now, although they are not those that the layers above were
    /// made on. What they are not any more is in [`Chain::notes`](crate::chain::Chain::notes).
    pub accept_base: bool,
    /// Writing copies into the head what the disk shows already: it stays what others were made on.
    pub same_contents: bool,
    /// Bitmaps do not record what is written: the caller sees to what they say.
    pub unrecorded: bool,
    /// Open for writing what is marked corrupt or was not closed well, to check and mend it.
    pub repair: bool,
    /// Guess the format of a backing file whose child does not say it. Not safe where a guest may
    /// have written it: it can make a raw disk look like any other format.
    pub probe_backing: bool,
    /// The caller's lock on an image speaks for its external data file too.
    pub locked: bool,
    /// What opens the layers that are encrypted. Without it their tables can be read.
    pub passphrase: Option<Passphrase>,
    /// Bytes of metadata to keep in memory, about, for the whole chain: a quarter for the head's
    /// tables, a quarter for its refcounts, the rest for the map over the layers below.
    pub cache: u64,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: true,
            format: None,
            follow: gate::follows_links(),
            shared: false,
            unprotected: false,
            accept_base: false,
            same_contents: false,
            unrecorded: false,
            repair: false,
            probe_backing: false,
            locked: false,
            passphrase: None,
            cache: OpenOptions::CACHE,
        }
    }
}

impl OpenOptions {
    /// The default of [`OpenOptions::cache`].
    pub const CACHE: u64 = 32 << 20;

    /// For writing, with the defaults otherwise.
    pub fn writable() -> OpenOptions {
        OpenOptions { read_only: false, ..OpenOptions::default() }
    }

    /// Whether a head that is opened so may be written, and has to be one that may.
    pub fn is_guarded(&self) -> bool {
        !self.read_only && !self.unprotected
    }

    pub(crate) fn file_options(&self) -> FileOptions {
        let access = match (self.shared, self.read_only) {
            (true, true) => Access::ReadShared,
            (false, true) => Access::Read,
            (_, false) => Access::Write,
        };
        FileOptions { access: Some(access), write: !self.read_only }
    }
}
