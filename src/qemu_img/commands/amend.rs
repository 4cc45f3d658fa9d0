//! `qemu-img amend`: changes the options of an image that is there.

use vdisk::block::BlockDevice;
use vdisk::image::Backing;
use vdisk::qcow2::{Amend, AmendProgress, Header};

use crate::qemu_img::encryption::keys;
use crate::qemu_img::fail::{Fail, Outcome, os_text, reason, report};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::args::{self, Given, flag, long, value};
use crate::qemu_img::options::chosen::Chosen;
use crate::qemu_img::options::create as options;
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, QUIET};
use crate::qemu_img::options::known::help;
use crate::qemu_img::options::opts::{self, List};
use crate::qemu_img::progress::{Parts, Progress};

/// Disks consist of whole sectors.
const SECTOR: u64 = 512;
/// Incompatible features that do not stand in the way of an older version: not closed well, corrupt,
/// and the way of compression as long as nothing is compressed.
const IGNORED: u64 = 0b1011;
/// How a header says that its data are encrypted by LUKS.
const LUKS: u32 = 2;
/// An incompatible feature: the data stands in another file.
const DATA_FILE: u64 = 1 << 2;

pub fn run(args: &[String]) -> Outcome {
    let known =
        [FORMAT, value("o"), value("t"), flag("p"), QUIET, long("force"), OBJECT, IMAGE_OPTS];
    let given = args::parse(args, &known)?;
    let Some(list) = opts::joined(given.all("o"))? else {
        return Err(Fail::usage("Must specify options (-o)"));
    };
    let mut progress = Progress::new(given.has("p") && !given.has("q"), 1.0);
    let ended = amend_named(&given, &list, &mut progress);
    progress.end();
    ended
}

fn amend_named(given: &Given, list: &str, progress: &mut Progress) -> Outcome {
    let help = opts::asks_for_help(list);
    if let (true, Some(format)) = (help, given.get("f")) {
        return print_help(format);
    }
    let [name] = &given.names[..] else {
        return Err(Fail::new("Expecting one image file name"));
    };
    given.check_cache("t", "cache")?;
    let source = given.source(name)?;
    check_format(&source)?;
    let opens = Opens::new().changed(&source);
    match (List::parse(list, None).get("backing_file"), source.path()) {
        (Some(backing), Ok(path)) => {
            opens.told(&open::full_backing_name(&path.display().to_string(), backing))
        }
        _ => opens,
    }
    .close();
    let opened = open::on_its_chain(&source, Use::writing())?;
    let format = opened.layer.format.name();
    if help {
        return print_help(format);
    }
    let force = given.has("force");
    if let Some(image) = &opened.luks {
        let chosen = Chosen::parse(options::of_amend(format)?, list)?;
        let change = keys::read(&chosen, "", source.key.secret.as_deref())?;
        progress.at(0.0);
        if let Some(change) = change {
            let done = image.change_keys(|header, area| change.make(header, area, force));
            done.map_err(|e| keys::failed(&e))?;
        }
        progress.at(100.0);
        return Ok(0);
    }
    let Some(image) = &opened.qcow2 else {
        return Err(Fail::new(format!(
            "Format driver '{format}' does not support option amendment"
        )));
    };
    let header = image.header();
    drop(opened);
    let chosen = Chosen::parse(options::of_amend(format)?, list)?;
    let keys = change_of_keys(&source, &header, &chosen)?;
    progress.at(0.0);
    let amended = amend(&source, &header, &chosen, progress);
    // Last: the passphrase that opens the image may be the one that goes.
    let amended = amended.and_then(|()| change_keys(&source, keys, force));
    progress.at(100.0);
    amended.map(|()| 0)
}

/// Refuses a format of which nothing can be changed.
fn check_format(source: &Source) -> Outcome<()> {
    let format = match &source.format {
        Some(format) => format.clone(),
        None => open::probe(source, Use::looking(false))?.name().to_owned(),
    };
    if matches!(format.as_str(), "vmdk" | "vdi" | "vpc" | "vhdx") {
        let text = format!("Format driver '{format}' does not support option amendment");
        return Err(Fail::new(text));
    }
    Ok(())
}

fn print_help(format: &str) -> Outcome {
    print!("Amend options for '{format}':\n{}", help(&options::of_amend(format)?));
    Ok(0)
}

/// What the image becomes first, then its size, then an older version: in this order each step
/// has what it needs.
fn amend(
    source: &Source,
    header: &Header,
    chosen: &Chosen,
    progress: &mut Progress,
) -> Outcome<()> {
    let version = match chosen.text("compat") {
        None => header.version,
        Some("0.10" | "v2") => 2,
        Some("1.1" | "v3") => 3,
        Some(other) => return Err(Fail::new(format!("Unknown compatibility level {other}"))),
    };
    check(header, chosen, version)?;
    let bits = chosen.number("refcount_bits").map(|b| u32::try_from(b).unwrap_or(u32::MAX));
    let unchanged = 1 << header.refcount_order;
    let first = Amend {
        version: (version > header.version).then_some(version),
        refcount_bits: bits,
        lazy_refcounts: chosen.switch("lazy_refcounts"),
        backing: None,
        data_file: chosen
            .text("data_file")
            .map(|name| (!name.is_empty()).then_some(name.to_owned())),
        data_file_raw: chosen.switch("data_file_raw").filter(|_| header.has_data_file()),
    };
    let parts =
        u64::from(version != header.version) + u64::from(bits.is_some_and(|b| b != unchanged));
    let mut parts = Parts::new(parts);
    let mut watch = |step| progress.at(parts.percent(step));
    change(source, &first, &mut watch)?;
    if let Some(size) = chosen.number("size") {
        resize(source, size)?;
    }
    if version < header.version {
        check_snapshot_sizes(source)?;
        drop_bitmaps(source)?;
        let last = Amend { version: Some(version), ..Amend::default() };
        change(source, &last, &mut watch)?;
    }
    Ok(())
}

/// Changes the passphrases of an encrypted image.
fn change_keys(source: &Source, keys: Option<keys::Change>, force: bool) -> Outcome<()> {
    let Some(keys) = keys else { return Ok(()) };
    let opened = open::layer(source, Use::writing())?;
    let Some(image) = &opened.qcow2 else { return Ok(()) };
    let done = image.change_keys(|header, area| keys.make(header, area, force));
    done.map_err(|e| keys::failed(&e))
}

/// What is to happen to the passphrases of an encrypted image.
fn change_of_keys(
    source: &Source,
    header: &Header,
    chosen: &Chosen,
) -> Outcome<Option<keys::Change>> {
    const PREFIX: &str = "encrypt.";
    if chosen.given_with(PREFIX).next().is_none() {
        return Ok(None);
    }
    match header.crypt_method {
        0 => Err(Fail::new("Can't amend encryption options - encryption not present")),
        LUKS => keys::read(chosen, PREFIX, source.key.secret.as_deref()),
        _ => Err(Fail::new("Only LUKS encryption options can be amended")),
    }
}

/// What goes with what, before anything is changed.
fn check(header: &Header, chosen: &Chosen, version: u32) -> Outcome<()> {
    let fail = |text: String| Err(Fail::new(text));
    let bits = chosen.number("refcount_bits");
    if let Some(bits) = bits.filter(|b| !b.is_power_of_two() || *b > 64) {
        let _ = bits;
        return fail("Refcount width must be a power of two and may not exceed 64 bits".into());
    }
    let unchanged = 1u64 << header.refcount_order;
    if version < 3 && bits.unwrap_or(unchanged) != 16 {
        return fail(match bits {
            None => "compat=0.10 requires refcount_bits=16".into(),
            Some(bits) if bits == unchanged => "compat=0.10 requires refcount_bits=16".into(),
            Some(_) => {
                "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                        (use compat=1.1 or greater)"
                    .into()
            }
        });
    }
    if chosen.has("backing_file") || chosen.has("backing_fmt") {
        let now = header.backing.clone();
        let wanted = Backing {
            name: chosen.text("backing_file").unwrap_or_default().to_owned(),
            format: chosen.text("backing_fmt").map(str::to_owned),
        };
        let same = now.is_some_and(|b| {
            b.name == wanted.name && (wanted.format.is_none() || b.format == wanted.format)
        });
        if !same {
            report("Cannot amend the backing file");
            eprintln!("You can use 'qemu-img rebase' instead.");
            return Err(Fail::silent(1));
        }
    }
    let has_data_file = header.incompatible & DATA_FILE != 0;
    if chosen.text("data_file").is_some() && !has_data_file {
        return fail("data-file can only be set for images that use an external data file".into());
    }
    if chosen.switch("data_file_raw") == Some(true) && !header.data_file_is_raw() {
        return fail("data-file-raw cannot be set on existing images".into());
    }
    if version < 3 && chosen.switch("lazy_refcounts") == Some(true) {
        return fail(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or \
             greater)"
                .into(),
        );
    }
    if version < header.version && has_data_file {
        return fail("Cannot downgrade an image with a data file".into());
    }
    let features = header.incompatible & !IGNORED;
    if version < header.version && features != 0 {
        return fail(format!(
            "Cannot downgrade an image with incompatible features {features:#x} set"
        ));
    }
    Ok(())
}

fn change(source: &Source, want: &Amend, watch: &mut dyn FnMut(AmendProgress)) -> Outcome<()> {
    let Some(mut image) = open::owned(source, Use::writing())? else {
        return Err(Fail::new(os_text(nix::libc::ENOTSUP)));
    };
    image.amend_watched(want, watch).map_err(|e| match e.raw_os_error() {
        Some(errno) if want.version == Some(2) && errno != nix::libc::ENOTSUP => {
            report(e.message());
            Fail::new(format!("Failed to turn zero into data clusters: {}", os_text(errno)))
        }
        _ => Fail::new(e.message()),
    })
}

fn resize(source: &Source, size: u64) -> Outcome<()> {
    let (opened, chain) = open::layer_and_chain(source, Use::writing())?;
    let size = size.next_multiple_of(SECTOR);
    if size == chain.size() {
        return Ok(());
    }
    open::refuse_resize(&opened)?;
    chain.resize(size).and_then(|()| chain.flush()).map_err(|e| Fail::new(reason(&e)))
}

/// Version 2 has no bitmaps: they go, as with QEMU, whose clusters of them leak besides.
fn drop_bitmaps(source: &Source) -> Outcome<()> {
    let failed = |e: vdisk::Error| Fail::new(reason(&e));
    let Some(mut image) = open::owned(source, Use::writing())? else { return Ok(()) };
    let all = image.bitmaps().map_err(failed)?;
    for bitmap in &all {
        report(format!("warning: Version 2 has no bitmaps: '{}' is removed", bitmap.name));
    }
    let none = image.change_bitmaps(|bitmaps| all.iter().try_for_each(|b| bitmaps.remove(&b.name)));
    none.and_then(|done| done).map_err(failed)
}

/// Version 2 has one size for the disk and all its snapshots.
fn check_snapshot_sizes(source: &Source) -> Outcome<()> {
    let opened = open::layer(source, Use::reading(false))?;
    let Some(image) = &opened.qcow2 else { return Ok(()) };
    let size = image.header().size;
    let all = image.snapshots().map_err(|e| Fail::new(reason(&e)))?;
    if all
        .iter()
        .any(|s| s.vm_state_size > u64::from(u32::MAX) || s.disk_size.is_some_and(|d| d != size))
    {
        return Err(Fail::new("Internal snapshots prevent downgrade of image"));
    }
    Ok(())
}
