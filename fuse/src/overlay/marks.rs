//! What an overlay writes beside its files so that it is read again: the names of its extended
//! attributes, whiteouts, redirects, origins. The words and forms are those of the kernel's
//! overlayfs (Documentation/filesystems/overlayfs.rst). Knows no node.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::attr::Attr;
use crate::layer::FileHandle;

/// Names of whiteouts where device nodes cannot be made, and in layers that were made so.
pub const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// The name that makes its directory opaque in such layers.
pub const WHITEOUT_OPAQUE: &str = ".wh..wh..opq";
/// Whose a file is to be, and its mode, where its layer's file system was not told: `UID:GID:MODE`, the
/// mode octal. The form is that of containers/storage and fuse-overlayfs.
pub const OWNER: &str = "user.containers.override_stat";
/// What programs call so in an overlay.
const OWNER_INNER: &str = "user.containers.overlay.override_stat";
/// The longest path that a redirect may name.
const REDIRECT_MAX: usize = 4096;

/// Whether it is a whiteout that is a device node: character device 0/0.
pub fn is_whiteout(attr: &Attr) -> bool {
    attr.kind() == libc::S_IFCHR && attr.rdev == 0
}

/// The value of [`OWNER`].
pub fn owner_value(user: u32, group: u32, mode: u32) -> String {
    format!("{user}:{group}:0{mode:o}")
}

/// User and group in a value of [`OWNER`].
pub fn parse_owner(value: &[u8]) -> Option<(u32, u32)> {
    let mut fields = std::str::from_utf8(value).ok()?.split(':');
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// The name of the whiteout for `name` where it is one that is a name.
pub fn whiteout_name(name: &OsStr) -> OsString {
    OsString::from_vec([WHITEOUT_PREFIX, name.as_bytes()].concat())
}

/// What `name` hides where it is a whiteout itself.
pub fn hidden_by(name: &OsStr) -> Option<&OsStr> {
    name.as_bytes().strip_prefix(WHITEOUT_PREFIX).map(OsStr::from_bytes)
}

/// The names of the overlay's own extended attributes.
#[derive(Debug, Clone)]
pub struct Words {
    prefix: &'static str,
    /// `y`: nothing below is merged into the directory; `x`: whiteouts that are marked files are in it.
    pub opaque: OsString,
    /// Where what stands under it is found ([`Redirect`]).
    pub redirect: OsString,
    /// What it was copied up from ([`Origin`]).
    pub origin: OsString,
    /// Files with an origin are in the directory.
    pub impure: OsString,
    /// How many names it has ([`parse_nlink`]).
    pub nlink: OsString,
    /// It has attributes only; the contents stand below.
    pub metacopy: OsString,
    /// The empty file is a whiteout.
    pub whiteout: OsString,
}

impl Words {
    /// Those of root's overlays, or those that any user may set (`userxattr`).
    pub fn new(user: bool) -> Words {
        let prefix = if user { "user.overlay." } else { "trusted.overlay." };
        let word = |word: &str| OsString::from(format!("{prefix}{word}"));
        Words {
            prefix,
            opaque: word("opaque"),
            redirect: word("redirect"),
            origin: word("origin"),
            impure: word("impure"),
            nlink: word("nlink"),
            metacopy: word("metacopy"),
            whiteout: word("whiteout"),
        }
    }

    /// Whether it is one of the overlay's own in a layer, which is neither shown nor copied.
    pub fn private(&self, key: &OsStr) -> bool {
        match key.as_bytes().strip_prefix(self.prefix.as_bytes()) {
            Some(rest) => !rest.starts_with(b"overlay."),
            None => key == OWNER,
        }
    }

    /// The name in a layer of what a program calls `key`: the overlay's own names are escaped, so
    /// that an overlay can be kept in an overlay.
    pub fn inner(&self, key: &OsStr) -> OsString {
        match key.as_bytes().strip_prefix(self.prefix.as_bytes()) {
            Some(rest) => OsString::from_vec([self.prefix.as_bytes(), b"overlay.", rest].concat()),
            None if key == OWNER => OWNER_INNER.into(),
            None => key.to_owned(),
        }
    }

    /// What a program sees of a name in a layer; `None` where it is the overlay's own.
    pub fn outer(&self, key: &OsStr) -> Option<OsString> {
        let Some(rest) = key.as_bytes().strip_prefix(self.prefix.as_bytes()) else {
            return match key.to_str() {
                Some(OWNER) => None,
                Some(OWNER_INNER) => Some(OWNER.into()),
                _ => Some(key.to_owned()),
            };
        };
        let rest = rest.strip_prefix(b"overlay.")?;
        Some(OsString::from_vec([self.prefix.as_bytes(), rest].concat()))
    }
}

/// Where a directory's or a metacopy file's lower ones stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Redirect {
    /// Under this name in the same directory.
    Name(OsString),
    /// At these names from the root of each lower layer.
    Path(Vec<OsString>),
}

impl Redirect {
    /// Reads the attribute's value; `None` for what leads nowhere, or out of the layer.
    pub fn parse(value: &[u8]) -> Option<Redirect> {
        let value = value.strip_suffix(b"\0").unwrap_or(value);
        let good = |name: &[u8]| {
            !matches!(name, b"" | b"." | b"..") && name.len() <= 255 && !name.contains(&0)
        };
        if value.len() > REDIRECT_MAX {
            return None;
        }
        let Some(path) = value.strip_prefix(b"/") else {
            let whole = good(value) && !value.contains(&b'/');
            return whole.then(|| Redirect::Name(OsStr::from_bytes(value).to_owned()));
        };
        let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        if !names.iter().all(|name| good(name)) {
            return None;
        }
        Some(Redirect::Path(names.iter().map(|name| OsStr::from_bytes(name).to_owned()).collect()))
    }

    /// The attribute's value; `None` where it is too long to be kept.
    pub fn value(&self) -> Option<Vec<u8>> {
        let value = match self {
            Redirect::Name(name) => name.as_bytes().to_vec(),
            Redirect::Path(names) => {
                let mut value = Vec::new();
                for name in names {
                    value.push(b'/');
                    value.extend_from_slice(name.as_bytes());
                }
                value
            }
        };
        // What the kernel's overlayfs takes without being told otherwise (`redirect_max`).
        (value.len() <= 256).then_some(value)
    }
}

const ORIGIN_VERSION: u8 = 0;
const ORIGIN_MAGIC: u8 = 0xfb;
const ORIGIN_BIG_ENDIAN: u8 = 1;
const ORIGIN_ANY_ENDIAN: u8 = 2;
const ORIGIN_HEAD: usize = 21;

/// What a file was copied up from, or an upper file itself: `struct ovl_fb`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The file system.
    pub uuid: [u8; 16],
    /// The file in it.
    pub handle: FileHandle,
}

impl Origin {
    /// The attribute's value.
    pub fn value(&self) -> Option<Vec<u8>> {
        let len = u8::try_from(ORIGIN_HEAD + self.handle.bytes.len()).ok()?;
        let endian = if cfg!(target_endian = "big") { ORIGIN_BIG_ENDIAN } else { 0 };
        let mut value = vec![ORIGIN_VERSION, ORIGIN_MAGIC, len, endian, self.handle.kind];
        value.extend_from_slice(&self.uuid);
        value.extend_from_slice(&self.handle.bytes);
        Some(value)
    }

    /// Reads such a value; `None` for what is none, or was written by another kind of machine.
    pub fn parse(value: &[u8]) -> Option<Origin> {
        let (head, bytes) = value.split_at_checked(ORIGIN_HEAD)?;
        let [ORIGIN_VERSION, ORIGIN_MAGIC, len, flags, kind, uuid @ ..] = head else { return None };
        let ours = if cfg!(target_endian = "big") { ORIGIN_BIG_ENDIAN } else { 0 };
        let foreign = flags & ORIGIN_ANY_ENDIAN == 0 && flags & ORIGIN_BIG_ENDIAN != ours;
        if usize::from(*len) != value.len() || foreign {
            return None;
        }
        let handle = FileHandle { kind: *kind, bytes: bytes.to_vec() };
        Some(Origin { uuid: uuid.try_into().ok()?, handle })
    }

    /// The name in the index of the upper file that was copied up from this one.
    pub fn index_name(&self) -> Option<OsString> {
        let hex: String = self.value()?.iter().map(|byte| format!("{byte:02x}")).collect();
        (hex.len() <= 255).then(|| hex.into())
    }

    /// The inode number, where the form of the handle is one that says it: types of
    /// `enum fid_type` in linux/exportfs.h, and tmpfs.
    pub fn inode(&self) -> Option<u64> {
        let words: Vec<u64> = self
            .handle
            .bytes
            .chunks_exact(4)
            .map(|word| u64::from(u32::from_ne_bytes(word.try_into().unwrap_or_default())))
            .collect();
        match (self.handle.kind, words.as_slice()) {
            // FILEID_INO32_GEN: ext4, xfs with small numbers.
            (1, [ino, _generation]) => Some(*ino),
            // tmpfs: generation, low and high half.
            (1, [_generation, low, high]) => Some(low | high << 32),
            // btrfs without parent: object, root, generation.
            (0x4d, [low, high, ..]) => Some(low | high << 32),
            // xfs with large numbers.
            (0x81, [low, high, _generation]) => Some(low | high << 32),
            _ => None,
        }
    }
}

/// A number of links as it is kept: how many more or fewer there are than the upper or lower
/// file itself has. `None` for what is no such value.
pub fn parse_nlink(value: &[u8], upper: u32, lower: u32) -> Option<u32> {
    let text = std::str::from_utf8(value).ok()?;
    let (base, rest) = match text.strip_prefix('U') {
        Some(rest) => (upper, rest),
        None => (lower, text.strip_prefix('L')?),
    };
    u32::try_from(i64::from(base).checked_add(rest.parse::<i32>().ok()?.into())?).ok()
}

/// The value for a number of links against the upper file's own number.
pub fn nlink_value(links: u32, upper: u32) -> Vec<u8> {
    format!("U{:+}", i64::from(links) - i64::from(upper)).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_that_leads_out_of_the_layer_is_none() {
        for bad in ["", "/", "..", ".", "/a/../b", "/a//b", "a/b", "/a/", "/..", "a\0b"] {
            assert_eq!(Redirect::parse(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(Redirect::parse(&[b'a'; 300]), None);
        let path = Redirect::parse(b"/a/b c").unwrap();
        assert_eq!(path, Redirect::Path(vec!["a".into(), "b c".into()]));
        assert_eq!(path.value().unwrap(), b"/a/b c");
        assert_eq!(Redirect::parse(b"x"), Some(Redirect::Name("x".into())));
    }

    #[test]
    fn an_origin_is_read_as_it_was_written_and_nothing_else_is() {
        let bytes = [7u32, 9].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let origin = Origin { uuid: [3; 16], handle: FileHandle { kind: 1, bytes } };
        let value = origin.value().unwrap();
        assert_eq!(Origin::parse(&value), Some(origin.clone()));
        assert_eq!(origin.inode(), Some(7));
        assert!(origin.index_name().unwrap().as_bytes().starts_with(b"00fb1d0001"));
        for cut in 0..value.len() {
            assert_eq!(Origin::parse(&value[..cut]), None);
        }
    }

    #[test]
    fn links_are_counted_against_the_upper_or_the_lower_file() {
        assert_eq!(parse_nlink(b"U+1", 2, 9), Some(3));
        assert_eq!(parse_nlink(b"L-2", 2, 9), Some(7));
        assert_eq!(parse_nlink(b"U-3", 2, 9), None);
        assert_eq!(parse_nlink(b"3", 2, 9), None);
        assert_eq!(nlink_value(2, 3), b"U-1");
        assert_eq!(nlink_value(3, 3), b"U+0");
    }

    #[test]
    fn the_overlays_own_attributes_are_hidden_and_a_programs_are_escaped() {
        let words = Words::new(false);
        let own = OsStr::new("trusted.overlay.opaque");
        assert!(words.private(own));
        assert_eq!(words.outer(own), None);
        let inner = words.inner(own);
        assert_eq!(inner, "trusted.overlay.overlay.opaque");
        assert!(!words.private(&inner));
        assert_eq!(words.outer(&inner).unwrap(), own);
        assert_eq!(words.inner(OsStr::new("user.x")), "user.x");
    }
}
