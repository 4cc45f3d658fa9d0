//! The names in a merged directory, in an order that does not change while names come and go: by
//! a hash of the name, which also is the place that the kernel goes on from.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::sync::Arc;

use super::Overlay;
use super::marks::{hidden_by, is_whiteout};
use super::node::listing::{FIRST, Listing};
use super::node::{LowerDir, Node, UPPER_DEVICE};
use crate::attr::DirEntry;
use crate::host::HostDir;
use crate::layer::LayerDir;

impl Overlay {
    /// Reads what a directory's layers hold and merges it.
    pub(crate) fn list(&self, node: &Arc<Node>) -> io::Result<Listing> {
        let dir = node.directory()?;
        let mut listing = Listing::default();
        let mut hidden = HashSet::new();
        if node.has_upper() {
            let upper = node.upper_dir(&self.recent)?;
            let pure = !self.impure(node, &upper)?;
            let names = upper.names()?;
            let whiteouts = || Ok(names.iter().any(|entry| hidden_by(&entry.name).is_some()));
            dir.whiteouts.find(whiteouts)?;
            let merged = !dir.lowers.is_empty();
            for entry in self.shown(names, upper.as_ref(), merged.then_some(&mut hidden), false)? {
                let ino = match pure {
                    true => Self::number(UPPER_DEVICE, entry.ino),
                    false => self.upper_number(node, &upper, &entry)?,
                };
                let hash = self.nodes.hash(node.id, &entry.name);
                listing.insert(hash, &entry.name, ino, entry.kind);
            }
        }
        let mut dirs = dir.lowers.iter().peekable();
        while let Some(lower) = dirs.next() {
            let device = self.device_of(lower.layer);
            let covering = node.has_upper() || !hidden.is_empty() || !listing.is_empty();
            let below = dirs.peek().is_some();
            for entry in self.lower_names(lower, (covering || below).then_some(&mut hidden))? {
                let hash = self.nodes.hash(node.id, &entry.name);
                let ino = Self::number(device, entry.ino);
                listing.insert(hash, &entry.name, ino, entry.kind);
            }
        }
        Ok(listing)
    }

    fn lower_names(
        &self,
        lower: &LowerDir,
        hidden: Option<&mut HashSet<OsString>>,
    ) -> io::Result<Vec<DirEntry>> {
        let get = lower.get(&self.recent)?;
        let names = get.entries()?;
        lower.whiteouts.set(names.iter().any(|entry| hidden_by(&entry.name).is_some()));
        let marked = get.mark(None, &self.words.opaque)?.is_some_and(|value| value == b"x");
        self.shown(names, get.as_ref(), hidden, marked)
    }

    /// What of a layer's names is shown. `hidden` are the names that count no more in this layer,
    /// and gets those that count no more below it; `marked` says to look for whiteouts that are
    /// attributes of empty files.
    fn shown(
        &self,
        names: Vec<DirEntry>,
        dir: &dyn LayerDir,
        hidden: Option<&mut HashSet<OsString>>,
        marked: bool,
    ) -> io::Result<Vec<DirEntry>> {
        let mut shown = Vec::with_capacity(names.len());
        let (mut covered, mut whiteouts) = (Vec::new(), Vec::new());
        for mut entry in names {
            // Before what is hidden: one that hides a whiteout's name takes nothing from it.
            if let Some(name) = hidden_by(&entry.name) {
                whiteouts.push(name.to_owned());
                continue;
            }
            if hidden.as_ref().is_some_and(|hidden| hidden.contains(&entry.name)) {
                continue;
            }
            if matches!(entry.kind, 0 | libc::S_IFCHR) || (marked && entry.kind == libc::S_IFREG) {
                // Gone meanwhile, as names in the upper layer may.
                let Some(attr) = dir.attr(Some(&entry.name))? else { continue };
                entry.kind = attr.kind();
                let mark = &self.words.whiteout;
                let by_mark = marked
                    && attr.is_file()
                    && attr.size == 0
                    && dir.mark(Some(&entry.name), mark)?.is_some();
                if is_whiteout(&attr) || by_mark {
                    covered.push(entry.name);
                    continue;
                }
            }
            if hidden.is_some() {
                covered.push(entry.name.clone());
            }
            shown.push(entry);
        }
        if let Some(hidden) = hidden {
            hidden.extend(covered);
            hidden.extend(whiteouts);
        }
        Ok(shown)
    }

    /// The number of a name in an upper directory that may have been copied up.
    fn upper_number(
        &self,
        parent: &Arc<Node>,
        upper: &HostDir,
        entry: &DirEntry,
    ) -> io::Result<u64> {
        if let Some(node) = self.nodes.named(parent.id, &entry.name, 0) {
            return Ok(node.ino);
        }
        if entry.kind == libc::S_IFDIR {
            // Merged or not: that takes a look at the lower layers.
            let node = self.child(parent, &entry.name, 0)?;
            let ino = node.as_ref().map_or(entry.ino, |node| node.ino);
            if let Some(node) = node {
                self.nodes.forget(node.id, 0);
            }
            return Ok(ino);
        }
        let origin = self.origin(upper.at(&entry.name))?.and_then(|(_, inode)| inode);
        let (device, ino) = origin.unwrap_or((UPPER_DEVICE, entry.ino));
        Ok(Self::number(device, ino))
    }

    /// Hands the names of a directory out, see [`Files::readdir`](crate::files::Files::readdir).
    pub(crate) fn read_names(
        &self,
        node: &Arc<Node>,
        offset: u64,
        add: &mut dyn FnMut(&DirEntry, u64) -> bool,
    ) -> io::Result<()> {
        let parent = node.lock().names.first().map_or(node.ino, |alias| alias.parent.ino);
        let dots = [(1, ".", node.ino), (2, "..", parent)];
        for (place, name, ino) in dots.into_iter().filter(|(place, ..)| *place > offset) {
            let entry = DirEntry { name: name.into(), ino, kind: libc::S_IFDIR };
            if !add(&entry, place) {
                return Ok(());
            }
        }
        let batch = self.names_from(node, offset)?;
        for (place, entry) in batch {
            if !add(&entry, place) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// As many names from after a place as one reply may hold. They are copied: to look at each
    /// takes locks that come before the listing's.
    fn names_from(&self, node: &Arc<Node>, offset: u64) -> io::Result<Vec<(u64, DirEntry)>> {
        let dir = node.directory()?;
        if node.lock().removed {
            return Ok(Vec::new());
        }
        let mut listing = dir.listing();
        let listing_now = match listing.as_mut() {
            Some(kept) if offset >= FIRST => kept,
            _ => {
                // Whoever starts anew sees what is there now.
                drop(listing);
                let fresh = self.list(node)?;
                listing = dir.listing();
                listing.insert(fresh)
            }
        };
        const BATCH: usize = 1024;
        let from = (offset.saturating_add(1), OsString::new());
        let batch: Vec<_> = listing_now
            .0
            .range(from..)
            .take(BATCH)
            .map(|((place, name), (ino, kind))| {
                (*place, DirEntry { name: name.clone(), ino: *ino, kind: *kind })
            })
            .collect();
        if batch.is_empty() {
            *listing = None;
        }
        Ok(batch)
    }
}
