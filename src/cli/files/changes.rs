//! The changes of an overlay, in the form of overlayfs, put into the file system that lay under it:
//! whiteouts, opaque directories, redirects, metacopies, hard links.
//!
//! Names are resolved before anything is changed, as an overlay resolves them: in the file system as
//! it was. What has a redirect is then taken out of its place, whatever becomes of that, and put in its
//! new one when the directory there is whole.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::lgetxattr;
use rustix::io::Errno;
use serde::Serialize;
use vdisk::filesystem::ext4::mounted::{Attributes, Change, Mounted, Need, New, Onto, Place, ROOT};
use vdisk::filesystem::tree;
use vdisk::{Error, Result};
use vdisk_fuse::overlay::marks::{
    OWNER, Origin, Redirect, WHITEOUT_OPAQUE, Words, hidden_by, parse_owner, whiteout_name,
};

use super::into::{Copying, attribute_names};
use super::{DIRECTORY, REGULAR, TYPE};

/// Directories that may stand in each other.
const DEEPEST: usize = 1000;

/// What was done.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Changes {
    /// Files and directories that were made, or changed where they stood.
    pub changed: u64,
    /// Names that were removed, and all under them counted as one.
    pub removed: u64,
    /// Directories and files that were moved.
    pub moved: u64,
}

/// What stands under an upper directory, or under a file that has only attributes.
#[derive(Debug, Clone)]
struct Lower {
    inode: u32,
    /// Its place in the file system as it was.
    place: (u32, Vec<u8>),
    /// Whether that is another place than the one in which it is to be.
    moves: bool,
}

/// One overlay's changes on their way.
struct Putting<'a> {
    fs: &'a Mounted,
    copying: Copying<'a>,
    words: Words,
    /// Whether owners are noted beside the files.
    notes_owners: bool,
    lowers: HashMap<PathBuf, Lower>,
    taken: HashSet<u32>,
    /// Upper files that stand for a file of the disk under all of its names.
    indexed: HashMap<(u64, u64), u32>,
    /// Upper files with several names, and their inodes in the disk.
    linked: HashMap<(u64, u64), u32>,
    /// Where what moves waits.
    yard: Option<u32>,
    done: Changes,
}

/// Puts what is in `upper` into `fs`; `words` are those of the overlay. On an error it is there in part.
pub fn put(fs: &Mounted, upper: &Path, words: Words) -> Result<Changes> {
    let mut putting = Putting {
        fs,
        copying: Copying::whole(fs),
        words,
        notes_owners: attribute(upper, OsStr::new(OWNER))?.is_some(),
        lowers: HashMap::new(),
        taken: HashSet::new(),
        indexed: HashMap::new(),
        linked: HashMap::new(),
        yard: None,
        done: Changes::default(),
    };
    putting.resolve(upper, Some(ROOT), 0)?;
    putting.take_out()?;
    putting.directory(upper, ROOT, 0)?;
    putting.clear_yard()?;
    for inode in putting.indexed.values() {
        fs.release(*inode, 1)?;
    }
    // Who made UPPER's own directory is not who changed the overlay's root: its owner and
    // permissions are the disk's. When names in it were changed last, UPPER says.
    putting.times(ROOT, &look(upper)?)?;
    Ok(putting.done)
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot be read", error)
}

fn look(path: &Path) -> Result<Metadata> {
    path.symlink_metadata().map_err(|e| failed(e).at_path(path))
}

fn entries(path: &Path) -> Result<Vec<(PathBuf, Metadata)>> {
    let mut all = Vec::new();
    for entry in path.read_dir().map_err(|e| failed(e).at_path(path))? {
        let path = entry.map_err(|e| failed(e).at_path(path))?.path();
        let meta = look(&path)?;
        all.push((path, meta));
    }
    Ok(all)
}

fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

fn attribute(path: &Path, key: &OsStr) -> Result<Option<Vec<u8>>> {
    let mut value = vec![0; 65536];
    match lgetxattr(path, key, &mut value) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => Ok(None),
        Err(error) => Err(failed(error.into()).at_path(path)),
    }
}

fn is_whiteout(meta: &Metadata) -> bool {
    meta.file_type().is_char_device() && meta.rdev() == 0
}

impl Putting<'_> {
    /// One of the overlay's own attributes.
    fn mark(&self, path: &Path, key: impl Fn(&Words) -> &OsStr) -> Result<Option<Vec<u8>>> {
        attribute(path, key(&self.words))
    }

    /// Whether an empty file in a directory that says so is a whiteout.
    fn is_marked(&self, path: &Path, meta: &Metadata) -> Result<bool> {
        let may = meta.is_file() && meta.len() == 0;
        Ok(may && self.mark(path, |words| &words.whiteout)?.is_some())
    }

    /// Finds out what stands under everything in an upper directory, under which `lower` stands.
    fn resolve(&mut self, upper: &Path, lower: Option<u32>, depth: usize) -> Result<()> {
        if depth > DEEPEST {
            return Err(Error::invalid("directories stand too deep in each other").at_path(upper));
        }
        for (path, meta) in entries(upper)? {
            if meta.is_dir() {
                let under = self.under_directory(&path, lower)?;
                let inode = under.as_ref().map(|under| under.inode);
                if let Some(under) = under {
                    self.keep(&path, under)?;
                }
                self.resolve(&path, inode, depth + 1)?;
            } else if meta.is_file() {
                self.resolve_file(&path, &meta, lower)?;
            }
        }
        Ok(())
    }

    fn keep(&mut self, path: &Path, lower: Lower) -> Result<()> {
        if !self.taken.insert(lower.inode) {
            let text = "stands on what another directory of the overlay stands on";
            return Err(Error::invalid(text).at_path(path));
        }
        self.lowers.insert(path.to_owned(), lower);
        Ok(())
    }

    fn under_directory(&self, path: &Path, lower: Option<u32>) -> Result<Option<Lower>> {
        let opaque = self.mark(path, |words| &words.opaque)?.is_some_and(|value| value == b"y")
            || path.join(WHITEOUT_OPAQUE).symlink_metadata().is_ok()
            || path.with_file_name(whiteout_name(name_of(path))).symlink_metadata().is_ok();
        if opaque {
            return Ok(None);
        }
        Ok(self
            .under(path, lower)?
            .filter(|(_, known)| known.mode & TYPE == DIRECTORY)
            .map(|f| f.0))
    }

    /// What a name in an upper directory stands on, by its redirect or by its own name.
    fn under(&self, path: &Path, lower: Option<u32>) -> Result<Option<(Lower, Attributes)>> {
        let own = name_of(path).as_bytes().to_vec();
        let redirect = self.mark(path, |words| &words.redirect)?;
        let redirected = redirect.is_some();
        let redirect = redirect.map(|value| {
            let text = "has a redirect that leads nowhere: the overlay's changes are damaged";
            Redirect::parse(&value).ok_or_else(|| Error::corrupt(text).at_path(path))
        });
        let place: Option<(u32, Vec<u8>)> = match redirect.transpose()? {
            None => lower.map(|lower| (lower, own.clone())),
            Some(Redirect::Name(name)) => lower.map(|lower| (lower, name.as_bytes().to_vec())),
            Some(Redirect::Path(names)) => {
                let mut at = Some(ROOT);
                let (last, way) = names.split_last().unzip();
                for name in way.unwrap_or_default() {
                    at = match at {
                        Some(at) => self.fs.lookup_attributes(at, name.as_bytes())?,
                        None => None,
                    }
                    .filter(|known| known.mode & TYPE == DIRECTORY)
                    .map(|known| known.inode);
                }
                at.zip(last).map(|(at, last)| (at, last.as_bytes().to_vec()))
            }
        };
        let known = match &place {
            Some((at, name)) => self.fs.lookup_attributes(*at, name)?,
            None => None,
        };
        let (Some((at, name)), Some(known)) = (place, known) else {
            // Without what it stands on, it would be empty.
            let text = "was moved in the overlay, and what was moved is not in the disk: the changes \
                        were made over another disk, or are in this one already";
            return if redirected { Err(Error::invalid(text).at_path(path)) } else { Ok(None) };
        };
        let moves = Some(at) != lower || name != own;
        Ok(Some((Lower { inode: known.inode, place: (at, name), moves }, known)))
    }

    fn resolve_file(&mut self, path: &Path, meta: &Metadata, lower: Option<u32>) -> Result<()> {
        if self.mark(path, |words| &words.metacopy)?.is_some() {
            let found = self.under(path, lower)?;
            let Some((lower, _)) = found.filter(|(_, known)| known.mode & TYPE == REGULAR) else {
                let text = "has its contents in a layer that is not this disk";
                return Err(Error::invalid(text).at_path(path));
            };
            return self.keep(path, lower);
        }
        if self.mark(path, |words| &words.nlink)?.is_none() {
            return Ok(());
        }
        // It was copied up for all names that it has in the disk.
        let origin =
            self.mark(path, |words| &words.origin)?.and_then(|value| Origin::parse(&value));
        let Some(origin) = origin.filter(|origin| origin.uuid == self.fs.uuid()) else {
            return Ok(());
        };
        let [number, generation] = match *origin.handle.bytes.as_chunks::<4>().0 {
            [number, generation] => [number, generation].map(u32::from_le_bytes),
            _ => return Ok(()),
        };
        let same = |known: &Attributes| {
            known.generation == generation && known.mode & TYPE == REGULAR && known.links > 0
        };
        let known = self.fs.attributes(number).ok().filter(same);
        if known.is_some() && !self.indexed.contains_key(&(meta.dev(), meta.ino())) {
            self.fs.hold(number, 1);
            self.indexed.insert((meta.dev(), meta.ino()), number);
        }
        Ok(())
    }

    /// Takes everything that moves out of its place.
    fn take_out(&mut self) -> Result<()> {
        let moving: Vec<Lower> =
            self.lowers.values().filter(|lower| lower.moves).cloned().collect();
        if moving.is_empty() {
            return Ok(());
        }
        let name = yard_name();
        let new =
            New { mode: DIRECTORY | 0o700, umask: 0, uid: 0, gid: 0, device: (0, 0), target: &[] };
        let yard = self.fs.create(ROOT, name.as_bytes(), &new)?;
        self.yard = Some(yard);
        for lower in moving {
            let (at, name) = &lower.place;
            let waiting = lower.inode.to_string();
            self.fs.rename(
                Place::new(*at, name),
                Place::new(yard, waiting.as_bytes()),
                Onto::Free,
            )?;
            self.done.moved += 1;
        }
        Ok(())
    }

    fn clear_yard(&mut self) -> Result<()> {
        match self.yard.take() {
            Some(_) => self.fs.remove_directory(ROOT, yard_name().as_bytes()),
            None => Ok(()),
        }
    }

    /// Makes `target` in the disk what an overlay shows of `upper` over it.
    fn directory(&mut self, upper: &Path, target: u32, depth: usize) -> Result<()> {
        let all = entries(upper)?;
        let marked = self.mark(upper, |words| &words.opaque)?.is_some_and(|value| value == b"x");
        for (path, _) in &all {
            if let Some(hidden) = hidden_by(name_of(path))
                && path.with_file_name(hidden).symlink_metadata().is_err()
            {
                self.clear(target, hidden.as_bytes())?;
            }
        }
        for (path, meta) in all {
            let name = name_of(&path).as_bytes();
            if hidden_by(name_of(&path)).is_some() {
                continue;
            }
            if is_whiteout(&meta) || (marked && self.is_marked(&path, &meta)?) {
                self.clear(target, name)?;
            } else if meta.is_dir() {
                self.subdirectory(&path, &meta, Place::new(target, name), depth)?;
            } else {
                self.file(&path, &meta, Place::new(target, name)).map_err(|e| e.at_path(&path))?;
            }
        }
        Ok(())
    }

    /// Removes a name and all under it.
    fn clear(&mut self, at: u32, name: &[u8]) -> Result<()> {
        let Some(known) = self.fs.lookup_attributes(at, name)? else { return Ok(()) };
        if known.mode & TYPE == DIRECTORY {
            tree::remove(self.fs, known.inode)?;
            self.fs.remove_directory(at, name)?;
        } else {
            self.fs.unlink(at, name)?;
        }
        self.done.removed += 1;
        Ok(())
    }

    /// Makes room for what is to come under a name.
    fn make_room(&mut self, at: u32, name: &[u8]) -> Result<()> {
        let removed = self.done.removed;
        self.clear(at, name)?;
        self.done.removed = removed;
        Ok(())
    }

    /// Puts what stands under an upper file in its place; `None` where nothing does.
    fn bring(&mut self, path: &Path, place: Place<'_>) -> Result<Option<u32>> {
        let Place { directory: at, name } = place;
        let Some(lower) = self.lowers.get(path).cloned() else { return Ok(None) };
        if let (true, Some(yard)) = (lower.moves, self.yard) {
            self.make_room(at, name)?;
            let waiting = lower.inode.to_string();
            self.fs.rename(
                Place::new(yard, waiting.as_bytes()),
                Place::new(at, name),
                Onto::Free,
            )?;
        }
        Ok(Some(lower.inode))
    }

    fn subdirectory(
        &mut self,
        path: &Path,
        meta: &Metadata,
        place: Place<'_>,
        depth: usize,
    ) -> Result<()> {
        let Place { directory: at, name } = place;
        let inode = match self.bring(path, place)? {
            Some(inode) => inode,
            None => {
                self.make_room(at, name)?;
                self.copying.make(meta, place, &[]).map_err(|e| e.at_path(path))?
            }
        };
        self.directory(path, inode, depth + 1)?;
        self.finish(path, meta, inode).map_err(|e| e.at_path(path))
    }

    fn file(&mut self, path: &Path, meta: &Metadata, place: Place<'_>) -> Result<()> {
        let Place { directory: at, name } = place;
        let key = (meta.dev(), meta.ino());
        if let Some(inode) = self.linked.get(&key).copied() {
            return self.link(inode, place);
        }
        if let Some(inode) = self.bring(path, place)? {
            return self.finish(path, meta, inode);
        }
        let own = self.indexed.get(&key).copied();
        let own = own.filter(|inode| self.fs.attributes(*inode).is_ok_and(|known| known.links > 0));
        let inode = match own {
            Some(inode) => {
                let empty = Change { size: Some(0), ..Change::default() };
                self.fs.set_attributes(inode, &empty)?;
                self.link(inode, place)?;
                inode
            }
            None => {
                self.make_room(at, name)?;
                let target = match meta.is_symlink() {
                    true => path.read_link().map_err(failed)?.into_os_string(),
                    false => Default::default(),
                };
                self.copying.make(meta, place, target.as_bytes())?
            }
        };
        if meta.is_file() {
            let from = File::open(path).map_err(failed)?;
            self.copying.contents(&from, meta.len(), inode)?;
        }
        if meta.nlink() > 1 || own.is_some() {
            self.linked.insert(key, inode);
        }
        self.finish(path, meta, inode)
    }

    /// Lets a name stand for a file that has others.
    fn link(&mut self, inode: u32, place: Place<'_>) -> Result<()> {
        let Place { directory: at, name } = place;
        if self.fs.lookup(at, name)? == Some(inode) {
            return Ok(());
        }
        self.make_room(at, name)?;
        self.fs.link(inode, at, name)
    }

    /// Gives a file all that is to be known of it, and takes from it what is not.
    fn finish(&mut self, path: &Path, meta: &Metadata, inode: u32) -> Result<()> {
        self.done.changed += 1;
        let mut keys = Vec::new();
        for key in attribute_names(path)? {
            let key = OsStr::from_bytes(&key);
            // The overlay's own stays behind; what programs called so was escaped.
            let Some(outer) = self.words.outer(key) else { continue };
            let Some(value) = attribute(path, key)? else { continue };
            self.fs.set_attribute(inode, outer.as_bytes(), Some(&value), Need::Either)?;
            keys.push(outer.as_bytes().to_vec());
        }
        for key in self.fs.attribute_names(inode)? {
            if !keys.contains(&key) {
                self.fs.set_attribute(inode, &key, None, Need::Either)?;
            }
        }
        let (user, group) = self.owner(path, meta)?;
        let change = Change {
            mode: (!meta.is_symlink()).then_some(meta.mode() as u16 & 0o7777),
            uid: Some(user),
            gid: Some(group),
            ..Change::default()
        };
        self.fs.set_attributes(inode, &change)?;
        self.times(inode, meta)
    }

    /// Whose a file is to be: as the overlay has noted, where it has.
    fn owner(&self, path: &Path, meta: &Metadata) -> Result<(u32, u32)> {
        if !self.notes_owners {
            return Ok((meta.uid(), meta.gid()));
        }
        let note = if meta.is_symlink() { None } else { attribute(path, OsStr::new(OWNER))? };
        Ok(note.and_then(|note| parse_owner(&note)).unwrap_or_default())
    }

    fn times(&self, inode: u32, meta: &Metadata) -> Result<()> {
        let time = |seconds: i64, nanoseconds: i64| Some((seconds, nanoseconds as u32));
        let change = Change {
            accessed: time(meta.atime(), meta.atime_nsec()),
            modified: time(meta.mtime(), meta.mtime_nsec()),
            ..Change::default()
        };
        self.fs.set_attributes(inode, &change).map(drop)
    }
}

/// The name of the directory in which what moves waits.
fn yard_name() -> String {
    format!(".vdisk-apply-{}", std::process::id())
}
