//! Nodes for what was found under a name: a new one, or the one that stands for the same file under
//! another of its names. Walks no layer.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use super::Overlay;
use super::lookup::{Found, Step, too_deep};
use super::marks::{Origin, is_whiteout, parse_nlink};
use super::node::UPPER_DEVICE;
use super::node::table::Entered;
use super::node::{Alias, Dir, Fresh, Index, Inode, Node, State};
use crate::attr::Attr;
use crate::host::Spot;

impl Overlay {
    /// Makes a node of what was found.
    pub(super) fn enter(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        mut found: Found,
        count: u64,
    ) -> io::Result<Arc<Node>> {
        let shared: Arc<OsStr> = name.into();
        let alias = |upper| Alias { parent: parent.clone(), name: shared.clone(), upper };
        let attr = found.upper.or(found.lower).ok_or_else(too_deep)?;
        let kind = attr.kind();
        let lower = |found: &Found| {
            let dir = found.dirs.first().or(found.file.as_ref().map(|file| &file.dir));
            let from = dir.map_or(u16::MAX, |dir| self.device_of(dir.layer));
            found.lower.map(|attr| (from, attr.ino))
        };
        let upper = found.upper.is_some();
        if attr.is_dir() {
            let inode = lower(&found).unwrap_or((UPPER_DEVICE, attr.ino));
            let state = State { names: vec![alias(upper)], ..State::default() };
            let (ino, dirs) = (Self::number(inode.0, inode.1), std::mem::take(&mut found.dirs));
            let dir = Some(Dir::new(dirs, None));
            return Ok(self.insert(Fresh { kind, ino, upper, dir, state }, count));
        }
        if upper {
            return self.enter_upper(parent, alias(true), &found, count);
        }
        let inode = lower(&found).ok_or_else(too_deep)?;
        let ino = Self::number(inode.0, inode.1);
        if attr.nlink > 1 {
            if let Some(node) = self.nodes.inode(inode) {
                return Ok(self.join(&node, alias(false), count));
            }
            if let Some(node) = self.enter_indexed(&found, alias(false), inode, count)? {
                return Ok(node);
            }
        }
        let state = State {
            names: vec![alias(false)],
            lower: found.file,
            data: found.data,
            inodes: if attr.nlink > 1 { vec![inode] } else { Vec::new() },
            ..State::default()
        };
        Ok(self.insert(Fresh { kind, ino, upper, dir: None, state }, count))
    }

    /// Enters a node, unless another thread has found the same file under another name.
    pub(crate) fn insert(&self, fresh: Fresh, count: u64) -> Arc<Node> {
        match self.nodes.enter(fresh, count) {
            Entered::Here(node) => node,
            Entered::Known(node, mut fresh) => {
                let mut names = std::mem::take(&mut fresh.state.names);
                match names.pop() {
                    Some(alias) => self.join(&node, alias, count),
                    None => node,
                }
            }
        }
    }

    /// Gives a node that is known already one more of its names.
    fn join(&self, node: &Arc<Node>, alias: Alias, count: u64) -> Arc<Node> {
        let mut state = node.lock();
        let known = state
            .names
            .iter()
            .any(|other| other.parent.id == alias.parent.id && other.name == alias.name);
        if !known {
            self.nodes.add_name(node, alias.parent.id, &alias.name);
            state.names.push(alias);
        }
        self.nodes.count(node, count);
        node.clone()
    }

    fn enter_upper(
        &self,
        parent: &Arc<Node>,
        alias: Alias,
        found: &Found,
        count: u64,
    ) -> io::Result<Arc<Node>> {
        let attr = found.upper.ok_or_else(too_deep)?;
        let own = (UPPER_DEVICE, attr.ino);
        if attr.nlink > 1
            && let Some(node) = self.nodes.inode(own)
        {
            return Ok(self.join(&node, alias, count));
        }
        let dir = parent.upper_dir(&self.recent)?;
        let spot = dir.at(&alias.name);
        let origin = match self.impure(parent, &dir)? {
            true => self.origin(spot)?,
            false => None,
        };
        let (mut inodes, mut index) = (Vec::new(), None);
        if attr.nlink > 1 {
            inodes.push(own);
            if let Some((origin, from)) = &origin {
                inodes.extend(from);
                let lower = from.map(|from| self.lower_links(parent, &alias.name, from));
                index = self.index_of(origin, spot, &attr, lower.transpose()?.flatten())?;
            }
        }
        let from = origin.and_then(|(_, from)| from).unwrap_or(own);
        let state = State {
            names: vec![alias],
            data: found.data.clone(),
            index,
            inodes,
            ..State::default()
        };
        let (kind, ino) = (attr.kind(), Self::number(from.0, from.1));
        Ok(self.insert(Fresh { kind, ino, upper: true, dir: None, state }, count))
    }

    /// How many links the lower file has that a file was copied up from, where it still has the
    /// same name.
    fn lower_links(&self, parent: &Node, name: &OsStr, of: Inode) -> io::Result<Option<u32>> {
        for dir in &parent.directory()?.lowers {
            if let Step::Is(attr) = self.step(dir, name, true)?
                && (self.device_of(dir.layer), attr.ino) == of
            {
                return Ok(Some(attr.nlink));
            }
        }
        Ok(None)
    }

    /// The node of a lower file that was copied up under another of its names.
    fn enter_indexed(
        &self,
        found: &Found,
        alias: Alias,
        inode: Inode,
        count: u64,
    ) -> io::Result<Option<Arc<Node>>> {
        let Some(file) = &found.file else { return Ok(None) };
        let (Some(upper), Some(origin)) = (&self.upper, self.origin_of(file)?) else {
            return Ok(None);
        };
        let (Some(dir), Some(name)) = (&upper.index, origin.index_name()) else { return Ok(None) };
        let Some(attr) = dir.look(&name)? else { return Ok(None) };
        let lower = found.lower.ok_or_else(too_deep)?;
        if is_whiteout(&attr) || attr.kind() != lower.kind() {
            return Ok(None);
        }
        let own = (UPPER_DEVICE, attr.ino);
        if let Some(node) = self.nodes.inode(own) {
            let mut state = node.lock();
            self.nodes.add_inode(&node, &mut state, inode);
            state.lower.get_or_insert_with(|| file.clone());
            drop(state);
            return Ok(Some(self.join(&node, alias, count)));
        }
        let spot = dir.at(&name);
        let index = self.index_of(&origin, spot, &attr, Some(lower.nlink))?;
        let fd = spot.open(rustix::fs::OFlags::PATH)?;
        let state = State {
            names: vec![alias],
            // No name that is known leads to it in the upper layer.
            orphan: Some(Arc::new(fd.into())),
            lower: Some(file.clone()),
            index,
            inodes: vec![own, inode],
            ..State::default()
        };
        let (kind, ino) = (attr.kind(), Self::number(inode.0, inode.1));
        let fresh = Fresh { kind, ino, upper: true, dir: None, state };
        Ok(Some(self.insert(fresh, count)))
    }

    /// What the index says of an upper file with this origin; `None` where it is not in it.
    fn index_of(
        &self,
        origin: &Origin,
        spot: Spot<'_>,
        attr: &Attr,
        lower: Option<u32>,
    ) -> io::Result<Option<Index>> {
        let dir = self.upper.as_ref().and_then(|upper| upper.index.as_ref());
        let (Some(dir), Some(name)) = (dir, origin.index_name()) else { return Ok(None) };
        if dir.look(&name)?.is_none_or(|index| index.ino != attr.ino) {
            return Ok(None);
        }
        let kept = spot.xattr(&self.words.nlink)?;
        // Where nothing else is known, all names but the index's own.
        let otherwise = attr.nlink.saturating_sub(1).max(1);
        let lower = lower.unwrap_or(otherwise);
        let links = kept.and_then(|value| parse_nlink(&value, attr.nlink, lower));
        let links = links.unwrap_or(otherwise);
        Ok(Some(Index { links, name: name.as_os_str().into() }))
    }
}
