//! How a command fails: the text that the user reads, and the exit status.

use std::path::Path;

use vdisk::{Error, ErrorKind};

/// What a command ends with; a number is its exit status.
pub type Outcome<T = u8> = Result<T, Fail>;

/// A failure that ends the command.
#[derive(Debug)]
pub struct Fail {
    code: u8,
    text: String,
}

impl Fail {
    /// A failure with exit status 1.
    pub fn new(text: impl Into<String>) -> Fail {
        Fail { code: 1, text: text.into() }
    }

    /// Wrong usage.
    pub fn usage(text: impl Into<String>) -> Fail {
        Fail::new(format!("{}\nTry 'qemu-img --help' for more information", text.into()))
    }

    /// A failure that has been reported already.
    pub fn silent(code: u8) -> Fail {
        Fail { code, text: String::new() }
    }

    /// The same with another exit status.
    #[must_use]
    pub fn with_code(self, code: u8) -> Fail {
        Fail { code, ..self }
    }

    /// The same with words before it.
    #[must_use]
    pub fn prefix(self, words: impl std::fmt::Display) -> Fail {
        Fail { text: format!("{words}{}", self.text), ..self }
    }

    /// What the user reads.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Tells the user, and says the exit status.
    pub fn report(&self) -> u8 {
        if !self.text.is_empty() {
            report(&self.text);
        }
        self.code
    }
}

/// Writes an error or a warning.
pub fn report(text: impl std::fmt::Display) {
    eprintln!("qemu-img: {text}");
}

/// The words of a failed system call, without the error number.
pub fn os_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Why an image could not be used, without its name.
pub fn reason(error: &Error) -> String {
    if error.kind() == ErrorKind::InUse {
        return in_use(error);
    }
    match error.raw_os_error() {
        Some(errno) => os_text(errno),
        None if error.message().starts_with(CORRUPT) => format!("qcow2: {CORRUPT}"),
        None => error.message().to_owned(),
    }
}

/// What QEMU says of an image with the corrupt mark; what mends it is ours to add elsewhere.
const CORRUPT: &str = "Image is corrupt; cannot be opened read/write";

/// Why a file could not be opened.
pub fn open_reason(error: &Error, path: &Path) -> String {
    match error.raw_os_error() {
        Some(errno) if error.message() == "could not be opened" => {
            format!("Could not open '{}': {}", path.display(), os_text(errno))
        }
        _ => reason(error),
    }
}

fn in_use(error: &Error) -> String {
    let name = error.path().map(|p| p.display().to_string()).unwrap_or_default();
    // The library says whether the caller wanted to write, or found a writer.
    let lock = if error.message().ends_with("cannot be written now") { "" } else { "shared " };
    format!("Failed to get {lock}\"write\" lock\nIs another process using the image [{name}]?")
}
