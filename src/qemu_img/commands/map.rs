//! `qemu-img map`: which file holds which part of a disk.

use vdisk::addr::HostOffset;
use vdisk::chain::Layer;
use vdisk::open::Format;

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::images::open;
use crate::qemu_img::images::status::{self, Status};
use crate::qemu_img::jail::Opens;
use crate::qemu_img::options::args::{self, value};
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, SHARED};
use crate::qemu_img::size;

pub fn run(args: &[String]) -> Outcome {
    let range = [value("s").or("start-offset"), value("l").or("max-length")];
    let known = [FORMAT, SHARED, OUTPUT, OBJECT, IMAGE_OPTS, range[0], range[1]];
    let given = args::parse(args, &known)?;
    let output = given.output()?;
    let start = given.get("s").map(|t| size::operand("start offset", t)).transpose()?;
    let most = given.get("l").map(|t| size::operand("max length", t)).transpose()?;
    let source = given.source(given.only_name()?)?;
    Opens::new().read(&source).close();
    let (opened, chain) = open::layer_and_chain(&source, given.reading())?;
    let layers = chain.all_layers();
    let size = chain.head().image.size();
    let wanted = start.unwrap_or(0);
    let start = wanted.min(size);
    let end = most.map_or(size, |m| start.saturating_add(m).min(size));
    let mut report = Report { output, layers: layers.clone(), uri: opened.uri };
    report.begin();
    let (mut at, mut current): (u64, Option<(u64, Status)>) = (start, None);
    while at < end {
        let next = shown(&layers, status::at(&layers, at, end - at)?);
        match &mut current {
            Some((_, before)) if continues(before, &next) => before.len += next.len,
            _ => {
                if let Some((from, status)) = current.replace((at, next)) {
                    report.entry(from, &status, false)?;
                }
            }
        }
        at += next.len;
    }
    match current {
        Some((from, status)) => report.entry(from, &status, true)?,
        // Nothing is mapped of nothing, and JSON says so.
        None => report.entry(wanted, &Status::default(), true)?,
    }
    report.end();
    Ok(0)
}

/// What is told of a stretch: of VHDX images nobody says where their data stand, or which are zero.
fn shown(layers: &[Layer], status: Status) -> Status {
    let of = layers.get(status.depth);
    if !of.is_some_and(|l| l.format == Format::Vhdx && l.image.backing().is_none()) {
        return status;
    }
    Status { data: true, zero: false, allocated: true, host: None, ..status }
}

fn continues(before: &Status, next: &Status) -> bool {
    let follows = match (before.host, next.host) {
        (None, None) => true,
        (Some(a), Some(b)) => a + before.len == b,
        _ => false,
    };
    follows && Status { len: 0, host: None, ..*before } == Status { len: 0, host: None, ..*next }
}

struct Report {
    output: Output,
    /// The layers, from the head down.
    layers: Vec<Layer>,
    /// The name of what holds the head, where that is no file.
    uri: Option<String>,
}

impl Report {
    fn begin(&self) {
        match self.output {
            Output::Human => println!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"),
            Output::Json => print!("["),
        }
    }

    fn entry(&mut self, start: u64, status: &Status, last: bool) -> Outcome<()> {
        match self.output {
            Output::Human => self.line(start, status),
            Output::Json => {
                let host = status.host.map(|h| self.place(status.depth, h).1);
                let offset = host.map(|h| format!(", \"offset\": {h}")).unwrap_or_default();
                print!(
                    "{{ \"start\": {start}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
                     \"data\": {}, \"compressed\": {}{offset}}}{}",
                    status.len,
                    status.depth,
                    status.allocated,
                    status.zero,
                    status.data,
                    status.compressed,
                    if last { "" } else { ",\n" }
                );
                Ok(())
            }
        }
    }

    fn line(&self, start: u64, status: &Status) -> Outcome<()> {
        if !status.data || status.zero {
            return Ok(());
        }
        let Some(host) = status.host else {
            return Err(Fail::new("File contains external, encrypted or compressed clusters."));
        };
        let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
        let (name, host) = self.place(status.depth, host);
        println!("{:<16}{:<16}{:<16}{}", hex(start), hex(status.len), hex(host), name);
        Ok(())
    }

    /// The file of a layer that holds what the layer has at `host`, and where in it.
    fn place(&self, depth: usize, host: u64) -> (String, u64) {
        let Some(layer) = self.layers.get(depth) else { return (String::new(), host) };
        let uri = self.uri.as_ref().filter(|_| depth == 0);
        let own = uri.cloned().unwrap_or_else(|| layer.path.display().to_string());
        match layer.image.place(HostOffset(host)) {
            Some((name, at)) => (open::full_backing_name(&own, name), at.0),
            // The name is the one that the image has for it.
            None => {
                let data_file = layer.image.details().and_then(|details| details.data_file);
                (data_file.unwrap_or(own), host)
            }
        }
    }

    fn end(&self) {
        if self.output == Output::Json {
            println!("]");
        }
    }
}
