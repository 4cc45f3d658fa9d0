//! What is asked of the process that looks after an instance.

use serde::{Deserialize, Serialize};

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Ask it to stop, wait, and end it then. Answered when it has ended.
    Stop {
        /// Milliseconds to wait.
        patience: u64,
        /// Whether who asks is about to start it again, and its record is to say so.
        #[serde(default)]
        again: bool,
    },
    /// Send it a signal.
    Kill {
        /// Its number.
        signal: i32,
    },
    /// Stop all of it where it is.
    Pause,
    /// Let it go on.
    Resume,
    /// Answered when it has ended, with its exit status.
    Ended,
}
