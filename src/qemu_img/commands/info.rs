//! `qemu-img info`: what an image says about itself, and the images below it.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;

use serde_json::{Map, Value, json};
use vdisk::image::Backing;
use vdisk::open::Format;
use vdisk::qcow2::{self, Snapshot};
use vdisk::storage::Storage;

use crate::qemu_img::commands::snapshot;
use crate::qemu_img::encryption::crypt;
use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::foreign::info as info_foreign;
use crate::qemu_img::images::open::{self, Opened, full_backing_name};
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::json;
use crate::qemu_img::names::name::{Below, Protocol, Source};
use crate::qemu_img::options::args::{self, long};
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, SHARED};
use crate::qemu_img::size::human;

/// Files count as whole sectors.
pub const SECTOR: u64 = 512;
/// What QEMU calls a file that is a device of the host.
const HOST_DEVICE: &str = "host_device";

pub fn run(args: &[String]) -> Outcome {
    let chain = long("backing-chain");
    let given = args::parse(args, &[FORMAT, SHARED, OUTPUT, OBJECT, IMAGE_OPTS, chain])?;
    let output = given.output()?;
    let source = given.source(given.only_name()?)?;
    Opens::new().read(&source).close();
    let using = Use { describe: true, ..Use::looking(given.has("U")) };
    let all = collect(source, using, given.has("backing-chain"))?;
    match output {
        Output::Human => {
            let texts: Vec<String> = all.iter().map(Info::text).collect();
            print!("{}", texts.join("\n"));
        }
        Output::Json if given.has("backing-chain") => {
            println!("{}", json::pretty(&all.iter().map(Info::json).collect()));
        }
        Output::Json => all.iter().for_each(|i| println!("{}", json::pretty(&i.json()))),
    }
    Ok(0)
}

/// The image, and those below it where `whole`.
fn collect(source: Source, using: Use, whole: bool) -> Outcome<Vec<Info>> {
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some(source);
    while let Some(source) = next.take() {
        let path = source.protocol.path();
        let identity = path.and_then(|p| std::fs::metadata(p).ok()).map(|m| (m.dev(), m.ino()));
        if identity.is_some_and(|i| !seen.insert(i)) {
            let name = source.shown();
            return Err(Fail::new(format!("Backing file '{name}' creates an infinite loop.")));
        }
        let opened = open::layer(&source, using)?;
        let info = Info::of(&source, &opened)?;
        next = match (&source.below, &info.backing) {
            _ if !whole => None,
            (Below::Given(given), _) => Some((**given).clone()),
            (Below::Nothing, _) | (_, None) => None,
            (Below::Recorded | Below::Adjusted(_), Some(backing)) => {
                // What an image names passes the library's gate: a path, and nothing else.
                let child = source.path().unwrap_or(std::path::Path::new(""));
                if !open::is_trusted_json(&backing.name) {
                    vdisk::open::resolve(child, &backing.name)
                        .map_err(|e| Fail::new(reason(&e)))?;
                }
                let full = info
                    .full_backing()
                    .ok_or_else(|| Fail::new("Could not determine the backing file's name"))?;
                let below = Source::named(&full, backing.format.as_deref());
                Some(below.map_err(|e| e.prefix(format!("Could not open '{full}': ")))?)
            }
        };
        all.push(info);
    }
    Ok(all)
}

/// What holds an image.
pub struct FileInfo {
    pub name: String,
    pub driver: &'static str,
    pub length: u64,
    pub allocated: Option<u64>,
}

/// What there is to say about one image.
struct Info {
    shown: String,
    format: &'static str,
    size: u64,
    allocated: Option<u64>,
    cluster: Option<u64>,
    encrypted: bool,
    dirty: bool,
    backing: Option<Backing>,
    /// Whether that is the image itself, without a format.
    bare: bool,
    /// Whether the directory of the image is known.
    has_directory: bool,
    snapshots: Vec<Snapshot>,
    specific: Option<Value>,
    file: FileInfo,
    /// Further files, with the names of their nodes.
    beside: Vec<(String, FileInfo)>,
}

impl Info {
    fn of(source: &Source, opened: &Opened) -> Outcome<Info> {
        let failed = |e: vdisk::Error| Fail::new(reason(&e));
        let (layer, file) = (&opened.layer, &opened.layer.file);
        let allocated = match source.protocol.whole() {
            Protocol::File(_) | Protocol::Null(_) => Some(file.allocated().map_err(failed)?),
            _ => None,
        };
        let header = opened.qcow2.as_ref().map(|q| q.header());
        let snapshots = opened.qcow2.as_ref().map(|q| q.snapshots()).transpose().map_err(failed)?;
        let beside = match &opened.vmdk {
            Some(image) => info_foreign::children(image, &opened.shown)?,
            None => Vec::new(),
        };
        let specific = match (&opened.qcow2, &opened.vmdk, &opened.luks) {
            (Some(image), ..) => Some(specific(image)?),
            (_, Some(image), _) => Some(info_foreign::vmdk(image, &opened.shown)),
            (.., Some(image)) => Some(Value::Object(crypt::describe(&image.header()))),
            (None, None, None) => None,
        };
        let own = allocated;
        let more: u64 = beside.iter().filter_map(|(_, file)| file.allocated).sum();
        let allocated = allocated.map(|own| own.saturating_add(more));
        Ok(Info {
            shown: opened.shown.clone(),
            format: source.bare.unwrap_or(layer.format.name()),
            bare: source.bare.is_some(),
            size: layer.image.size(),
            allocated,
            // Of Parallels' blocks QEMU says nothing.
            cluster: layer.image.block_size().filter(|_| layer.format != Format::Parallels),
            encrypted: layer.image.encrypted(),
            dirty: header.as_ref().is_some_and(qcow2::Header::is_dirty),
            backing: layer.image.backing(),
            has_directory: !matches!(source.protocol, Protocol::Quorum(_)),
            snapshots: snapshots.unwrap_or_default(),
            specific,
            file: FileInfo {
                name: match &source.protocol {
                    Protocol::Nbd(target) => target.uri(),
                    Protocol::Null(_) => "null-co://".to_owned(),
                    _ => layer.path.display().to_string(),
                },
                driver: match &source.protocol {
                    Protocol::Faulty { .. } | Protocol::Quorum(_) => "file",
                    Protocol::File(_) if layer.file.is_fixed() => HOST_DEVICE,
                    other => other.driver(),
                },
                length: opened.length.next_multiple_of(SECTOR),
                allocated: own,
            },
            beside,
        })
    }

    fn full_backing(&self) -> Option<String> {
        let backing = self.backing.as_ref()?;
        // A name made of options has its file's directory, not its own.
        let base = if self.shown.starts_with("json:") { &self.file.name } else { &self.shown };
        self.has_directory.then(|| full_backing_name(base, &backing.name))
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let disk = |bytes: Option<u64>| bytes.map_or("unavailable".to_owned(), human);
        let _ = write!(
            out,
            "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
            self.shown,
            self.format,
            human(self.size),
            self.size,
            disk(self.allocated)
        );
        if self.encrypted {
            out.push_str("encrypted: yes\n");
        }
        if let Some(cluster) = self.cluster {
            let _ = writeln!(out, "cluster_size: {cluster}");
        }
        if self.dirty {
            out.push_str("cleanly shut down: no\n");
        }
        self.backing_text(&mut out);
        out.push_str(&snapshot::list(&self.snapshots));
        if let Some(specific) = &self.specific {
            out.push_str("Format specific information:\n");
            dump(specific, 1, &mut out);
        }
        for (node, file) in self.children() {
            let _ = write!(
                out,
                "Child node '/{node}':\n    filename: {}\n    protocol type: {}\n    file length: {} ({} \
                 bytes)\n    disk size: {}\n",
                file.name,
                file.driver,
                human(file.length),
                file.length,
                disk(file.allocated)
            );
        }
        out
    }

    /// All files, with the names of their nodes.
    fn children(&self) -> impl Iterator<Item = (&str, &FileInfo)> {
        let beside = self.beside.iter().map(|(node, file)| (node.as_str(), file));
        beside.chain([("file", &self.file)]).filter(|_| !self.bare)
    }

    fn backing_text(&self, out: &mut String) {
        let Some(backing) = &self.backing else { return };
        let _ = write!(out, "backing file: {}", backing.name);
        match self.full_backing() {
            None => out.push_str(" (cannot determine actual path)"),
            Some(full) if full != backing.name => {
                let _ = write!(out, " (actual path: {full})");
            }
            Some(_) => {}
        }
        out.push('\n');
        if let Some(format) = &backing.format {
            let _ = writeln!(out, "backing file format: {format}");
        }
    }

    fn json(&self) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_owned(), value);
        };
        put("children", self.children().map(|(node, file)| file.json(node)).collect());
        put("virtual-size", json!(self.size));
        put("filename", json!(self.shown));
        put("format", json!(self.format));
        if let Some(allocated) = self.allocated {
            put("actual-size", json!(allocated));
        }
        if self.encrypted {
            put("encrypted", json!(true));
        }
        if let Some(cluster) = self.cluster {
            put("cluster-size", json!(cluster));
        }
        if let Some(backing) = &self.backing {
            put("backing-filename", json!(backing.name));
            if let Some(full) = self.full_backing() {
                put("full-backing-filename", json!(full));
            }
            if let Some(format) = &backing.format {
                put("backing-filename-format", json!(format));
            }
        }
        if !self.snapshots.is_empty() {
            put("snapshots", self.snapshots.iter().map(snapshot_json).collect());
        }
        if let Some(specific) = &self.specific {
            put("format-specific", json!({ "type": self.format, "data": specific }));
        }
        let is_file = matches!(self.file.driver, "file" | HOST_DEVICE);
        if self.bare && is_file {
            put("format-specific", json!({ "type": "file", "data": {} }));
        }
        if self.format != "raw" && !self.bare || is_file {
            put("dirty-flag", json!(self.dirty));
        }
        Value::Object(map)
    }
}

impl FileInfo {
    fn json(&self, node: &str) -> Value {
        let mut info = json!({
            "children": [],
            "virtual-size": self.length,
            "filename": self.name,
            "format": self.driver,
        });
        if let (Some(allocated), Some(map)) = (self.allocated, info.as_object_mut()) {
            map.insert("actual-size".to_owned(), json!(allocated));
        }
        if matches!(self.driver, "file" | HOST_DEVICE) {
            info["format-specific"] = json!({ "type": "file", "data": {} });
            info["dirty-flag"] = json!(false);
        }
        json!({ "name": node, "info": info })
    }
}

fn snapshot_json(one: &Snapshot) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut all = json!({
        "id": one.id(),
        "name": one.name(),
        "vm-state-size": one.vm_state_size,
        "date-sec": one.seconds,
        "date-nsec": one.nanoseconds,
        "vm-clock-sec": one.vm_clock / SECOND,
        "vm-clock-nsec": one.vm_clock % SECOND,
    });
    if let Some(icount) = one.icount {
        all["icount"] = json!(icount);
    }
    all
}

/// What only qcow2 images have.
fn specific(image: &qcow2::Image) -> Outcome<Value> {
    let header = image.header();
    let mut all = json!({
        "compat": if header.version < 3 { "0.10" } else { "1.1" },
        "compression-type": header.compression.name(),
        "refcount-bits": 1u64 << header.refcount_order.min(6),
    });
    if let Some(encrypt) = crypt::describe_qcow2(image)? {
        all["encrypt"] = encrypt;
    }
    if let (3.., Value::Object(map)) = (header.version, &mut all) {
        map.insert("lazy-refcounts".to_owned(), json!(header.has_lazy_refcounts()));
        if header.has_data_file() {
            let name = header.data_file().map_err(|e| Fail::new(reason(&e)))?;
            map.extend(name.map(|name| ("data-file".to_owned(), json!(name))));
            map.insert("data-file-raw".to_owned(), json!(header.data_file_is_raw()));
        }
        map.insert("corrupt".to_owned(), json!(header.is_corrupt()));
        map.insert("extended-l2".to_owned(), json!(header.extended_l2()));
        let bitmaps = image.bitmaps().map_err(|e| Fail::new(reason(&e)))?;
        if !bitmaps.is_empty() {
            map.insert("bitmaps".to_owned(), bitmaps.iter().map(bitmap).collect());
        }
    }
    Ok(all)
}

fn bitmap(one: &qcow2::BitmapInfo) -> Value {
    let flags = [("in-use", one.in_use), ("auto", one.auto)];
    let flags: Vec<&str> = flags.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    json!({ "name": one.name, "granularity": one.granularity, "flags": flags })
}

/// Writes JSON for people: one line for each value, names with spaces.
fn dump(value: &Value, depth: usize, out: &mut String) {
    let indent = "    ".repeat(depth);
    let members: Vec<(String, &Value)> = match value {
        Value::Object(_) => {
            json::members(value).into_iter().map(|(k, v)| (k.replace('-', " "), v)).collect()
        }
        Value::Array(all) => all.iter().enumerate().map(|(n, v)| (format!("[{n}]"), v)).collect(),
        _ => return,
    };
    for (name, value) in members {
        match value {
            Value::Object(_) | Value::Array(_) => {
                let _ = writeln!(out, "{indent}{name}:");
                dump(value, depth + 1, out);
            }
            Value::String(text) => {
                let _ = writeln!(out, "{indent}{name}: {text}");
            }
            scalar => {
                let _ = writeln!(out, "{indent}{name}: {scalar}");
            }
        }
    }
}
