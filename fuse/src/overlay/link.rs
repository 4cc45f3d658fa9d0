//! One more name for a file of an overlay.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use super::Overlay;
use super::marks::{hidden_by, is_whiteout, nlink_value, whiteout_name};
use super::node::UPPER_DEVICE;
use super::node::{Alias, Node, State};
use crate::attr::Attr;
use crate::files::{Entry, Name};

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Overlay {
    pub(crate) fn make_link(&self, node: u64, to: Name<'_>) -> io::Result<Entry> {
        let node = self.nodes.get(node)?;
        let parent = self.nodes.get(to.parent)?;
        let upper = self.upper()?;
        if to.name.len() > 255 {
            return Err(errno(libc::ENAMETOOLONG));
        }
        if hidden_by(to.name).is_some() {
            return Err(errno(libc::EINVAL));
        }
        let dir = parent.directory()?;
        let _names = dir.changing();
        if parent.lock().removed {
            return Err(errno(libc::ENOENT));
        }
        if self.is_gone(&node)? {
            return Err(errno(libc::ENOENT));
        }
        self.copy_up(&node)?;
        self.copy_up(&parent)?;
        let place = parent.upper_dir(&self.recent)?;
        let mut state = node.lock();
        let held = self.held(&node, &state)?;
        match place.link(held.spot(), to.name) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if !place.look(to.name)?.is_some_and(|attr| is_whiteout(&attr)) {
                    return Err(e);
                }
                let temporary = upper.temporary();
                upper.work.link(held.spot(), &temporary)?;
                upper.work.rename(&temporary, &place, to.name, 0).inspect_err(|_| {
                    let _ = upper.work.unlink(&temporary);
                })?;
            }
            Err(e) => return Err(e),
        }
        if !dir.lowers.is_empty() && self.hidden_in_upper(dir, &place, to.name)? {
            place.unlink(&whiteout_name(to.name))?;
        }
        let real = held.spot().stat()?;
        if state.names.is_empty() && state.index.is_none() {
            // A file without a name has got one.
            state.orphan = None;
        } else if node.ino != Self::number(UPPER_DEVICE, real.ino) {
            self.set_impure(&parent, &place)?;
        }
        let attr = self.linked(&node, &mut state, &real, &parent, to.name)?;
        self.nodes.count(&node, 1);
        Ok(Entry { node: node.id, generation: 0, attr })
    }

    /// Whether a file lost its last name: it gets none any more (link(2)), though there is one yet in the
    /// lower layer that it is read from, and a copy of it would take one.
    fn is_gone(&self, node: &Node) -> io::Result<bool> {
        let state = node.lock();
        if !state.removed || !node.has_upper() {
            return Ok(state.removed);
        }
        Ok(self.held(node, &state)?.spot().stat()?.nlink == 0)
    }

    fn linked(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        real: &Attr,
        parent: &Arc<Node>,
        name: &OsStr,
    ) -> io::Result<Attr> {
        if let Some(index) = &mut state.index {
            // Both numbers have grown by one: their difference, which is what is kept, has not.
            index.links = index.links.saturating_add(1);
        }
        self.nodes.add_inode(node, state, (UPPER_DEVICE, real.ino));
        let name: Arc<OsStr> = name.into();
        self.nodes.add_name(node, parent.id, &name);
        self.listed(parent, &name, node.ino, node.kind);
        state.names.push(Alias { parent: parent.clone(), name, upper: true });
        self.attr_of(node, state)
    }

    /// Writes down how many names a file in the index has, while its upper file has `upper`.
    pub(crate) fn keep_links(&self, node: &Node, state: &State) -> io::Result<()> {
        let Some(index) = &state.index else { return Ok(()) };
        let held = self.held(node, state)?;
        let upper = held.spot().stat()?.nlink;
        self.mark(held.spot(), &self.words.nlink, &nlink_value(index.links, upper))
    }
}
