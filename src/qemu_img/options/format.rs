//! The `-f`, `--output` and similar options that several commands share.

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::args::{Given, Opt, flag, long, long_value, value};

/// How a command reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Text for people.
    Human,
    /// JSON.
    Json,
}

/// `-f`.
pub const FORMAT: Opt = value("f").or("format");
/// `-U`.
pub const SHARED: Opt = flag("U").or("force-share");
/// `-q`.
pub const QUIET: Opt = flag("q");
/// `--image-opts`.
pub const IMAGE_OPTS: Opt = long("image-opts");
/// `--object`.
pub const OBJECT: Opt = long_value("object");
/// `--output`.
pub const OUTPUT: Opt = long_value("output");
/// `-T`, the source's cache mode.
pub const CACHE: Opt = value("T");

impl Given {
    /// The report that `--output` asks for.
    pub fn output(&self) -> Outcome<Output> {
        match self.get("output") {
            None | Some("human") => Ok(Output::Human),
            Some("json") => Ok(Output::Json),
            Some(_) => Err(Fail::new("--output must be used with human or json as argument.")),
        }
    }

    /// The image called `name`, as `-f` and `--image-opts` say to read it.
    pub fn source(&self, name: &str) -> Outcome<Source> {
        Source::parse(name, self.get("f"), self.has("image-opts"))
    }

    /// Reading, shared where the user says so.
    pub fn reading(&self) -> Use {
        Use::reading(self.has("U"))
    }

    /// Refuses a rate limit that is none. Nothing here is slowed down.
    pub fn check_rate(&self) -> Outcome<()> {
        match self.get("r") {
            Some(text) => crate::qemu_img::size::operand("rate limit", text).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Refuses a cache mode that is none.
    pub fn check_cache(&self, key: &str, what: &str) -> Outcome<()> {
        match self.get(key) {
            None
            | Some("none" | "off" | "writeback" | "writethrough" | "directsync" | "unsafe") => {
                Ok(())
            }
            Some(other) => Err(Fail::new(format!("Invalid {what} option: {other}"))),
        }
    }
}
