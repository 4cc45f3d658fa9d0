//! Options that describe an image: dotted keys of `--image-opts` and the objects of `json:{...}`, as
//! a tree of drivers.

use std::path::PathBuf;

use serde_json::Value;
use vdisk::formats::vhd::SizeBy;

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::names::name::{Below, FORMATS, Key, NULL, Protocol, Rules, Source, protocol};
use crate::qemu_img::names::nbd;
use crate::qemu_img::options::leftover;
use crate::qemu_img::options::opts::List;
use crate::qemu_img::size::Bad;

/// Options with dotted keys, taken apart as they are used.
pub struct Tree(pub Vec<(String, String)>);

impl Tree {
    /// The option's last value, which is not there any more.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().rposition(|(k, _)| k == key)?;
        let value = self.0.remove(at).1;
        self.0.retain(|(k, _)| k != key);
        Some(value)
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.0.iter().rfind(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The options below `name`, without that name.
    pub fn below(&mut self, name: &str) -> Tree {
        let prefix = format!("{name}.");
        let (inside, outside) =
            self.0.drain(..).partition::<Vec<_>, _>(|(k, _)| k.starts_with(&prefix));
        self.0 = outside;
        Tree(inside.into_iter().map(|(k, v)| (k[prefix.len()..].to_owned(), v)).collect())
    }

    /// The image that all of the options describe; `text` is how the user gave them.
    pub fn image(&mut self, text: &str) -> Outcome<Source> {
        let all = List(self.0.clone());
        let driver = self.take("driver");
        let made = Source::new(text, Protocol::Null(0), driver.as_deref());
        let mut source = Source { rest: all, ..made };
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
            matches!(
                d,
                "file" | "host_device" | "nbd" | "blkdebug" | "null-co" | "null-aio" | "quorum"
            )
        };
        if driver.as_deref().is_some_and(is_protocol) {
            if let Some(driver) = driver {
                self.0.push(("driver".to_owned(), driver));
            }
            source.format = Some("raw".to_owned());
            source.protocol = self.protocol()?;
            source.bare = Some(source.protocol.driver());
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
            let name = if driver.is_none() { self.take("filename") } else { None };
            let name = name.ok_or_else(|| {
                Fail::new(match driver {
                    Some(_) => "A block device must be specified for \"file\"",
                    None => "Must specify either driver or file",
                })
            })?;
            protocol(&name)?
        } else {
            file.protocol()?
        };
        source.below = self.backing(text)?;
        let mut data = self.below("data-file");
        source.data_file = (!data.0.is_empty()).then(|| data.protocol()).transpose()?;
        source.vhd_size = self.vhd_size()?;
        source.key = self.key(driver.as_deref());
        if driver.as_deref().is_none_or(|d| d == "raw") {
            source.window = (self.number("offset")?.unwrap_or(0), self.number("size")?);
        }
        source.left = List(std::mem::take(&mut self.0));
        Ok(source)
    }

    fn backing(&mut self, text: &str) -> Outcome<Below> {
        let mut inside = self.below("backing");
        if inside.0.iter().any(|(key, _)| key.starts_with("file")) {
            return Ok(Below::Given(Box::new(inside.image(text)?)));
        }
        if !inside.0.is_empty() {
            return Ok(Below::Adjusted(List(inside.0)));
        }
        Ok(match self.take("backing") {
            Some(_) => Below::Nothing,
            None => Below::Recorded,
        })
    }

    /// What opens the image, as its format names it; of any format where none is given.
    fn key(&mut self, driver: Option<&str>) -> Key {
        let old = driver.is_none_or(|d| d == "qcow2");
        let own = driver.is_none_or(|d| d == "luks");
        let inside = if old { self.take("encrypt.key-secret") } else { None };
        Key {
            format: if old { self.take("encrypt.format") } else { None },
            secret: inside.or_else(|| if own { self.take("key-secret") } else { None }),
        }
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
        let parsed = crate::qemu_img::size::parse(&text);
        parsed.map(Some).map_err(|bad| match bad {
            Bad::Range => {
                Fail::new(format!("Value '{text}' is out of range for parameter '{key}'"))
            }
            Bad::Syntax => {
                Fail::new(format!("Parameter '{key}' expects a non-negative number below 2^64"))
            }
        })
    }

    fn protocol(&mut self) -> Outcome<Protocol> {
        let driver = self.take("driver").unwrap_or_else(|| "file".to_owned());
        match driver.as_str() {
            "file" | "host_device" => {
                let name = self.take("filename");
                let name =
                    name.ok_or_else(|| Fail::new("The 'file' block driver requires a file name"))?;
                leftover::of_protocol(&driver, &List(std::mem::take(&mut self.0)))?;
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
            "nbd" => nbd::from_options(self).map(Protocol::Nbd),
            "raw" => {
                let (offset, size) = (self.number("offset")?.unwrap_or(0), self.number("size")?);
                let mut inner = self.below("file");
                if inner.0.is_empty() {
                    return Err(Fail::new("A block device must be specified for \"file\""));
                }
                let of = Box::new(inner.protocol()?);
                leftover::of_format(&driver, &List(std::mem::take(&mut self.0)))?;
                Ok(Protocol::Part { offset, size, of })
            }
            "null-co" | "null-aio" => {
                let size = self.number("size")?.unwrap_or(NULL);
                leftover::of_protocol(&driver, &List(std::mem::take(&mut self.0)))?;
                Ok(Protocol::Null(size))
            }
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
pub fn from_json(text: &str) -> Outcome<List> {
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

/// Options that describe another image or file.
const CHILDREN: [&str; 5] = ["file", "backing", "image", "children", "data-file"];

/// The object that a list of dotted keys stands for.
pub fn to_json(list: &List) -> Value {
    let mut root = serde_json::Map::new();
    for (key, value) in &list.0 {
        let mut map = &mut root;
        // What stands below is an object of its own; other options keep their dots.
        let is_child = CHILDREN.iter().any(|name| key.split('.').next() == Some(name));
        let mut names: Vec<&str> = if is_child { key.split('.').collect() } else { vec![key] };
        let last = names.pop().unwrap_or_default();
        for name in names {
            let entry = map.entry(name).or_insert_with(|| Value::Object(Default::default()));
            let Value::Object(inner) = entry else { return Value::Null };
            map = inner;
        }
        map.insert(last.to_owned(), Value::String(value.clone()));
    }
    say_driver(&mut root);
    Value::Object(root)
}

/// The driver of a file that goes without saying is said.
fn say_driver(node: &mut serde_json::Map<String, Value>) {
    if let Some(Value::Object(file)) = node.get_mut("file") {
        if !file.contains_key("driver") {
            file.insert("driver".to_owned(), Value::from("file"));
        }
        say_driver(file);
    }
}
