//! `qemu-img measure`: how much room an image would take.

use serde_json::json;
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::luks::Header;
use vdisk::qcow2::{BitmapInfo, CreateOptions, Encryption, Method, Preallocation};

use crate::qemu_img::encryption::crypt;
use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::images::{bitmaps, open, status};
use crate::qemu_img::jail::Opens;
use crate::qemu_img::options::args::{self, long_value, value};
use crate::qemu_img::options::chosen::Chosen;
use crate::qemu_img::options::create as options;
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, SHARED};
use crate::qemu_img::options::opts;
use crate::qemu_img::{json, size};

/// The largest L1 table, in bytes.
const MAX_L1: u64 = 32 << 20;

/// What an image takes, in bytes.
struct Room {
    required: u64,
    full: u64,
    /// Bitmaps that could be copied along.
    bitmaps: Option<u64>,
}

pub fn run(args: &[String]) -> Outcome {
    let known = [
        FORMAT,
        value("O"),
        value("o"),
        value("l"),
        SHARED,
        OUTPUT,
        OBJECT,
        IMAGE_OPTS,
        long_value("size"),
    ];
    let given = args::parse(args, &known)?;
    let output = given.output()?;
    let list = opts::joined(given.all("o"))?;
    let size = given.get("size").map(|text| size::operand("image size", text)).transpose()?;
    if given.names.len() > 1 {
        return Err(Fail::new("At most one filename argument is allowed."));
    }
    let name = given.names.first();
    if let Some(text) = given.get("l") {
        open::check_snapshot_list(text)?;
    }
    if name.is_none() {
        let needs = [("f", "-f"), ("l", "-l"), ("image-opts", "--image-opts")];
        if needs.iter().any(|(key, _)| given.has(key)) {
            return Err(Fail::new("--image-opts, -f, and -l require a filename argument."));
        }
    }
    if name.is_none() && size.is_none() {
        return Err(Fail::new("Either --size N or one filename must be specified."));
    }
    if name.is_some() && size.is_some() {
        return Err(Fail::new("--size N cannot be used together with a filename."));
    }
    let format = given.get("O").unwrap_or("raw");
    let known = options::with_file(format)?;
    if !matches!(format, "qcow2" | "raw" | "luks") {
        let why = format!("Block driver '{format}' does not support size measurement");
        return Err(Fail::new(why));
    }
    let mut bitmaps: Option<Vec<BitmapInfo>> = None;
    let source = match name {
        None => None,
        Some(name) => {
            let source = given.source(name)?;
            Opens::new().read(&source).close();
            let (opened, chain) = open::layer_and_chain(&source, given.reading())?;
            let image = opened.qcow2.filter(|q| q.header().version >= 3);
            let all = image.map(|q| q.bitmaps()).transpose();
            bitmaps = all.map_err(|e| Fail::new(reason(&e)))?;
            Some(match given.get("l") {
                Some(snapshot) => {
                    drop(chain);
                    open::at_snapshot(&source, snapshot, given.reading())?
                }
                None => chain,
            })
        }
    };
    let mut chosen = Chosen::parse(known, list.as_deref().unwrap_or("")).map_err(|e| {
        e.report();
        Fail::new(format!("Invalid options for file format '{format}'"))
    })?;
    chosen.add_defaults()?;
    let size = size.or_else(|| source.as_ref().map(|c| c.size())).unwrap_or(0);
    let room = match format {
        "qcow2" => qcow2(&chosen, size, source.as_ref(), bitmaps.as_deref())?,
        "luks" => {
            let (_, options) = crypt::for_luks(&chosen)?;
            let all = Header::area_len(options.spec).saturating_add(size);
            Room { required: all, full: all, bitmaps: None }
        }
        _ => Room { required: size, full: size, bitmaps: None },
    };
    print(&room, output);
    Ok(0)
}

fn print(room: &Room, output: Output) {
    match output {
        Output::Human => {
            println!("required size: {}\nfully allocated size: {}", room.required, room.full);
            if let Some(bitmaps) = room.bitmaps {
                println!("bitmaps size: {bitmaps}");
            }
        }
        Output::Json => {
            let mut all = json!({ "required": room.required, "fully-allocated": room.full });
            if let Some(bitmaps) = room.bitmaps {
                all["bitmaps"] = json!(bitmaps);
            }
            println!("{}", json::pretty(&all));
        }
    }
}

fn qcow2(
    chosen: &Chosen,
    size: u64,
    source: Option<&Chain>,
    bitmaps: Option<&[BitmapInfo]>,
) -> Outcome<Room> {
    let options = options::qcow2(chosen, size)?;
    let cluster = options.cluster;
    let virtual_size = cluster.ceil(size);
    let entry = if options.extended_l2 { 16 } else { 8 };
    let l2_tables = cluster.count(cluster.count(virtual_size).saturating_mul(entry));
    if l2_tables.saturating_mul(8) > MAX_L1 {
        return Err(Fail::new("The image size is too large (try using a larger cluster size)"));
    }
    let keys = match &options.encryption {
        Some(Encryption { method: Method::Luks(luks), .. }) => {
            cluster.ceil(Header::area_len(luks.spec))
        }
        _ => 0,
    };
    let metadata = metadata(&options, virtual_size, l2_tables) + keys;
    let data = match (options.preallocation, source) {
        (Preallocation::Falloc | Preallocation::Full, _) => virtual_size,
        (_, None) => 0,
        // How much of the source the new backing file would show is not known: perhaps nothing.
        (_, Some(_)) if options.backing.is_some() => virtual_size,
        (_, Some(source)) => stored(source, &options)?,
    };
    let required = metadata + data;
    // Version 2 has no place for them.
    let bitmaps = bitmaps.filter(|_| options.version >= 3);
    let bitmaps = bitmaps.map(|all| bitmaps::room(all, size, options.cluster));
    Ok(Room { required, full: metadata + virtual_size, bitmaps })
}

/// Header and tables of an image whose clusters are all allocated.
fn metadata(options: &CreateOptions, virtual_size: u64, l2_tables: u64) -> u64 {
    let cluster = options.cluster;
    let l1 = cluster.ceil(l2_tables * 8);
    let l2 = l2_tables * cluster.bytes();
    let rest = cluster.bytes() + l1 + l2;
    rest + refcounts(options, rest + virtual_size)
}

/// The refcount blocks and their table for `bytes` of other things: they count themselves too.
fn refcounts(options: &CreateOptions, bytes: u64) -> u64 {
    let cluster = options.cluster;
    let per_block = cluster.bytes() * 8 / u64::from(options.refcount_bits);
    let per_table = cluster.bytes() / 8;
    let clusters = cluster.count(bytes);
    let (mut blocks, mut table) = (0, 0);
    loop {
        let total = clusters + blocks + table;
        let now = total.div_ceil(per_block);
        let tables = now.div_ceil(per_table);
        if (now, tables) == (blocks, table) {
            return (blocks + table) * cluster.bytes();
        }
        (blocks, table) = (now, tables);
    }
}

/// The bytes of those clusters that hold anything.
fn stored(source: &Chain, options: &CreateOptions) -> Outcome<u64> {
    let (cluster, size) = (options.cluster, source.size());
    let layers = &source.all_layers();
    let (mut at, mut bytes) = (0, 0);
    while at < size {
        let status = status::at(layers, at, size - at)?;
        if status.zero {
            at += status.len;
            continue;
        }
        // Whole clusters of the new image, none of them twice.
        let end = cluster.ceil(at + status.len);
        bytes += end - cluster.floor(at);
        at = end;
    }
    Ok(bytes)
}
