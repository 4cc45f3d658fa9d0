//! What is known of an instance: one JSON object in its directory, replaced as a whole.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A container.
    Container,
    /// A virtual machine.
    Machine,
}

/// Whether it is started again when it ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Never.
    #[default]
    No,
    /// Where its exit status was not 0.
    OnFailure,
    /// Always.
    Always,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its disk is being opened.
    Starting,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It waits to be started again.
    Waiting,
    /// It has ended.
    Exited,
    /// Its process was lost: killed, or the host restarted. Never written, only concluded.
    Lost,
}

impl Phase {
    /// As a word.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Paused => "paused",
            Phase::Waiting => "waiting",
            Phase::Exited => "exited",
            Phase::Lost => "lost",
        }
    }
}

/// All that is known of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// 12 hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What runs.
    pub kind: Kind,
    /// The disk that it runs on, or the image's layer below a throw-away delta: an absolute path.
    pub disk: String,
    /// The image that it was made from.
    pub image: Option<String>,
    /// Whether the disk is a clone that was made for it.
    pub clone: bool,
    /// What is run; empty for a virtual machine.
    pub command: Vec<String>,
    /// The words by which it was started, behind the program's name.
    pub words: Vec<String>,
    /// The one of them that names its disk or image.
    pub named: String,
    /// The directory in which it was started.
    pub directory: String,
    /// Whether it is started again.
    pub restart: Policy,
    /// Whether nothing of it is left when it ends.
    pub remove: bool,
    /// Whether it is its user's own command in the foreground, under no name: it is forgotten when it ends.
    #[serde(default)]
    pub plain: bool,
    /// Whether it has no terminal, and a log.
    pub detached: bool,
    /// The signal that asks a container to stop.
    pub stop_signal: i32,
    /// Ports that the image names; what is published is on the command line.
    pub exposed_ports: Vec<String>,
    /// Seconds since 1970 at which it was made.
    pub created: u64,
    /// The process that looks after it.
    pub pid: u32,
    /// The process that holds its disk and runs it.
    pub turn: Option<u32>,
    /// How far it is.
    pub phase: Phase,
    /// Seconds since 1970 at which it was last started.
    pub started: Option<u64>,
    /// Seconds since 1970 at which it last ended.
    pub ended: Option<u64>,
    /// How it last ended: its exit status.
    pub status: Option<u8>,
    /// How often it was started again.
    pub restarts: u32,
    /// Whether it was stopped by who meant to start it again, and does not run yet.
    #[serde(default)]
    pub again: bool,
    /// What its disk stood on before it was last put on another image.
    #[serde(default)]
    pub before: Option<Before>,
}

/// What an instance's disk stood on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// The image, as the user called it.
    pub image: String,
    /// The file of its topmost layer.
    pub base: String,
}

impl Record {
    /// Whether this is about something that runs or is about to.
    pub fn lives(&self) -> bool {
        !matches!(self.phase, Phase::Exited | Phase::Lost)
    }

    /// Whether nothing of it is to be left by now, if it has ended.
    pub fn goes(&self) -> bool {
        self.remove && !self.again
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
