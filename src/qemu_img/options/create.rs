//! The options with which images are made: which there are for a format, what their values may
//! be, and how they are listed.

use std::fmt::Write as _;

use vdisk::addr::Unit;
use vdisk::image::Backing;
use vdisk::qcow2::{Compression, CreateOptions, Preallocation};

use crate::qemu_img::encryption::crypt;
use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::foreign::create as create_foreign;
use crate::qemu_img::options::opts::{List, escaped};
use crate::qemu_img::size::{self, Bad};

/// What an option's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Size,
    Switch,
    Number,
}

/// An option that a format knows.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// The value where the user says none, where it is listed then.
    pub default: Option<&'static str>,
}

pub const fn known(name: &'static str, kind: Kind, help: &'static str) -> Known {
    Known { name, kind, help, default: None }
}

pub const fn with_default(
    name: &'static str,
    kind: Kind,
    help: &'static str,
    value: &'static str,
) -> Known {
    Known { name, kind, help, default: Some(value) }
}

pub const SIZE: Known = known("size", Kind::Size, "Virtual disk size");

/// In the order in which the values are listed.
const QCOW2: &[Known] = &[
    known(
        "encryption",
        Kind::Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    known("encrypt.format", Kind::Text, "Encrypt the image, format choices: 'aes', 'luks'"),
    known(
        "encrypt.key-secret",
        Kind::Text,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    known("encrypt.cipher-alg", Kind::Text, "Name of encryption cipher algorithm"),
    known("encrypt.cipher-mode", Kind::Text, "Name of encryption cipher mode"),
    known("encrypt.ivgen-alg", Kind::Text, "Name of IV generator algorithm"),
    known("encrypt.ivgen-hash-alg", Kind::Text, "Name of IV generator hash algorithm"),
    known("encrypt.hash-alg", Kind::Text, "Name of encryption hash algorithm"),
    known("encrypt.iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    with_default("cluster_size", Kind::Size, "qcow2 cluster size", "65536"),
    with_default("extended_l2", Kind::Switch, "Extended L2 tables", "off"),
    known(
        "preallocation",
        Kind::Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    with_default(
        "compression_type",
        Kind::Text,
        "Compression method used for image cluster compression",
        "zlib",
    ),
    SIZE,
    known("compat", Kind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    known("backing_file", Kind::Text, "File name of a base image"),
    known("backing_fmt", Kind::Text, "Image format of the base image"),
    known("data_file", Kind::Text, "File name of an external data file"),
    known("data_file_raw", Kind::Switch, "The external data file must stay valid as a raw image"),
    with_default("lazy_refcounts", Kind::Switch, "Postpone refcount updates", "off"),
    with_default("refcount_bits", Kind::Number, "Width of a reference count entry in bits", "16"),
];

/// What only an image that is there has.
const AMEND: &[Known] = &[
    known("encrypt.keyslot", Kind::Number, "Select a single keyslot to modify explicitly"),
    known(
        "encrypt.new-secret",
        Kind::Text,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    known("encrypt.old-secret", Kind::Text, "Select all keyslots that match this password"),
    known("encrypt.state", Kind::Text, "Select new state of affected keyslots (active/inactive)"),
];

const RAW: &[Known] = &[SIZE];

/// In the order in which the values are listed.
const LUKS: &[Known] = &[
    SIZE,
    known("key-secret", Kind::Text, "ID of the secret that provides the keyslot passphrase"),
    known("cipher-alg", Kind::Text, "Name of encryption cipher algorithm"),
    known("cipher-mode", Kind::Text, "Name of encryption cipher mode"),
    known("ivgen-alg", Kind::Text, "Name of IV generator algorithm"),
    known("ivgen-hash-alg", Kind::Text, "Name of IV generator hash algorithm"),
    known("hash-alg", Kind::Text, "Name of encryption hash algorithm"),
    known("iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    known("detached-header", Kind::Switch, "Create a detached LUKS header"),
];

/// What can be changed of a LUKS image.
const AMEND_LUKS: &[Known] = &[
    known("iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    known("keyslot", Kind::Number, "Select a single keyslot to modify explicitly"),
    known(
        "new-secret",
        Kind::Text,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    known("old-secret", Kind::Text, "Select all keyslots that match this password"),
    known("state", Kind::Text, "Select new state of affected keyslots (active/inactive)"),
];

/// What the file below any format knows; `size` and `preallocation` are the format's where it has
/// them.
const FILE: &[Known] = &[
    SIZE,
    known("nocow", Kind::Switch, "Turn off copy-on-write (valid only on btrfs)"),
    known("preallocation", Kind::Text, "Preallocation mode (allowed values: off, falloc, full)"),
    known("extent_size_hint", Kind::Size, "Extent size hint for the image file, 0 to disable"),
];

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

/// The list that `-o help` prints.
pub fn help(known: &[Known]) -> String {
    let mut sorted = known.to_vec();
    sorted.sort_by_key(|k| k.name);
    let mut out = String::new();
    for option in sorted {
        let kind = match option.kind {
            Kind::Text => "str",
            Kind::Size => "size",
            Kind::Switch => "bool (on/off)",
            Kind::Number => "num",
        };
        let name = format!("{}=<{kind}>", option.name);
        let _ = writeln!(out, "  {name:<22} - {}", option.help);
    }
    out
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

/// A value, read.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Text(String),
    Number(u64),
    Switch(bool),
}

/// Options with their values.
#[derive(Debug, Clone)]
pub struct Chosen {
    known: Vec<Known>,
    values: Vec<Option<Value>>,
}

impl Chosen {
    /// Reads a list of options that a format and its file know.
    pub fn parse(known: Vec<Known>, text: &str) -> Outcome<Chosen> {
        let mut chosen = Chosen { values: vec![None; known.len()], known };
        for (key, value) in List::parse(text, None).0 {
            chosen.set(&key, &value)?;
        }
        Ok(chosen)
    }

    fn place(&self, key: &str) -> Option<usize> {
        self.known.iter().position(|k| k.name == key)
    }

    /// Sets an option as the user would.
    pub fn set(&mut self, key: &str, value: &str) -> Outcome<()> {
        let unknown = || {
            let creation = match () {
                () if self.knows("encrypt.state") => QCOW2,
                () if self.knows("state") => LUKS,
                () => &[],
            };
            let for_creation = creation.iter().any(|k| k.name == key);
            let hint = if for_creation {
                "\nThis option is only supported for image creation"
            } else {
                ""
            };
            Fail::new(format!("Invalid parameter '{key}'{hint}"))
        };
        let at = self.place(key).ok_or_else(unknown)?;
        self.values[at] = Some(read(key, self.known[at].kind, value)?);
        Ok(())
    }

    /// Fills in the values that the format takes by itself.
    pub fn add_defaults(&mut self) -> Outcome<()> {
        for at in 0..self.known.len() {
            if let (None, Some(value)) = (&self.values[at], self.known[at].default) {
                self.values[at] = Some(read(self.known[at].name, self.known[at].kind, value)?);
            }
        }
        Ok(())
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.values[self.place(key)?].as_ref()
    }

    /// A text option.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A size or number.
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.value(key) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// A switch.
    pub fn switch(&self, key: &str) -> Option<bool> {
        match self.value(key) {
            Some(Value::Switch(on)) => Some(*on),
            _ => None,
        }
    }

    /// Whether the user, or a default, said anything about the option.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// The options that were given and whose names begin with `prefix`.
    pub fn given_with<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'static str> + 'a {
        let given = self.known.iter().zip(&self.values).filter(|(_, value)| value.is_some());
        given.map(|(known, _)| known.name).filter(move |name| name.starts_with(prefix))
    }

    /// Whether the format has such an option.
    pub fn knows(&self, key: &str) -> bool {
        self.place(key).is_some()
    }

    /// All values in one line, each with a space before it.
    pub fn listed(&self) -> String {
        let mut out = String::new();
        for (known, value) in self.known.iter().zip(&self.values) {
            let text = match value {
                None => continue,
                Some(Value::Text(text)) => escaped(text),
                Some(Value::Number(number)) => number.to_string(),
                Some(Value::Switch(on)) => if *on { "on" } else { "off" }.to_owned(),
            };
            let _ = write!(out, " {}={text}", known.name);
        }
        out
    }
}

fn read(key: &str, kind: Kind, value: &str) -> Outcome<Value> {
    match kind {
        Kind::Text => Ok(Value::Text(value.to_owned())),
        Kind::Switch => match value {
            "on" | "yes" | "true" | "y" => Ok(Value::Switch(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Switch(false)),
            _ => Err(Fail::new(format!("Parameter '{key}' expects 'on' or 'off'"))),
        },
        // As the C library reads them: a negative number is one near the top.
        Kind::Number => value
            .parse()
            .or_else(|_| value.parse::<i64>().map(i64::cast_unsigned))
            .map(Value::Number)
            .map_err(|_| Fail::new(format!("Parameter '{key}' expects a number"))),
        Kind::Size => size::parse(value).map(Value::Number).map_err(|bad| match bad {
            Bad::Range => {
                Fail::new(format!("Value '{value}' is out of range for parameter '{key}'"))
            }
            Bad::Syntax => Fail::new(format!(
                "Parameter '{key}' expects a non-negative number below 2^64\nOptional suffix k, M, G, \
                 T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
            )),
        }),
    }
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
