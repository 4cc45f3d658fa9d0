//! The options with which images are made: those of each format, and what their values mean.

use vdisk::addr::Unit;
use vdisk::image::Backing;
use vdisk::qcow2::{Compression, CreateOptions, Preallocation};

use crate::qemu_img::encryption::crypt;
use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::foreign::create as create_foreign;
use crate::qemu_img::options::chosen::Chosen;
use crate::qemu_img::options::known::{AMEND, AMEND_LUKS, FILE, Known, LUKS, QCOW2, RAW, help};

/// Formats that other programs make and this one does not.
const NOT_MADE: &[&str] = &["bochs", "cloop", "dmg", "parallels", "qcow", "qed", "vvfat"];

/// The format's own options.
///
/// # Errors
/// For a format that is not made here.
pub fn of_format(format: &str) -> Outcome<&'static [Known]> {
    match format {
        "qcow2" => Ok(QCOW2),
        "raw" => Ok(RAW),
        "vdi" => Ok(create_foreign::VDI),
        "vhdx" => Ok(create_foreign::VHDX),
        "vmdk" => Ok(create_foreign::VMDK),
        "vpc" => Ok(create_foreign::VPC),
        "luks" => Ok(LUKS),
        other if NOT_MADE.contains(&other) => {
            Err(Fail::new(format!("Format driver '{other}' does not support image creation")))
        }
        other => Err(Fail::new(format!("Unknown file format '{other}'"))),
    }
}

/// The format's options and those of the file below it.
pub fn with_file(format: &str) -> Outcome<Vec<Known>> {
    let mut all = of_format(format)?.to_vec();
    for option in FILE {
        if !all.iter().any(|k| k.name == option.name) {
            all.push(*option);
        }
    }
    Ok(all)
}

/// What can be changed of an image of `format`.
pub fn of_amend(format: &str) -> Outcome<Vec<Known>> {
    if format == "luks" {
        return Ok(AMEND_LUKS.to_vec());
    }
    if format != "qcow2" {
        return Err(Fail::new(format!(
            "Format driver '{format}' does not support option amendment"
        )));
    }
    let kept = [
        "backing_file",
        "backing_fmt",
        "compat",
        "data_file",
        "data_file_raw",
        "encrypt.iter-time",
        "lazy_refcounts",
        "refcount_bits",
        "size",
    ];
    let mut all: Vec<Known> = QCOW2.iter().filter(|k| kept.contains(&k.name)).copied().collect();
    all.extend_from_slice(AMEND);
    Ok(all)
}

/// What `-o help` prints for a command that makes an image of `format`.
pub fn print_help(format: &str, has_target: bool) -> Outcome {
    if has_target {
        print!("Supported options:\n{}", help(&with_file(format)?));
        return Ok(0);
    }
    let own = of_format(format)?;
    print!(
        "Supported {format} options:\n{}\nThe protocol level may support further options.\nSpecify the \
         target filename to include those options.\n",
        help(own)
    );
    Ok(0)
}

/// A preallocation mode by its name.
pub fn preallocation(text: Option<&str>) -> Outcome<Preallocation> {
    match text {
        None | Some("off") => Ok(Preallocation::Off),
        Some("metadata") => Ok(Preallocation::Metadata),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => {
            Err(Fail::new(format!("Parameter 'preallocation' does not accept value '{other}'")))
        }
    }
}

/// The format version that a compatibility level means.
pub fn version(compat: Option<&str>) -> Outcome<u32> {
    match compat {
        None | Some("1.1" | "v3") => Ok(3),
        Some("0.10" | "v2") => Ok(2),
        Some(other) => {
            Err(Fail::new(format!("Parameter 'version' does not accept value '{other}'")))
        }
    }
}

/// The properties of a qcow2 image with these options, of `size` bytes.
pub fn qcow2(chosen: &Chosen, size: u64) -> Outcome<CreateOptions> {
    let defaults = CreateOptions::new(size);
    let version = version(chosen.text("compat"))?;
    let preallocation = preallocation(chosen.text("preallocation"))?;
    let compression = match chosen.text("compression_type") {
        None | Some("zlib") => Compression::Zlib,
        Some("zstd") => Compression::Zstd,
        Some(other) => {
            return Err(Fail::new(format!(
                "Parameter 'compression-type' does not accept value '{other}'"
            )));
        }
    };
    let bytes = chosen.number("cluster_size").unwrap_or(65536);
    let cluster = Unit::from_bytes(bytes)
        .filter(|u| (9..=21).contains(&u.bits()))
        .ok_or_else(|| Fail::new("Cluster size must be a power of two between 512 and 2048k"))?;
    let refcount_bits = chosen.number("refcount_bits").unwrap_or(16);
    let options = CreateOptions {
        cluster,
        version,
        preallocation,
        compression,
        refcount_bits: u32::try_from(refcount_bits).unwrap_or(u32::MAX),
        extended_l2: chosen.switch("extended_l2").unwrap_or(false),
        lazy_refcounts: chosen.switch("lazy_refcounts").unwrap_or(false),
        backing: chosen.text("backing_file").map(|name| Backing {
            name: name.to_owned(),
            format: chosen.text("backing_fmt").map(str::to_owned),
        }),
        ..defaults
    };
    check(chosen, &options)?;
    let encryption = crypt::for_qcow2(chosen)?;
    Ok(CreateOptions { encryption, ..options })
}

/// What goes with what, in the words that scripts know.
fn check(chosen: &Chosen, options: &CreateOptions) -> Outcome<()> {
    let fail = |text: &str| Err(Fail::new(text));
    let old = options.version < 3;
    if options.extended_l2 && options.cluster.bits() < 14 {
        return fail(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        );
    }
    if options.backing.is_some()
        && options.preallocation != Preallocation::Off
        && !options.extended_l2
    {
        return fail(
            "Backing file and preallocation can only be used at the same time if extended_l2 is enabled",
        );
    }
    if options.backing.is_none() && chosen.has("backing_fmt") {
        return fail("Backing format cannot be used without backing file");
    }
    if old && options.lazy_refcounts {
        return fail(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        );
    }
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        return fail("Refcount width must be a power of two and may not exceed 64 bits");
    }
    if old && options.refcount_bits != 16 {
        return fail(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        );
    }
    if old && options.extended_l2 {
        return fail(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        );
    }
    if old && options.compression != Compression::Zlib {
        return fail(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        );
    }
    let (data, raw) = (chosen.has("data_file"), chosen.switch("data_file_raw") == Some(true));
    if raw && !data {
        return fail("data-file-raw requires data-file");
    }
    if old && data {
        return fail(
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        );
    }
    if raw && options.backing.is_some() {
        return fail("Backing file and data-file-raw cannot be used at the same time");
    }
    Ok(())
}
