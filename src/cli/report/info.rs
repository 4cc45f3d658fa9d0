//! `vdisk info`: what a disk is. It works while another process holds the disk.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args as ClapArgs;
use serde::Serialize;
use vdisk::chain::{Chain, Layer};
use vdisk::change;
use vdisk::change::snapshot;
use vdisk::control::Request;
use vdisk::family;
use vdisk::family::forest::Node;
use vdisk::family::tree::Family;
use vdisk::image::{self, Identity, Role};
use vdisk::jail::{Jail, Reach, Work};
use vdisk::open;
use vdisk::open::{Format, OpenOptions};
use vdisk::storage::{FileOptions, FileStorage, Storage, holders};
use vdisk::{ErrorKind, Result};

use crate::cli::open::options::{Moment, Opening};
use crate::cli::open::{held, jail};
use crate::cli::snapshot::show;
use crate::cli::terminal::{output, size};

/// Show what a disk is: format, sizes, what it stands on, who holds it.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    /// Show each layer below it as well.
    #[arg(long)]
    chain: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    layer: LayerReport,
    holders: Vec<Holder>,
    /// What the process that holds it says, where it can be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<serde_json::Value>,
    /// Oldest first.
    snapshots: Vec<Snapshot>,
    /// What is kept aside for undo.
    kept_aside: Option<serde_json::Value>,
    /// Files of other disks that stand on it, in the directories where its family is.
    clones: Vec<String>,
    /// The same for people.
    #[serde(skip)]
    kept: Option<String>,
    /// The layers from the disk down, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<Vec<LayerReport>>,
}

#[derive(Serialize)]
struct LayerReport {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    allocated_size: u64,
    cluster_size: Option<u64>,
    format_specific: Option<Details>,
    backing: Option<Backing>,
    label: Option<Label>,
}

#[derive(Serialize)]
struct Details {
    version: Option<u32>,
    compression_type: Option<&'static str>,
    refcount_bits: Option<u32>,
    lazy_refcounts: Option<bool>,
    extended_l2: Option<bool>,
    dirty: Option<bool>,
    corrupt: Option<bool>,
    encryption: Option<&'static str>,
    data_file: Option<String>,
    internal_snapshots: Option<u32>,
}

#[derive(Serialize)]
struct Backing {
    name: String,
    /// What the name means; `None` where it is no path that would be opened.
    path: Option<String>,
    format: Option<String>,
}

#[derive(Serialize)]
struct Label {
    disk_id: String,
    layer_id: String,
    content_id: String,
    /// Whether the content id still speaks for the contents.
    content_vouched: bool,
    role: &'static str,
    parent_layer_id: Option<String>,
    snapshot_name: Option<String>,
    description: Option<String>,
    time_ms: Option<u64>,
}

#[derive(Serialize)]
struct Snapshot {
    name: String,
    time_ms: u64,
    allocated_size: u64,
    filename: String,
}

#[derive(Clone, Serialize)]
struct Holder {
    pid: u32,
    command: String,
}

pub fn run(args: &Args) -> Result<u8> {
    let (disk, options) = args.opening.file_at(&args.disk, &args.moment)?;
    let options = OpenOptions { shared: true, passphrase: None, ..options };
    let held = Held::of(&disk)?;
    // Which files a disk names is what is looked for: any of them is read, and none written.
    let mut jail = Jail::new(Work::Command);
    jail.reach(Path::new("/"), Reach::Read);
    jail::close(jail)?;
    let mut report = look(args, &disk, &options, &held);
    for _ in 1..LOOKS {
        let Err(error) = &report else { break };
        if error.kind() == ErrorKind::Unsupported || held.holders.is_empty() {
            break;
        }
        // Its layers may have been exchanged between a look at one and a look at the next.
        std::thread::sleep(PAUSE);
        report = look(args, &disk, &options, &held);
    }
    let report = report?;
    if args.json {
        output::json(&report)?
    } else {
        output::text(&report.text())?
    }
    Ok(0)
}

/// How often a disk in use is looked at that cannot be made out, and how long after the last time.
const LOOKS: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// Who holds the disk: what is asked of other processes, and not of the disk.
#[derive(Clone)]
struct Held {
    holders: Vec<Holder>,
    /// What cannot be asked is shown as its file says.
    answer: Option<serde_json::Value>,
}

impl Held {
    fn of(disk: &Path) -> Result<Held> {
        let file = FileStorage::open(disk, FileOptions { access: None, write: false })?;
        let holders = holders(file.file()).into_iter();
        let holders = holders.map(|h| Holder { pid: h.pid, command: h.command }).collect();
        Ok(Held { holders, answer: held::ask(disk, &Request::Info).unwrap_or_default() })
    }
}

fn look(args: &Args, disk: &Path, options: &OpenOptions, held: &Held) -> Result<Report> {
    let head = open::open_image(disk, options)?;
    let Held { holders, answer: held } = held.clone();
    let layers = match args.chain {
        false => None,
        true => {
            let chain = open_chain(disk, options)?;
            Some(chain.all_layers().iter().map(LayerReport::of).collect::<Result<Vec<_>>>()?)
        }
    };
    // What is no qcow2 image has no family, whatever its guest wrote.
    let family = if head.format == Format::Qcow2 { Family::read(disk)? } else { None };
    let kept = family.as_ref().map_or(Ok(None), snapshot::kept_aside)?;
    let mut layer = LayerReport::of(&head)?;
    if let Some(size) = held.as_ref().and_then(|h| h.get("virtual_size")?.as_u64()) {
        layer.virtual_size = size;
    }
    Ok(Report {
        kept_aside: kept.as_ref().map(show::kept_value),
        kept: kept.as_ref().map(show::kept_text),
        layer,
        holders,
        held,
        snapshots: snapshots(family.as_ref()),
        clones: clones(disk)?,
        chain: layers,
    })
}

fn snapshots(family: Option<&Family>) -> Vec<Snapshot> {
    let all = family.into_iter().flat_map(Family::snapshots).map(|member| Snapshot {
        name: member.label.name.clone(),
        time_ms: member.label.time,
        allocated_size: member.peek.allocated,
        filename: output::path(&member.path),
    });
    all.collect()
}

fn clones(disk: &Path) -> Result<Vec<String>> {
    let trees = family::forest::trees_of(disk)?;
    let Some(node) = trees.iter().find_map(|t| t.find(disk)) else { return Ok(Vec::new()) };
    let own = node.label().map(|l| l.disk);
    let others = node.children.iter().filter(|c| own.is_none() || c.label().map(|l| l.disk) != own);
    Ok(others.map(|c| output::path(&head_of(c, c).unwrap_or(c).path)).collect())
}

/// The head of the disk that `first` belongs to, at or above `node`.
fn head_of<'a>(node: &'a Node, first: &Node) -> Option<&'a Node> {
    let (label, disk) = (node.label()?, first.label()?.disk);
    if label.disk == disk && matches!(label.role, Role::Head | Role::Base) {
        return Some(node);
    }
    node.children.iter().find_map(|child| head_of(child, first))
}

/// Opens the chain as it is; that a base has changed is told, but is no reason not to look.
fn open_chain(disk: &Path, options: &OpenOptions) -> Result<Chain> {
    match change::open(disk, options) {
        Err(error) if error.kind() == ErrorKind::BaseChanged => {
            eprintln!("vdisk: warning: {error}");
            change::open(disk, &OpenOptions { unprotected: true, ..options.clone() })
        }
        other => other,
    }
}

impl LayerReport {
    fn of(layer: &Layer) -> Result<LayerReport> {
        let image = &layer.image;
        let identity = image.identity().map_err(|e| e.at_path(&layer.path))?;
        let details = image.details();
        Ok(LayerReport {
            filename: output::path(&layer.path),
            format: layer.format.name(),
            virtual_size: image.size(),
            allocated_size: layer.file.allocated()?,
            cluster_size: (image.granularity().bytes() > 1).then(|| image.cluster().bytes()),
            format_specific: details.map(Details::of),
            backing: identity.backing.as_ref().map(|b| Backing {
                name: b.name.clone(),
                path: open::resolve(&layer.path, &b.name).ok().map(output::path),
                format: b.format.clone(),
            }),
            label: Label::of(&identity),
        })
    }

    fn text(&self, out: &mut String) {
        let mut line = |name: &str, value: String| {
            // Writing to a String does not fail.
            let _ = writeln!(out, "{name}: {value}");
        };
        let sized = |bytes| format!("{} ({bytes} bytes)", size::human(bytes));
        line("image", self.filename.clone());
        line("file format", self.format.to_owned());
        line("virtual size", sized(self.virtual_size));
        line("allocated", sized(self.allocated_size));
        if let Some(cluster) = self.cluster_size {
            line("cluster size", cluster.to_string());
        }
        if let Some(details) = &self.format_specific {
            line("features", details.text());
        }
        if let Some(backing) = &self.backing {
            let format = backing.format.as_deref().unwrap_or("format not recorded");
            line("backing file", format!("{} ({format})", backing.name));
            if let Some(path) = backing.path.as_ref().filter(|p| **p != backing.name) {
                line("backing path", path.clone());
            }
        }
        if let Some(label) = &self.label {
            let name = label.snapshot_name.iter().map(|n| format!(" '{n}'")).collect::<String>();
            line("role", format!("{}{name}", label.role));
            line("disk id", label.disk_id.clone());
            line("layer id", label.layer_id.clone());
        }
    }
}

impl Details {
    fn of(details: image::Details) -> Details {
        Details {
            version: details.version,
            compression_type: details.compression,
            refcount_bits: details.refcount_bits,
            lazy_refcounts: details.lazy_refcounts,
            extended_l2: details.extended_l2,
            dirty: details.dirty,
            corrupt: details.corrupt,
            encryption: details.encryption,
            data_file: details.data_file,
            internal_snapshots: details.internal_snapshots,
        }
    }

    fn text(&self) -> String {
        let said = |what: Option<bool>, name: &str| what.unwrap_or(false).then(|| name.to_owned());
        let counted = self.internal_snapshots.filter(|n| *n > 0);
        let all = [
            self.version.map(|v| format!("version {v}")),
            self.compression_type.map(|c| format!("compression {c}")),
            self.refcount_bits.map(|b| format!("{b}-bit refcounts")),
            said(self.lazy_refcounts, "lazy refcounts"),
            said(self.extended_l2, "extended l2"),
            said(self.dirty, "DIRTY: not closed well"),
            said(self.corrupt, "CORRUPT"),
            self.encryption.map(|e| format!("encryption {e}")),
            self.data_file.as_ref().map(|name| format!("data in '{name}'")),
            counted.map(|n| format!("{n} internal snapshots")),
        ];
        all.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

impl Label {
    fn of(identity: &Identity) -> Option<Label> {
        let label = identity.label.as_ref()?;
        let filled = |text: &String| Some(text.clone()).filter(|t| !t.is_empty());
        Some(Label {
            disk_id: label.disk.to_string(),
            layer_id: label.layer.to_string(),
            content_id: label.content.to_string(),
            content_vouched: identity.vouched,
            role: label.role.name(),
            parent_layer_id: label.parent.and_then(|p| p.labelled()).map(|id| id.to_string()),
            snapshot_name: filled(&label.name),
            description: filled(&label.description),
            time_ms: Some(label.time).filter(|t| *t != 0),
        })
    }
}

impl Report {
    fn text(&self) -> String {
        let mut out = String::new();
        self.layer.text(&mut out);
        for Holder { pid, command } in &self.holders {
            let _ = writeln!(out, "in use by: {command} (pid {pid})");
        }
        let said = |of: &serde_json::Value, key: &str| Some(of.get(key)?.as_str()?.to_owned());
        if let Some(doing) = self.held.as_ref().and_then(|h| said(h, "doing")) {
            let _ = writeln!(out, "held as: {doing}");
        }
        if let Some(running) = self.held.as_ref().and_then(|h| h.get("running")) {
            let number = |key: &str| running.get(key).and_then(serde_json::Value::as_u64);
            if let Some(what) = said(running, "what") {
                let (done, total) =
                    (number("done").unwrap_or_default(), number("total").unwrap_or_default());
                let (done, total) = (size::human(done), size::human(total));
                let _ = writeln!(out, "under way: {what} ({done} of {total})");
            }
        }
        for one in &self.snapshots {
            let _ = writeln!(out, "snapshot: {} ({})", one.name, size::human(one.allocated_size));
        }
        if let Some(kept) = &self.kept {
            let _ = writeln!(out, "{kept}");
        }
        for clone in &self.clones {
            let _ = writeln!(out, "clone: {}", clone);
        }
        for layer in self.chain.iter().flatten().skip(1) {
            out.push('\n');
            layer.text(&mut out);
        }
        out
    }
}
