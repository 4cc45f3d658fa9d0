//! What is said over a control socket: one line of JSON each way at a time.
//!
//! A connection asks one thing. Until the answer, the holder may say how far it is; the one who asked
//! may close the connection, or say anything, to cancel. It knows no socket and no disk.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::order::Order;
use crate::error::{Error, ErrorKind};

/// The longest line in bytes, its end included.
pub const MAX_LINE: u64 = 64 << 10;
/// The longest answer in bytes: a list of changed extents may be long.
pub const MAX_ANSWER: u64 = 64 << 20;

/// The file of the disk that is meant: one process may hold copies of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The device that the head's file is on.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// What is asked of a holder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// What it is, and what it is doing to the disk.
    Info,
    /// Take a snapshot.
    Snapshot {
        /// Its name.
        name: String,
        /// What the user says about it.
        description: String,
        /// Whether the file system on the disk is to be at rest.
        freeze: bool,
    },
    /// Merge a snapshot into its neighbour.
    Merge {
        /// Its name.
        name: String,
        /// Bytes in a second at most.
        rate: Option<u64>,
        /// Milliseconds for which it is kept for undo, where that is free; a default without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<u64>,
        /// Give back at once what was copied.
        #[serde(default)]
        in_batches: bool,
        /// Also where clones stand on it.
        #[serde(default)]
        even_if_cloned: bool,
        /// The tree of the plan that was shown: any will do without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<u64>,
    },
    /// Delete a snapshot.
    Delete {
        /// Its name.
        name: String,
        /// With those that stand on it.
        tree: bool,
        /// Also where clones stand on what goes.
        #[serde(default)]
        even_if_cloned: bool,
        /// Milliseconds for which they are kept for undo; a default without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<u64>,
        /// The tree of the plan that was shown: any will do without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<u64>,
    },
    /// Take back the last change that dropped something.
    Undo {
        /// The name under which today's state is kept.
        keep_as: Option<String>,
        /// The tree of the plan that was shown: any will do without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<u64>,
    },
    /// Let go of what is kept for undo.
    Forget {
        /// Also what clones stand on.
        #[serde(default)]
        even_if_cloned: bool,
        /// The tree of the plan that was shown: any will do without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<u64>,
    },
    /// Give a snapshot another name.
    Rename {
        /// Its name.
        old: String,
        /// Its new name.
        new: String,
    },
    /// Go back to a snapshot: always refused.
    Revert {
        /// Its name.
        name: String,
    },
    /// Change the size.
    Resize {
        /// In bytes.
        size: u64,
    },
    /// Look whether it is right.
    Check {
        /// The layers below it, too.
        chain: bool,
    },
    /// Give unused space back.
    Compact,
    /// List what changed.
    Diff {
        /// The earlier snapshot.
        from: String,
        /// The later one; now, without it.
        to: Option<String>,
    },
    /// Answer when the holder has let go of the disk.
    Wait,
    /// Do something with an instance, where this is one's process.
    Instance {
        /// What.
        order: Order,
    },
}

/// A request and the disk that it is about; none where the socket's name says it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Question {
    pub disk: Option<Named>,
    #[serde(flatten)]
    pub request: Request,
}

/// What a holder says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(super) enum Reply {
    /// So many bytes are done.
    At { done: u64, total: u64 },
    /// It is done.
    Done { result: Value },
    /// It failed, and how.
    Failed(Failure),
    /// The disk that was named is not held here.
    Elsewhere,
}

/// The kinds of errors that callers tell apart, by their names on the wire.
const KINDS: [(&str, ErrorKind); 16] = [
    ("not_found", ErrorKind::NotFound),
    ("exists", ErrorKind::Exists),
    ("in_use", ErrorKind::InUse),
    ("busy", ErrorKind::Busy),
    ("corrupt", ErrorKind::Corrupt),
    ("unsupported", ErrorKind::Unsupported),
    ("invalid", ErrorKind::Invalid),
    ("read_only", ErrorKind::ReadOnly),
    ("sealed", ErrorKind::Sealed),
    ("base_changed", ErrorKind::BaseChanged),
    ("no_space", ErrorKind::NoSpace),
    ("poisoned", ErrorKind::Poisoned),
    ("denied", ErrorKind::Denied),
    ("interrupted", ErrorKind::Interrupted),
    ("io", ErrorKind::Io),
    ("other", ErrorKind::Io),
];

impl Reply {
    /// An error as it is told.
    pub fn failed(error: &Error) -> Reply {
        Reply::Failed(Failure::from(error))
    }
}

/// An error, as one process tells another of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    kind: String,
    message: String,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        let name = KINDS.iter().find(|(_, kind)| *kind == error.kind()).map_or("other", |k| k.0);
        Failure { kind: name.to_owned(), message: error.to_string() }
    }
}

impl From<Failure> for Error {
    fn from(Failure { kind, message }: Failure) -> Error {
        let kind = KINDS.iter().find(|(name, _)| *name == kind).map_or(ErrorKind::Io, |k| k.1);
        Error::new(kind, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_line_that_a_script_could_write() {
        let line = r#"{"disk":{"device":1,"inode":2},"do":"merge","name":"monday","rate":null}"#;
        let question: Question = serde_json::from_str(line).unwrap();
        let plain = Request::Merge {
            name: "monday".into(),
            rate: None,
            keep: None,
            in_batches: false,
            even_if_cloned: false,
            seen: None,
        };
        assert_eq!(question.request, plain);
        let line = serde_json::to_string(&question).unwrap();
        assert_eq!(serde_json::from_str::<Question>(&line).unwrap().request, plain);
        assert!(serde_json::from_str::<Question>(r#"{"do":"format"}"#).is_err());
    }

    #[test]
    fn an_error_keeps_its_kind_and_its_text() {
        let told = Error::new(ErrorKind::Sealed, "clones stand on it").at_path("/d");
        let error = Error::from(Failure::from(&told));
        assert_eq!(error.kind(), ErrorKind::Sealed);
        assert_eq!(error.to_string(), "/d: clones stand on it");
    }
}
