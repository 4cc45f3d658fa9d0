//! Names of images as the user gives them: paths, `file:` paths, `json:{...}`, and the key-value
//! lists of `--image-opts`. Only the user's own words come here; names that stand inside images
//! pass the library's gate.

use std::path::{Path, PathBuf};

use serde_json::Value;

use vdisk::formats::vhd::SizeBy;

use super::fail::{Fail, Outcome};
use super::opts::List;

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
    /// Several files with the same bytes.
    Quorum(Vec<Protocol>),
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
    /// The host's page cache is passed by, which takes whole sectors.
    pub direct: bool,
    /// Which of its recorded sizes a VHD image has.
    pub vhd_size: SizeBy,
    /// First byte and length of a raw image inside its file.
    pub window: (u64, Option<u64>),
    /// Faults of the image itself.
    pub above: Option<Rules>,
    /// The other options, which do not change what is read.
    pub rest: List,
}

/// Formats that have a driver here.
pub const FORMATS: [&str; 6] = ["qcow2", "raw", "vmdk", "vpc", "vhdx", "vdi"];

impl Protocol {
    /// The file at the bottom.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Protocol::File(path) => Some(path),
            Protocol::Faulty { image, .. } => image.path(),
            Protocol::Null(_) => None,
            Protocol::Quorum(parts) => parts.first().and_then(Protocol::path),
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

    /// A plain name, with or without protocol.
    pub fn named(text: &str, format: Option<&str>) -> Outcome<Source> {
        let source = if let Some(json) = text.strip_prefix("json:") {
            let mut list = from_json(json)?;
            if let Some(format) = format {
                list.0.push(("driver".to_owned(), format.to_owned()));
            }
            Source::from_options(text, list)?
        } else {
            Source {
                given: text.to_owned(),
                protocol: protocol(text)?,
                format: format.map(str::to_owned),
                below: Below::Recorded,
                vhd_size: SizeBy::Creator,
                direct: false,
                window: (0, None),
                above: None,
                rest: List::default(),
            }
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
        let mut tree = Tree(list.0);
        let source = tree.image(text)?;
        source.check_format()?;
        Ok(source)
    }

    fn is_plain(&self) -> bool {
        matches!(self.below, Below::Recorded) && self.above.is_none() && self.window == (0, None)
    }

    /// The path of the file at the bottom.
    pub fn path(&self) -> Outcome<&Path> {
        self.protocol.path().ok_or_else(|| Fail::new(format!("'{}' has no file", self.given)))
    }

    /// The name that describes the image best: a path where that is all there is to say.
    pub fn shown(&self) -> String {
        match &self.protocol {
            Protocol::File(path) if self.is_plain() => shown_path(path),
            Protocol::Faulty { config, rules, image } if rules.is_empty() => {
                let inner = image.path().map(|p| p.display().to_string()).unwrap_or_default();
                format!("blkdebug:{}:{inner}", config.as_deref().unwrap_or_default())
            }
            _ if self.given.starts_with("json:") => self.given.clone(),
            _ => format!("json:{}", to_json(&self.rest)),
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

/// Options with dotted keys, taken apart as they are used.
struct Tree(Vec<(String, String)>);

impl Tree {
    fn take(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().rposition(|(k, _)| k == key)?;
        let value = self.0.remove(at).1;
        self.0.retain(|(k, _)| k != key);
        Some(value)
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.0.iter().rfind(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The options below `name`, without that name.
    fn below(&mut self, name: &str) -> Tree {
        let prefix = format!("{name}.");
        let (inside, outside) =
            self.0.drain(..).partition::<Vec<_>, _>(|(k, _)| k.starts_with(&prefix));
        self.0 = outside;
        Tree(inside.into_iter().map(|(k, v)| (k[prefix.len()..].to_owned(), v)).collect())
    }

    fn image(&mut self, text: &str) -> Outcome<Source> {
        let all = List(self.0.clone());
        let driver = self.take("driver");
        let mut source = Source {
            given: text.to_owned(),
            protocol: Protocol::Null(0),
            format: driver.clone(),
            below: Below::Recorded,
            vhd_size: SizeBy::Creator,
            direct: false,
            window: (0, None),
            above: None,
            rest: all,
        };
        if driver.as_deref() == Some("blkdebug")
            && let Some(format) = self.value("image.driver")
            && FORMATS.contains(&format)
        {
            let mut below = self.below("image").image(text)?;
            let rules = self.0.drain(..).filter(|(k, _)| k.contains('.')).collect();
            let rules = Rules { config: self.take("config"), given: rules };
            (below.above, below.rest) = (Some(rules), source.rest);
            return Ok(below);
        }
        let is_protocol = |d: &str| {
            matches!(d, "file" | "host_device" | "blkdebug" | "null-co" | "null-aio" | "quorum")
        };
        if driver.as_deref().is_some_and(is_protocol) {
            if let Some(driver) = driver {
                self.0.push(("driver".to_owned(), driver));
            }
            source.format = Some("raw".to_owned());
            source.protocol = self.protocol()?;
            return Ok(source);
        }
        if let Some(name) = &driver
            && !FORMATS.contains(&name.as_str())
        {
            return Err(Fail::new(format!("Unknown driver '{name}'")));
        }
        let mut file = self.below("file");
        let direct = [self.take("cache.direct"), file.take("cache.direct")];
        source.direct = direct.iter().flatten().any(|on| on == "on" || on == "true");
        source.protocol = if let Some(node) = self.take("file") {
            return Err(Fail::new(format!("Cannot find device='' nor node-name='{node}'")));
        } else if file.0.is_empty() {
            let name = self.take("filename");
            let name =
                name.ok_or_else(|| Fail::new("A block device must be specified for \"file\""))?;
            protocol(&name)?
        } else {
            file.protocol()?
        };
        source.below = self.backing(text)?;
        source.vhd_size = self.vhd_size()?;
        source.window = (self.number("offset")?.unwrap_or(0), self.number("size")?);
        Ok(source)
    }

    fn backing(&mut self, text: &str) -> Outcome<Below> {
        let mut inside = self.below("backing");
        if !inside.0.is_empty() {
            return Ok(Below::Given(Box::new(inside.image(text)?)));
        }
        Ok(match self.take("backing") {
            Some(_) => Below::Nothing,
            None => Below::Recorded,
        })
    }

    fn vhd_size(&mut self) -> Outcome<SizeBy> {
        match self.take("force_size_calc").as_deref() {
            None => Ok(SizeBy::Creator),
            Some("chs") => Ok(SizeBy::Geometry),
            Some("current_size") => Ok(SizeBy::Recorded),
            Some(mode) => Err(Fail::new(format!("Invalid size calculation mode: '{mode}'"))),
        }
    }

    fn number(&mut self, key: &str) -> Outcome<Option<u64>> {
        let Some(text) = self.take(key) else { return Ok(None) };
        let parsed = super::size::parse(&text);
        parsed.map(Some).map_err(|_| {
            Fail::new(format!("Parameter '{key}' expects a non-negative number below 2^64"))
        })
    }

    fn protocol(&mut self) -> Outcome<Protocol> {
        let driver = self.take("driver").unwrap_or_else(|| "file".to_owned());
        match driver.as_str() {
            "file" | "host_device" => {
                let name = self.take("filename");
                let name =
                    name.ok_or_else(|| Fail::new("The 'file' block driver requires a file name"))?;
                Ok(Protocol::File(PathBuf::from(name)))
            }
            "blkdebug" => {
                let config = self.take("config");
                let mut inner = self.below("image");
                let image = if inner.0.is_empty() {
                    protocol(&self.take("x-image").unwrap_or_default())?
                } else {
                    inner.protocol()?
                };
                let rules = self.0.drain(..).filter(|(k, _)| k.contains('.')).collect();
                Ok(Protocol::Faulty { config, rules, image: Box::new(image) })
            }
            "null-co" | "null-aio" => Ok(Protocol::Null(self.number("size")?.unwrap_or(1 << 30))),
            "quorum" => {
                let mut parts = Vec::new();
                for number in 0.. {
                    let mut child = self.below(&format!("children.{number}"));
                    if child.0.is_empty() {
                        break;
                    }
                    parts.push(child.protocol()?);
                }
                if parts.is_empty() {
                    return Err(Fail::new("Number of provided children must be 1 or more"));
                }
                Ok(Protocol::Quorum(parts))
            }
            other => Err(Fail::new(format!("Unknown driver '{other}'"))),
        }
    }
}

/// The options in a JSON object, whose strings may stand in single quotes.
fn from_json(text: &str) -> Outcome<List> {
    let bad = || Fail::new("Could not parse the JSON options");
    let value: Value = serde_json::from_str(&double_quoted(text)).map_err(|_| bad())?;
    if !value.is_object() {
        return Err(Fail::new("Invalid JSON object given"));
    }
    let mut list = List::default();
    flatten("", &value, &mut list);
    Ok(list)
}

/// The same text with double quotes around strings that have single ones.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                out.push('"');
            }
            (Some(q), c) if c == q => {
                quote = None;
                out.push('"');
            }
            (Some(_), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                Some(next) => out.extend(['\\', next]),
                None => out.push('\\'),
            },
            (_, c) => out.push(c),
        }
    }
    out
}

fn flatten(prefix: &str, value: &Value, list: &mut List) {
    let below = |name: &str| match prefix {
        "" => name.to_owned(),
        prefix => format!("{prefix}.{name}"),
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(k, v)| flatten(&below(k), v, list)),
        Value::Array(all) => {
            all.iter().enumerate().for_each(|(n, v)| flatten(&below(&n.to_string()), v, list));
        }
        Value::Bool(on) => {
            list.0.push((prefix.to_owned(), if *on { "on" } else { "off" }.to_owned()));
        }
        Value::String(text) => list.0.push((prefix.to_owned(), text.clone())),
        Value::Number(number) => list.0.push((prefix.to_owned(), number.to_string())),
        Value::Null => list.0.push((prefix.to_owned(), String::new())),
    }
}

fn to_json(list: &List) -> Value {
    let mut root = serde_json::Map::new();
    for (key, value) in &list.0 {
        let mut map = &mut root;
        let mut names: Vec<&str> = key.split('.').collect();
        let last = names.pop().unwrap_or_default();
        for name in names {
            let entry = map.entry(name).or_insert_with(|| Value::Object(Default::default()));
            let Value::Object(inner) = entry else { return Value::Null };
            map = inner;
        }
        map.insert(last.to_owned(), Value::String(value.clone()));
    }
    Value::Object(root)
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
