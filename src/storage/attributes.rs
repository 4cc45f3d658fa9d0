//! Who may use a file: its mode, its owner and group, its access list and its labels. A file that
//! takes another's place has those of the other, and at no moment lets in anybody whom the other
//! would keep out.
//!
//! Knows files and the kernel's rules for them, nothing of what they hold.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use rustix::fs::{
    XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, lgetxattr, llistxattr,
};
use rustix::io::Errno;

use super::name::refuse_device;
use crate::error::{Error, ErrorKind, Result};

/// The bits of a mode that say who may do what. To run a disk as another user is nothing to keep.
const MODE: u32 = 0o777;
/// Nobody but the owner.
const PRIVATE: u32 = 0o600;
/// The attribute that holds the access list; the mode is a part of what it says.
const ACCESS_LIST: &CStr = c"system.posix_acl_access";
/// Room for an attribute, or for the names of all: little is mostly enough, and there is no more than
/// the last.
const SIZES: [usize; 3] = [256, 4096, 64 << 10];

/// What is kept when one file takes another's place.
#[derive(Debug, PartialEq, Eq)]
struct Attributes {
    mode: u32,
    owner: u32,
    group: u32,
    named: BTreeMap<CString, Vec<u8>>,
}

/// Makes `file` as accessible as the one at `like`, whose place it is to take; returns whether
/// anything had to be changed. In between it is at most the owner's.
///
/// # Errors
/// Where this user cannot do that, such as giving the file to another owner: it is then not to take
/// the other's place.
pub(super) fn copy(like: &Path, file: &File) -> Result<bool> {
    let examined = |e: io::Error| Error::io("could not be examined", e).at_path(like);
    // No link is followed: in somebody else's directory it could lead to any file.
    let want = Attributes::of(
        &like.symlink_metadata().map_err(examined)?,
        |buf| llistxattr(like, buf),
        |name, buf| lgetxattr(like, name, buf),
    )
    .map_err(examined)?;
    let have = Attributes::of(
        &file.metadata().map_err(examined)?,
        |buf| flistxattr(file, buf),
        |name, buf| fgetxattr(file, name, buf),
    )
    .map_err(examined)?;
    if have == want {
        return Ok(false);
    }
    have.change(&want, file).map_err(|e| e.at_path(like))?;
    Ok(true)
}

/// Refuses what cannot give its name to another file, or take another's: a device, a link, and a file
/// that has further names, since that would be so under one of them only. A change of the tree that is
/// under way may give it the name `own_link` for a moment.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for what is no file; [`ErrorKind::Invalid`] says how many names it has.
pub fn refuse_fixed(path: &Path, own_link: &Path) -> Result<()> {
    let failed = |e| Error::io("could not be examined", e).at_path(path);
    let meta = path.symlink_metadata().map_err(failed)?;
    if !meta.is_symlink() {
        refuse_device(path)?;
    }
    if !meta.is_file() {
        let what = if meta.is_symlink() { "is a link" } else { "is no file" };
        let message = format!("{what}: only a file can change places with another layer");
        return Err(Error::unsupported(message).at_path(path));
    }
    if other_names(path, own_link)? == 0 {
        return Ok(());
    }
    let message = format!(
        "has {} names (hard links), and under the others it would be another disk afterwards, or a \
         layer of this one: remove them (`find DIRECTORY -samefile` lists them), or give them a copy",
        meta.nlink()
    );
    Err(Error::new(ErrorKind::Invalid, message).at_path(path))
}

/// How many names a file has besides `path`, and `own_link` where that is one.
pub fn other_names(path: &Path, own_link: &Path) -> Result<u64> {
    let failed = |e| Error::io("could not be examined", e).at_path(path);
    let meta = path.symlink_metadata().map_err(failed)?;
    let identity = (meta.dev(), meta.ino());
    let is_own_link = path != own_link
        && own_link.symlink_metadata().is_ok_and(|meta| (meta.dev(), meta.ino()) == identity);
    Ok(meta.nlink().saturating_sub(1 + u64::from(is_own_link)))
}

impl Attributes {
    /// Reads them with `list` and `get`, of which each fills what it is given and says the length.
    fn of(
        meta: &std::fs::Metadata,
        list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
        get: impl Fn(&CString, &mut [u8]) -> rustix::io::Result<usize>,
    ) -> io::Result<Attributes> {
        let mut named = BTreeMap::new();
        let names = filled(list)?.unwrap_or_default();
        for name in names.split(|byte| *byte == 0).filter(|name| is_kept(name)) {
            let name = CString::new(name)?;
            // Gone meanwhile: it has it no more.
            let Some(value) = filled(|buf: &mut [u8]| get(&name, buf))? else { continue };
            named.insert(name, value);
        }
        Ok(Attributes { mode: meta.mode() & MODE, owner: meta.uid(), group: meta.gid(), named })
    }

    /// Makes `file`, which has these, have the others.
    fn change(&self, want: &Attributes, file: &File) -> Result<()> {
        let list = |of: &Attributes| of.named.get(ACCESS_LIST).cloned();
        let mut mode = self.mode;
        let others = (self.owner, self.group, list(self)) != (want.owner, want.group, list(want));
        if others && mode & !PRIVATE != 0 {
            // An access list is shut with the group's bits.
            mode &= PRIVATE;
            set_mode(file, mode)?;
        }
        for name in self.named.keys().filter(|name| !want.named.contains_key(*name)) {
            // A label that the host gives every file cannot be taken away, and needs not.
            if !is_label(name.to_bytes()) {
                fremovexattr(file, name).map_err(|e| kept(name, e))?;
            }
        }
        if (self.owner, self.group) != (want.owner, want.group) {
            want.give_to_owner(self, file)?;
            // The kernel takes bits away when the owner changes.
            mode = mode_of(file)?;
        }
        for (name, value) in want.named.iter().filter(|(name, v)| self.named.get(*name) != Some(*v))
        {
            match fsetxattr(file, name, value, XattrFlags::empty()) {
                Err(e) if is_label(name.to_bytes()) && is_refused(e) && !labels_count() => {}
                set => set.map_err(|e| kept(name, e))?,
            }
            mode = mode_of(file)?;
        }
        if mode == want.mode { Ok(()) } else { set_mode(file, want.mode) }
    }

    fn give_to_owner(&self, now: &Attributes, file: &File) -> Result<()> {
        let owner = (self.owner != now.owner).then_some(self.owner);
        let group = (self.group != now.group).then_some(self.group);
        fchown(file, owner, group).map_err(|e| {
            let text = format!(
                "belongs to user {} and group {}, and the file that is to take its place cannot be \
                 given to them: only that user, as a member of that group, or root can do this",
                self.owner, self.group
            );
            Error::io(text, e)
        })
    }
}

/// Whether an attribute speaks of the file's users, and so goes with its place. Those that vouch for
/// the bytes of one file would be wrong for another's.
fn is_kept(name: &[u8]) -> bool {
    const OF_CONTENTS: [&[u8]; 3] = [b"security.ima", b"security.evm", b"security.capability"];
    let lists: [&[u8]; 2] = [ACCESS_LIST.to_bytes(), b"system.nfs4_acl"];
    let kinds: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    lists.contains(&name)
        || kinds.iter().any(|kind| name.starts_with(kind)) && !OF_CONTENTS.contains(&name)
}

/// A security module's label.
fn is_label(name: &[u8]) -> bool {
    name.starts_with(b"security.")
}

/// Whether a security module of this host goes by labels. Where none does, one that was left by
/// another boot keeps nobody out.
fn labels_count() -> bool {
    ["/sys/fs/selinux/enforce", "/sys/fs/smackfs/load2"].iter().any(|at| Path::new(at).exists())
}

fn is_refused(errno: Errno) -> bool {
    matches!(errno, Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP)
}

fn kept(name: &CString, errno: Errno) -> Error {
    let text = format!("has an attribute '{}' that could not be kept", name.to_string_lossy());
    Error::io(text, errno.into())
}

fn set_mode(file: &File, mode: u32) -> Result<()> {
    let failed = |e| Error::io("could not be given its mode", e);
    file.set_permissions(Permissions::from_mode(mode)).map_err(failed)
}

fn mode_of(file: &File) -> Result<u32> {
    let meta = file.metadata().map_err(|e| Error::io("could not be examined", e))?;
    Ok(meta.mode() & MODE)
}

/// All that `read` has to say; `None` where there is nothing, or this file system knows no such
/// thing.
fn filled(
    read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Option<Vec<u8>>> {
    for size in SIZES {
        let mut bytes = vec![0; size];
        match read(&mut bytes) {
            Ok(len) => {
                bytes.truncate(len);
                return Ok(Some(bytes));
            }
            Err(Errno::RANGE) => {}
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    Err(Errno::RANGE)
}
