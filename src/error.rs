//! The one error type of the library: what failed, where, and what the user can do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible call in this library.
pub type Result<T> = std::result::Result<T, Error>;

/// What callers match on; the text of an [`Error`] is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file, a snapshot or an entry that was named does not exist.
    NotFound,
    /// A file or a name that was to be made exists already.
    Exists,
    /// Another process holds the disk; the text names it.
    InUse,
    /// Another command is at work on the disk, or was meanwhile: nothing was done, and the same
    /// request may succeed a moment later.
    Busy,
    /// The bytes of an image contradict its format.
    Corrupt,
    /// A valid image or request that this version does not handle.
    Unsupported,
    /// An argument is outside its bounds.
    Invalid,
    /// A write to something opened for reading only.
    ReadOnly,
    /// The disk has children that a write would change.
    Sealed,
    /// A base is not the one its clone was made from.
    BaseChanged,
    /// The host has no room left.
    NoSpace,
    /// An earlier metadata write failed; the image must be reopened.
    Poisoned,
    /// The policy for names found inside images forbids this one.
    Denied,
    /// The user interrupted the operation.
    Interrupted,
    /// The host failed to read or write.
    Io,
}

/// A failure: its kind, a sentence for the user, and where it happened.
#[derive(thiserror::Error)]
#[error(transparent)]
pub struct Error(Box<Inner>);

#[derive(Debug, thiserror::Error)]
struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    source: Option<io::Error>,
}

impl Error {
    /// An error with the sentence that the user reads.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            offset: None,
            source: None,
        }))
    }

    /// A failed system call; `message` says what was being done.
    pub fn io(message: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::Exists,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        };
        let mut error = Error::new(kind, message);
        error.0.source = Some(source);
        error
    }

    /// The image contradicts its format.
    pub fn corrupt(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, message)
    }

    /// An argument is out of bounds.
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Invalid, message)
    }

    /// A valid thing that this version does not handle.
    pub fn unsupported(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unsupported, message)
    }

    /// Names the file, unless a deeper floor has named one already.
    #[must_use]
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Error {
        self.0.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Names the byte offset in the file, unless one is named already.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Error {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Names the host's error number that other programs give for this failure.
    #[must_use]
    pub fn with_os_error(mut self, number: i32) -> Error {
        self.0.source.get_or_insert_with(|| io::Error::from_raw_os_error(number));
        self
    }

    /// What callers match on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file that the failure is about.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The byte offset in the file that the failure is about.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The sentence alone, without path, offset and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The host's error number, where a system call failed or the failure is known by one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

impl fmt::Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.message)?;
        if let Some(offset) = self.offset {
            write!(f, " (at offset {offset:#x})")?;
        }
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl From<nix::Error> for Error {
    fn from(errno: nix::Error) -> Error {
        Error::io("system call failed", io::Error::from(errno))
    }
}
