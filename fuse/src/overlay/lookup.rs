//! What a name in an overlay stands for: a walk down the layers, uppermost first. Changes nothing.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::Overlay;
use super::marks::{Origin, Redirect, WHITEOUT_OPAQUE, hidden_by, is_whiteout, whiteout_name};
use super::node::{Dir, Inode, LowerDir, LowerFile, Node};
use crate::attr::Attr;
use crate::host::{HostDir, Spot};

/// A name that was found.
pub(super) struct Found {
    pub(super) upper: Option<Attr>,
    /// Of a directory: those to be merged.
    pub(super) dirs: Vec<Arc<LowerDir>>,
    /// Attributes of the uppermost of them, or of the file.
    pub(super) lower: Option<Attr>,
    pub(super) file: Option<LowerFile>,
    pub(super) data: Option<LowerFile>,
}

/// Directories of lower layers that have not been looked at yet, each with the names from there.
type Rest = VecDeque<(Arc<LowerDir>, Vec<OsString>)>;

/// Where the walk goes on in lower layers.
struct Walk {
    rest: Rest,
}

/// What a step in one lower directory came to.
pub(super) enum Step {
    /// Nothing there: the layer below decides.
    Below,
    /// Nothing there, and nothing below counts.
    Hidden,
    Is(Attr),
}

/// Where a path in one lower layer leads.
enum Way {
    /// Nowhere: the layer below decides.
    Below,
    /// Nowhere, and nothing below counts.
    Hidden,
    /// To a name in a directory.
    There {
        dir: Arc<LowerDir>,
        name: OsString,
        /// The path to the same in the layers below.
        below: Vec<OsString>,
        /// Whether a directory on the way hides all that is below it.
        ends: bool,
    },
}

pub(super) fn too_deep() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Overlay {
    /// The node of a name in a directory, with `count` more lookups. `names` of the directory is
    /// locked by the caller.
    pub(crate) fn child(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        count: u64,
    ) -> io::Result<Option<Arc<Node>>> {
        Ok(self.child_and_attr(parent, name, count)?.map(|(node, _)| node))
    }

    /// The same, and the attributes where they have just been read.
    pub(crate) fn child_and_attr(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        count: u64,
    ) -> io::Result<Option<(Arc<Node>, Option<Attr>)>> {
        if let Some(node) = self.nodes.named(parent.id, name, count) {
            return Ok(Some((node, None)));
        }
        if name.len() > 255 {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        // A whiteout is no file.
        if hidden_by(name).is_some() {
            return Ok(None);
        }
        match self.find(parent, name)? {
            Some(found) => {
                let attr = found.upper.or(found.lower);
                let node = self.enter(parent, name, found, count)?;
                // One that has other names may be known, and changing, under one of those.
                let alone = attr.filter(|attr| attr.is_dir() || attr.nlink == 1);
                let told = alone.map(|attr| self.shown_as(&node, &node.lock(), attr));
                Ok(Some((node, told.transpose()?)))
            }
            None => Ok(None),
        }
    }

    fn find(&self, parent: &Arc<Node>, name: &OsStr) -> io::Result<Option<Found>> {
        let dir = parent.directory()?;
        let mut found =
            Found { upper: None, dirs: Vec::new(), lower: None, file: None, data: None };
        let beside = |name: &OsStr| {
            dir.lowers.iter().map(|lower| (lower.clone(), vec![name.to_owned()])).collect()
        };
        let mut walk = Walk { rest: beside(name) };
        if parent.has_upper() {
            let upper = parent.upper_dir(&self.recent)?;
            if let Some(attr) = upper.look(name)? {
                if is_whiteout(&attr) {
                    return Ok(None);
                }
                found.upper = Some(attr);
                if !self.go_on_below(&upper, name, &attr, &mut walk, &beside)? {
                    walk.rest.clear();
                }
            }
            // A whiteout that is a name hides what is below, not what stands beside it.
            if !walk.rest.is_empty() && self.hidden_in_upper(dir, &upper, name)? {
                walk.rest.clear();
            }
        }
        self.walk(&mut walk, &mut found)?;
        let there = found.upper.is_some() || found.lower.is_some();
        Ok(there.then_some(found))
    }

    /// Whether lower layers count beside what stands in the upper one, and where in them.
    fn go_on_below(
        &self,
        upper: &HostDir,
        name: &OsStr,
        attr: &Attr,
        walk: &mut Walk,
        beside: &dyn Fn(&OsStr) -> Rest,
    ) -> io::Result<bool> {
        let spot = upper.at(name);
        if attr.is_dir() {
            let mark = Path::new(name).join(WHITEOUT_OPAQUE);
            let opaque = spot.xattr(&self.words.opaque)?.is_some_and(|value| value == b"y")
                || (!walk.rest.is_empty() && upper.look(mark.as_os_str())?.is_some());
            if opaque {
                return Ok(false);
            }
        } else if !self.has_metacopy(attr, &|key| spot.xattr(key))? {
            return Ok(false);
        }
        match self.redirect_of(&|key| spot.xattr(key))? {
            None => {}
            Some(Redirect::Name(name)) => walk.rest = beside(&name),
            Some(Redirect::Path(names)) => {
                walk.rest =
                    self.lowers.iter().map(|lower| (lower.root.clone(), names.clone())).collect();
            }
        }
        Ok(true)
    }

    /// Whether the contents of a regular file stand in a layer below. Such a file is all hole but
    /// for a block of attributes.
    fn has_metacopy(
        &self,
        attr: &Attr,
        xattr: &dyn Fn(&OsStr) -> io::Result<Option<Vec<u8>>>,
    ) -> io::Result<bool> {
        let sparse = attr.is_file() && attr.blocks.saturating_mul(512) < attr.size;
        Ok(sparse && xattr(&self.words.metacopy)?.is_some())
    }

    fn redirect_of(
        &self,
        xattr: &dyn Fn(&OsStr) -> io::Result<Option<Vec<u8>>>,
    ) -> io::Result<Option<Redirect>> {
        match xattr(&self.words.redirect)? {
            None => Ok(None),
            Some(value) => match Redirect::parse(&value) {
                Some(redirect) => Ok(Some(redirect)),
                None => Err(too_deep()),
            },
        }
    }

    pub(crate) fn hidden_in_upper(
        &self,
        dir: &Dir,
        upper: &HostDir,
        name: &OsStr,
    ) -> io::Result<bool> {
        let look = || Ok(upper.names()?.iter().any(|entry| hidden_by(&entry.name).is_some()));
        let some = dir.whiteouts.find(look)?;
        Ok(some && upper.look(&whiteout_name(name))?.is_some())
    }

    /// Goes down the lower layers.
    fn walk(&self, walk: &mut Walk, found: &mut Found) -> io::Result<()> {
        let above = found.upper;
        while let Some((from, names)) = walk.rest.pop_front() {
            let way = self.descend(from, names)?;
            match &way {
                Way::Below => continue,
                Way::Hidden => return Ok(()),
                Way::There { ends: true, .. } => walk.rest.clear(),
                // Directories on the way stand elsewhere in the layers below.
                Way::There { below, .. } => {
                    for (_, names) in &mut walk.rest {
                        names.clone_from(below);
                    }
                }
            }
            let Way::There { dir, name, .. } = way else { continue };
            let attr = match self.step(&dir, &name, walk.rest.is_empty())? {
                Step::Below => continue,
                Step::Hidden => return Ok(()),
                Step::Is(attr) => attr,
            };
            let file = LowerFile { dir: dir.clone(), name: name.as_os_str().into() };
            let first = above.or(found.lower);
            let get = dir.get(&self.recent)?;
            let xattr = |key: &OsStr| get.mark(Some(&name), key);
            let redirect;
            if !attr.is_dir() {
                match first {
                    Some(first) if first.is_dir() => return Ok(()),
                    // The contents of a file that has only attributes above.
                    Some(_) if !attr.is_file() => return Err(too_deep()),
                    Some(_) => found.data = Some(file),
                    None => found.file = Some(file),
                }
                if found.lower.is_none() {
                    found.lower = Some(attr);
                }
                if !self.has_metacopy(&attr, &xattr)? {
                    return Ok(());
                }
                redirect = self.redirect_of(&xattr)?;
            } else {
                match first {
                    Some(first) if !first.is_dir() => return Ok(()),
                    _ => {}
                }
                let child = dir.child(&name);
                found.lower.get_or_insert(attr);
                found.dirs.push(child.clone());
                if usize::from(dir.layer) + 1 == self.lowers.len() {
                    return Ok(());
                }
                redirect = self.redirect_of(&xattr)?;
                // A path leads to layers in which the directory above is not to be seen.
                let goes_on = !walk.rest.is_empty() || matches!(redirect, Some(Redirect::Path(_)));
                if !goes_on || self.ends_here(&child)? {
                    return Ok(());
                }
            }
            match redirect {
                None => {}
                Some(Redirect::Name(new)) => {
                    for (_, names) in &mut walk.rest {
                        if let Some(last) = names.last_mut() {
                            last.clone_from(&new);
                        }
                    }
                }
                Some(Redirect::Path(names)) => {
                    let below = self.lowers.get(usize::from(dir.layer) + 1..).unwrap_or_default();
                    walk.rest =
                        below.iter().map(|lower| (lower.root.clone(), names.clone())).collect();
                }
            }
        }
        Ok(())
    }

    /// Goes to the directory in which the last of `names` is to be looked for.
    fn descend(&self, from: Arc<LowerDir>, names: Vec<OsString>) -> io::Result<Way> {
        let mut names = names;
        let Some(name) = names.pop() else { return Ok(Way::Hidden) };
        let (mut dir, mut below, mut ends) = (from, Vec::new(), false);
        for part in names {
            match self.step(&dir, &part, true)? {
                Step::Below => return Ok(Way::Below),
                Step::Is(attr) if attr.is_dir() => {}
                Step::Is(_) | Step::Hidden => return Ok(Way::Hidden),
            }
            let child = dir.child(&part);
            below.push(part);
            if usize::from(dir.layer) + 1 < self.lowers.len() {
                let get = child.get(&self.recent)?;
                ends |= self.ends_here(&child)?;
                match self.redirect_of(&|key| get.mark(None, key))? {
                    None => {}
                    Some(Redirect::Path(path)) => below = path,
                    Some(Redirect::Name(new)) => {
                        below.pop();
                        below.push(new);
                    }
                }
            }
            dir = child;
        }
        below.push(name.clone());
        Ok(Way::There { dir, name, below, ends })
    }

    /// Looks at one name in one lower directory.
    pub(super) fn step(&self, dir: &LowerDir, name: &OsStr, lowest: bool) -> io::Result<Step> {
        let get = match dir.get(&self.recent) {
            Ok(get) => get,
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                return Ok(Step::Below);
            }
            Err(e) => return Err(e),
        };
        if let Some(attr) = get.attr(Some(name))? {
            let mark = &self.words.whiteout;
            let by_mark = || -> io::Result<bool> {
                Ok(attr.is_file()
                    && attr.size == 0
                    && get.mark(None, &self.words.opaque)?.is_some_and(|value| value == b"x")
                    && get.mark(Some(name), mark)?.is_some())
            };
            return Ok(if is_whiteout(&attr) || by_mark()? {
                Step::Hidden
            } else {
                Step::Is(attr)
            });
        }
        let hidden =
            !lowest && self.whiteouts_in(dir)? && get.attr(Some(&whiteout_name(name)))?.is_some();
        Ok(if hidden { Step::Hidden } else { Step::Below })
    }

    /// Whether whiteouts that are names are in a lower directory.
    pub(crate) fn whiteouts_in(&self, dir: &LowerDir) -> io::Result<bool> {
        dir.whiteouts.find(|| {
            let entries = dir.get(&self.recent)?.entries()?;
            Ok(entries.iter().any(|entry| hidden_by(&entry.name).is_some()))
        })
    }

    /// Whether nothing below is merged into a lower directory.
    fn ends_here(&self, dir: &LowerDir) -> io::Result<bool> {
        let get = dir.get(&self.recent)?;
        let opaque = get.mark(None, &self.words.opaque)?.is_some_and(|value| value == b"y");
        Ok(opaque
            || get.attr(Some(OsStr::new(WHITEOUT_OPAQUE)))?.is_some()
            // A whiteout beside it: what is below was removed, and this was made anew.
            || match &dir.beside() {
                Some((parent, name)) => {
                    self.whiteouts_in(parent)?
                        && parent.get(&self.recent)?.attr(Some(&whiteout_name(name)))?.is_some()
                }
                None => false,
            })
    }

    /// Whether a lower layer shows anything under a name in a directory.
    pub(crate) fn lower_has(&self, parent: &Arc<Node>, name: &OsStr) -> io::Result<bool> {
        for dir in &parent.directory()?.lowers {
            match self.step(dir, name, false)? {
                Step::Below => {}
                Step::Hidden => return Ok(false),
                Step::Is(_) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// The number that a file of a layer has in the overlay.
    pub(crate) fn number(device: u16, ino: u64) -> u64 {
        ino ^ (u64::from(device) << 48)
    }

    pub(crate) fn device_of(&self, layer: u16) -> u16 {
        self.lowers.get(usize::from(layer)).map_or(u16::MAX, |lower| lower.device)
    }

    /// The inode that a file was copied up from.
    pub(crate) fn origin(&self, spot: Spot<'_>) -> io::Result<Option<(Origin, Option<Inode>)>> {
        let Some(value) = spot.xattr(&self.words.origin)? else { return Ok(None) };
        let Some(origin) = Origin::parse(&value) else { return Ok(None) };
        let layer = self.lowers.iter().find(|lower| lower.layer.uuid() == origin.uuid);
        let inode = layer.and_then(|lower| Some((lower.device, origin.inode()?)));
        Ok(Some((origin, inode)))
    }

    /// Whether files in an upper directory may have been copied up.
    pub(crate) fn impure(&self, parent: &Node, upper: &HostDir) -> io::Result<bool> {
        let look = || Ok(upper.this().xattr(&self.words.impure)?.is_some());
        parent.directory()?.impure.find(look)
    }

    /// The handle of a lower file, as it is kept of what is copied up from it.
    pub(crate) fn origin_of(&self, file: &LowerFile) -> io::Result<Option<Origin>> {
        let handle = file.dir.get(&self.recent)?.handle(Some(&file.name))?;
        let lower = self.lowers.get(usize::from(file.dir.layer));
        Ok(handle.zip(lower).map(|(handle, lower)| Origin { uuid: lower.layer.uuid(), handle }))
    }
}
