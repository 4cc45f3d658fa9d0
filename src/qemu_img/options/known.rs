//! Which options there are, by format, and how they are listed.

use std::fmt::Write as _;

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
pub(super) const QCOW2: &[Known] = &[
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
pub(super) const AMEND: &[Known] = &[
    known("encrypt.keyslot", Kind::Number, "Select a single keyslot to modify explicitly"),
    known(
        "encrypt.new-secret",
        Kind::Text,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    known("encrypt.old-secret", Kind::Text, "Select all keyslots that match this password"),
    known("encrypt.state", Kind::Text, "Select new state of affected keyslots (active/inactive)"),
];

pub(super) const RAW: &[Known] = &[SIZE];

/// In the order in which the values are listed.
pub(super) const LUKS: &[Known] = &[
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
pub(super) const AMEND_LUKS: &[Known] = &[
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
pub(super) const FILE: &[Known] = &[
    SIZE,
    known("nocow", Kind::Switch, "Turn off copy-on-write (valid only on btrfs)"),
    known("preallocation", Kind::Text, "Preallocation mode (allowed values: off, falloc, full)"),
    known("extent_size_hint", Kind::Size, "Extent size hint for the image file, 0 to disable"),
];

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
