//! `vdisk map`: the extents of a disk and the layer that each comes from.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde::Serialize;
use vdisk::Result;
use vdisk::addr::HostOffset;
use vdisk::block::BlockDevice;
use vdisk::chain::{Chain, Layer, MapExtent};
use vdisk::image::{Mapping, Role};

use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail;
use crate::cli::open::options::{Moment, Opening};
use crate::cli::report::picture::map::Grid;
use crate::cli::terminal::output;

/// Lines that are printed at a time.
const BATCH: usize = 1 << 16;

/// Show the extents of a disk and the layer that each comes from.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// As an SVG picture: the layer that each part of the disk comes from.
    #[arg(long, conflicts_with = "json")]
    svg: bool,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    /// Read it although a base has changed under it.
    #[arg(long)]
    accept_base: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    start: u64,
    length: u64,
    depth: usize,
    /// Whether a layer says anything of it; else it reads as zeroes.
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    /// Where the bytes stand in the layer's file; `None` where nothing is stored as it is.
    offset: Option<u64>,
    filename: Option<Cow<'a, str>>,
}

impl<'a> Line<'a> {
    fn of(extent: &MapExtent, layers: &'a [Layer]) -> Line<'a> {
        let present = extent.mapping != Mapping::Unallocated;
        let layer = layers.get(extent.depth).filter(|_| present);
        Line {
            start: extent.start,
            length: extent.len,
            depth: extent.depth,
            present,
            zero: matches!(extent.mapping, Mapping::Zero { .. } | Mapping::Unallocated),
            data: matches!(extent.mapping, Mapping::Data { .. } | Mapping::Compressed { .. }),
            compressed: matches!(extent.mapping, Mapping::Compressed { .. }),
            offset: match extent.mapping {
                Mapping::Data { host: HostOffset(host), .. } => Some(host),
                _ => None,
            },
            filename: layer.map(|l| l.path.to_string_lossy()),
        }
    }

    fn text(&self) -> String {
        let kind = match (self.compressed, self.data, self.present) {
            (true, ..) => "compressed",
            (_, true, _) => "data",
            (_, _, true) => "zero",
            _ => "hole",
        };
        let host = self.offset.map_or("-".to_owned(), |o| format!("{o:#x}"));
        let file = self.filename.as_deref().unwrap_or("-");
        let (start, length) = (format!("{:#x}", self.start), format!("{:#x}", self.length));
        format!("{start:<16}{length:<16}{kind:<12}{host:<16}{file}\n")
    }
}

pub fn run(args: &Args) -> Result<u8> {
    let using = Use { accept_base: args.accept_base, ..args.opening.reading(&args.moment) };
    let disk = disk::open(&args.disk, &Use { tables: true, ..using })?;
    let layers = disk.all_layers();
    jail::close_on_open_files()?;
    if args.svg {
        return picture(&disk, &layers, &args.disk);
    }
    let header = format!("{:<16}{:<16}{:<12}{:<16}File\n", "Offset", "Length", "Kind", "Mapped to");
    output::text(if args.json { "[" } else { &header })?;
    let mut first = true;
    let mut walk = Walk { disk: &disk, pos: 0, ahead: None };
    loop {
        let mut text = String::new();
        for _ in 0..BATCH {
            let Some(extent) = walk.next()? else { break };
            let line = Line::of(&extent, &layers);
            if args.json {
                text.push_str(if first { "\n  " } else { ",\n  " });
                text.push_str(&output::json_line(&line)?);
            } else {
                text.push_str(&line.text());
            }
            first = false;
        }
        if text.is_empty() {
            break;
        }
        output::text(&text)?;
    }
    if args.json {
        output::text(if first { "]\n" } else { "\n]\n" })?;
    }
    Ok(0)
}

fn picture(disk: &Chain, layers: &[Layer], path: &Path) -> Result<u8> {
    let mut grid = Grid::new(disk.size(), layers.len());
    let mut walk = Walk { disk, pos: 0, ahead: None };
    while let Some(extent) = walk.next()? {
        match extent.mapping {
            Mapping::Data { .. } | Mapping::Compressed { .. } => {
                grid.add(extent.start, extent.len, Some(extent.depth));
            }
            Mapping::Zero { .. } => grid.add(extent.start, extent.len, None),
            Mapping::Unallocated => {}
        }
    }
    let names: Vec<String> = layers.iter().map(named).collect();
    let title = path.file_name().unwrap_or_default().to_string_lossy();
    output::text(&grid.svg(&title, &names))?;
    Ok(0)
}

/// A layer's file and, where it is a snapshot, that one's name.
fn named(layer: &Layer) -> String {
    let file = layer.path.file_name().unwrap_or_default().to_string_lossy();
    let label = layer.image.identity().ok().and_then(|identity| identity.label);
    match label.filter(|label| label.role == Role::Snapshot) {
        Some(label) => format!("{} ({file})", label.name),
        None => file.into_owned(),
    }
}

/// Walks over a disk, joining what belongs together.
struct Walk<'a> {
    disk: &'a Chain,
    pos: u64,
    ahead: Option<MapExtent>,
}

impl Walk<'_> {
    fn next(&mut self) -> Result<Option<MapExtent>> {
        let mut current = self.ahead.take();
        let size = self.disk.size();
        while self.pos < size {
            let extent = self.disk.map(self.pos, size - self.pos, true)?;
            self.pos += extent.len;
            match &mut current {
                None => current = Some(extent),
                Some(last) if joins(last, &extent) => last.len += extent.len,
                Some(_) => {
                    self.ahead = Some(extent);
                    break;
                }
            }
        }
        Ok(current)
    }
}

/// Whether `next` goes on as `last` does. Whether data may be overwritten makes no difference here.
fn joins(last: &MapExtent, next: &MapExtent) -> bool {
    let same = match (last.mapping, next.mapping) {
        (Mapping::Data { host: a, .. }, Mapping::Data { host: b, .. }) => {
            a.checked_add(last.len) == Some(b)
        }
        (Mapping::Compressed { .. }, Mapping::Compressed { .. })
        | (Mapping::Zero { .. }, Mapping::Zero { .. })
        | (Mapping::Unallocated, Mapping::Unallocated) => true,
        _ => false,
    };
    same && last.depth == next.depth
}
