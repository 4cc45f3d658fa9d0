//! Names of images as the user gives them: paths, `file:` paths, and what [`tree`](crate::qemu_img::names::tree) reads.
//! Only the user's own words come here; names that stand inside images pass the library's gate.

use std::path::{Path, PathBuf};

use vdisk::formats::vhd::SizeBy;
use vdisk::nbd::Target;

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::json;
use crate::qemu_img::names::nbd;
use crate::qemu_img::names::tree::{self, Tree};
use crate::qemu_img::options::opts::List;

/// Where the bytes of an image come from.
#[derive(Debug, Clone)]
pub enum Protocol {
    /// A file.
    File(PathBuf),
    /// Another source, with faults.
    Faulty {
        /// The file with the rules, as it was named.
        config: Option<String>,
        /// Rules that were given in place, with their keys.
        rules: Vec<(String, String)>,
        /// What is made faulty.
        image: Box<Protocol>,
    },
    /// Nothing: zeroes of this many bytes.
    Null(u64),
    /// An export of a server.
    Nbd(Target),
    /// Several files with the same bytes.
    Quorum(Vec<Protocol>),
    /// A part of another source, from some byte on.
    Part {
        /// The first byte.
        offset: u64,
        /// How many; all that follow where it is not said.
        size: Option<u64>,
        /// What it is a part of.
        of: Box<Protocol>,
    },
}

/// Rules for faults, as they were given.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The file that holds some.
    pub config: Option<String>,
    /// Those given in place, with their keys.
    pub given: Vec<(String, String)>,
}

/// What stands below an image.
#[derive(Debug, Clone, Default)]
pub enum Below {
    /// What its header says.
    #[default]
    Recorded,
    /// Nothing.
    Nothing,
    /// This.
    Given(Box<Source>),
    /// What its header says, opened with these options.
    Adjusted(List),
}

/// What opens an encrypted image.
#[derive(Debug, Clone, Default)]
pub struct Key {
    /// How the user says that it is encrypted.
    pub format: Option<String>,
    /// The id of the secret.
    pub secret: Option<String>,
}

/// An image that the user named.
#[derive(Debug, Clone)]
pub struct Source {
    /// The name as the user wrote it.
    pub given: String,
    /// Where its bytes come from.
    pub protocol: Protocol,
    /// The format's name, where the user said it.
    pub format: Option<String>,
    /// What stands below it.
    pub below: Below,
    /// The external data file, where the user said it.
    pub data_file: Option<Protocol>,
    /// The host's page cache is passed by, which takes whole sectors.
    pub direct: bool,
    /// Which of its recorded sizes a VHD image has.
    pub vhd_size: SizeBy,
    /// First byte and length of a raw image inside its file.
    pub window: (u64, Option<u64>),
    /// What opens it, where it is encrypted.
    pub key: Key,
    /// Faults of the image itself.
    pub above: Option<Rules>,
    /// The driver that stands alone, without a format on it.
    pub bare: Option<&'static str>,
    /// All options, as they were given.
    pub rest: List,
    /// Those that nobody has used.
    pub left: List,
}

/// Bytes of a disk of nothing, unless the user says otherwise.
pub const NULL: u64 = 1 << 30;

/// Formats that have a driver here.
pub const FORMATS: [&str; 10] =
    ["qcow2", "raw", "luks", "vmdk", "vpc", "vhdx", "vdi", "parallels", "qcow", "qed"];

impl Protocol {
    /// The driver's name.
    pub fn driver(&self) -> &'static str {
        match self {
            Protocol::File(_) => "file",
            Protocol::Faulty { .. } => "blkdebug",
            Protocol::Null(_) => "null-co",
            Protocol::Nbd(_) => "nbd",
            Protocol::Quorum(_) => "quorum",
            Protocol::Part { .. } => "raw",
        }
    }

    /// The source that this is a part of; itself where it is all of it.
    pub fn whole(&self) -> &Protocol {
        match self {
            Protocol::Part { of, .. } => of.whole(),
            all => all,
        }
    }

    /// The file at the bottom.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Protocol::File(path) => Some(path),
            Protocol::Faulty { image, .. } => image.path(),
            Protocol::Null(_) | Protocol::Nbd(_) => None,
            Protocol::Quorum(parts) => parts.first().and_then(Protocol::path),
            Protocol::Part { of, .. } => of.path(),
        }
    }
}

impl Source {
    /// Reads an operand: a plain name, or options where `image_opts`.
    pub fn parse(text: &str, format: Option<&str>, image_opts: bool) -> Outcome<Source> {
        let failed = |e: Fail| e.prefix(format!("Could not open '{text}': "));
        if image_opts {
            if format.is_some() {
                return Err(Fail::new("--image-opts and --format are mutually exclusive"));
            }
            return Source::from_options(text, List::parse(text, None)).map_err(failed);
        }
        Source::named(text, format).map_err(failed)
    }

    /// An image at a place, without any option.
    pub fn new(text: &str, protocol: Protocol, format: Option<&str>) -> Source {
        Source {
            given: text.to_owned(),
            protocol,
            format: format.map(str::to_owned),
            below: Below::Recorded,
            data_file: None,
            direct: false,
            vhd_size: SizeBy::Creator,
            window: (0, None),
            key: Key::default(),
            above: None,
            bare: None,
            rest: List::default(),
            left: List::default(),
        }
    }

    /// The file at `path`, which another image names, opened with the user's options for it.
    pub fn adjusted(path: &Path, format: Option<&str>, options: &List) -> Outcome<Source> {
        let mut list = List(vec![("file.filename".to_owned(), path.display().to_string())]);
        list.0.extend(options.0.iter().cloned());
        if let Some(format) = format.filter(|_| options.get("driver").is_none()) {
            list.0.push(("driver".to_owned(), format.to_owned()));
        }
        Source::from_options(&path.display().to_string(), list)
    }

    /// A plain name, with or without protocol.
    pub fn named(text: &str, format: Option<&str>) -> Outcome<Source> {
        let source = if let Some(json) = text.strip_prefix("json:") {
            let mut list = tree::from_json(json)?;
            if let Some(format) = format {
                list.0.push(("driver".to_owned(), format.to_owned()));
            }
            Source::from_options(text, list)?
        } else {
            Source::new(text, protocol(text)?, format)
        };
        source.check_format()?;
        Ok(source)
    }

    fn check_format(&self) -> Outcome<()> {
        match self.format.as_deref() {
            Some("file" | "host_device") | None => Ok(()),
            Some(format) if FORMATS.contains(&format) => Ok(()),
            Some(other) => Err(Fail::new(format!("Unknown driver '{other}'"))),
        }
    }

    /// The image that options describe.
    fn from_options(text: &str, list: List) -> Outcome<Source> {
        let source = Tree(list.0).image(text)?;
        source.check_format()?;
        Ok(source)
    }

    fn is_plain(&self) -> bool {
        matches!(self.below, Below::Recorded)
            && self.above.is_none()
            && self.window == (0, None)
            && self.key.secret.is_none()
            && self.key.format.is_none()
    }

    /// The path of the file at the bottom.
    pub fn path(&self) -> Outcome<&Path> {
        self.protocol.path().ok_or_else(|| Fail::new(format!("'{}' has no file", self.given)))
    }

    /// The name that describes the image best: a path where that is all there is to say.
    pub fn shown(&self) -> String {
        match &self.protocol {
            Protocol::File(path) if self.is_plain() => shown_path(path),
            Protocol::Nbd(target) if self.is_plain() => target.uri(),
            Protocol::Null(_) if self.is_plain() => "null-co://".to_owned(),
            Protocol::Faulty { config, rules, image } if rules.is_empty() => {
                let inner = match &**image {
                    Protocol::Nbd(target) => target.uri(),
                    Protocol::Null(_) => "null-co://".to_owned(),
                    image => image.path().map(|p| p.display().to_string()).unwrap_or_default(),
                };
                format!("blkdebug:{}:{inner}", config.as_deref().unwrap_or_default())
            }
            _ if self.given.starts_with("json:") => self.given.clone(),
            _ => format!("json:{}", json::inline(&tree::to_json(&self.rest))),
        }
    }
}

/// A path as QEMU shows it: with something before a colon that could be taken for a protocol.
pub fn shown_path(path: &Path) -> String {
    let text = path.display().to_string();
    if has_protocol(&text) { format!("./{text}") } else { text }
}

/// Whether a colon stands before the first slash.
pub fn has_protocol(name: &str) -> bool {
    name.split('/').next().is_some_and(|first| first.contains(':'))
}

/// The source that a plain name means.
pub fn protocol(text: &str) -> Outcome<Protocol> {
    if !has_protocol(text) {
        return Ok(Protocol::File(PathBuf::from(text)));
    }
    let (scheme, rest) = text.split_once(':').unwrap_or(("", text));
    match scheme {
        "file" => Ok(Protocol::File(PathBuf::from(rest))),
        "nbd" | "nbd+tcp" | "nbd+unix" | "nbds" | "nbds+tcp" | "nbds+unix" => {
            nbd::from_name(text).map(Protocol::Nbd)
        }
        "null-co" | "null-aio" if rest.starts_with("//") => Ok(Protocol::Null(NULL)),
        "blkdebug" => {
            let (config, image) = rest
                .split_once(':')
                .ok_or_else(|| Fail::new("blkdebug requires both config file and image path"))?;
            let config = Some(config.to_owned()).filter(|c| !c.is_empty());
            let image = Box::new(protocol(image)?);
            Ok(Protocol::Faulty { config, rules: Vec::new(), image })
        }
        other => Err(Fail::new(format!("Unknown protocol '{other}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_unless_they_begin_with_a_protocol() {
        let path = |name| Source::named(name, None).map(|s| s.path().unwrap().to_path_buf());
        assert_eq!(path("dir/a:b").unwrap(), Path::new("dir/a:b"));
        assert_eq!(path("file:a:b").unwrap(), Path::new("a:b"));
        assert!(path("foo:bar").unwrap_err().text().contains("Unknown protocol 'foo'"));
    }

    #[test]
    fn json_and_image_opts_say_the_same() {
        let a = Source::parse(
            "json:{'driver':'qcow2','file':{'driver':'file','filename':'a\\'b'},\"backing\":null}",
            None,
            false,
        );
        let b = Source::parse("driver=qcow2,file.filename=a'b,backing=", None, true);
        for source in [a.unwrap(), b.unwrap()] {
            assert_eq!(source.path().unwrap(), Path::new("a'b"));
            assert_eq!(source.format.as_deref(), Some("qcow2"));
            assert!(matches!(source.below, Below::Nothing));
        }
    }
}
