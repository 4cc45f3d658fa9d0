//! Renaming. What comes from a lower layer is copied up first; a directory takes a redirect along
//! that says where its lower ones stand, so that none is ever refused.

use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::{Arc, MutexGuard};

use super::marks::{Redirect, hidden_by, is_whiteout, whiteout_name};
use super::node::{Node, State};
use super::{Overlay, Upper};
use crate::files::{Name, ROOT};
use crate::host::HostDir;

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// A name that takes part in one.
#[derive(Clone, Copy)]
struct Side<'a> {
    parent: &'a Arc<Node>,
    name: &'a OsStr,
}

/// One end of a renaming.
struct End<'a> {
    parent: Arc<Node>,
    place: Arc<HostDir>,
    name: &'a OsStr,
    /// Whether lower layers show something there.
    below: bool,
}

/// Two states locked, lower number first.
fn lock_both<'a>(a: &'a Node, b: &'a Node) -> (MutexGuard<'a, State>, MutexGuard<'a, State>) {
    if a.id < b.id {
        let first = a.lock();
        (first, b.lock())
    } else {
        let second = b.lock();
        (a.lock(), second)
    }
}

impl Overlay {
    pub(crate) fn rename_name(&self, from: Name<'_>, to: Name<'_>, flags: u32) -> io::Result<()> {
        const KNOWN: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE;
        if flags & !KNOWN != 0 || flags == KNOWN {
            return Err(errno(libc::EINVAL));
        }
        if to.name.len() > 255 {
            return Err(errno(libc::ENAMETOOLONG));
        }
        if hidden_by(to.name).is_some() {
            return Err(errno(libc::EINVAL));
        }
        let (old, new) = (self.nodes.get(from.parent)?, self.nodes.get(to.parent)?);
        let (a, b) = (old.directory()?, new.directory()?);
        let (_first, _second) = match old.id.cmp(&new.id) {
            std::cmp::Ordering::Equal => (a.changing(), None),
            std::cmp::Ordering::Less => (a.changing(), Some(b.changing())),
            std::cmp::Ordering::Greater => {
                let second = b.changing();
                (a.changing(), Some(second))
            }
        };
        let moved = self.child(&old, from.name, 0)?.ok_or_else(|| errno(libc::ENOENT))?;
        let victim = self.child(&new, to.name, 0)?;
        let sides = [Side { parent: &old, name: from.name }, Side { parent: &new, name: to.name }];
        let result = self.rename_node(sides, &moved, &victim, flags);
        self.nodes.forget(moved.id, 0);
        if let Some(victim) = victim {
            self.nodes.forget(victim.id, 0);
        }
        result
    }

    fn rename_node(
        &self,
        [from, to]: [Side<'_>; 2],
        moved: &Arc<Node>,
        victim: &Option<Arc<Node>>,
        flags: u32,
    ) -> io::Result<()> {
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        match victim {
            None if exchange => return Err(errno(libc::ENOENT)),
            Some(_) if flags & libc::RENAME_NOREPLACE != 0 => return Err(errno(libc::EEXIST)),
            // Two names of one file: nothing to do.
            Some(victim) if victim.id == moved.id => return Ok(()),
            Some(victim) if !exchange && victim.is_dir() != moved.is_dir() => {
                let number = if victim.is_dir() { libc::EISDIR } else { libc::ENOTDIR };
                return Err(errno(number));
            }
            _ => {}
        }
        let upper = self.upper()?;
        // Nobody makes a name in a directory that goes.
        let goes = victim.as_ref().filter(|_| !exchange);
        let gone = goes.and_then(|victim| victim.dir.as_deref().map(|dir| (victim, dir)));
        let _inside = gone.map(|(_, dir)| dir.changing());
        let check_empty = || match gone {
            Some((victim, _)) if !self.list(victim)?.is_empty() => Err(errno(libc::ENOTEMPTY)),
            _ => Ok(()),
        };
        // Copying up may fail. That the directory is not empty is told before where lower layers have to do
        // with it, and only after where the upper one alone does.
        let lower = gone.is_some_and(|(victim, dir)| !victim.has_upper() || !dir.lowers.is_empty());
        if lower {
            check_empty()?;
        }
        self.copy_up(from.parent)?;
        self.copy_up(to.parent)?;
        self.raise(from, moved)?;
        if !lower {
            check_empty()?;
        }
        let end = |Side { parent, name }| -> io::Result<End<'_>> {
            let place = parent.upper_dir(&self.recent)?;
            let below = self.lower_has(parent, name)?;
            Ok(End { parent: parent.clone(), place, name, below })
        };
        let (source, target) = (end(from)?, end(to)?);
        match victim {
            Some(other) if exchange => {
                self.raise(to, other)?;
                self.exchange(&source, &target, moved, other)
            }
            Some(victim) => self.replace(upper, &source, &target, moved, victim),
            None => {
                let mut state = moved.lock();
                self.prepare(moved, &mut state, &source, &target)?;
                self.put_away(upper, &source, &target, moved.is_dir(), None)?;
                self.moved(moved, &mut state, &source, &target);
                Ok(())
            }
        }
    }

    /// Sees to it that a name stands in the upper layer.
    fn raise(&self, Side { parent, name }: Side<'_>, node: &Arc<Node>) -> io::Result<()> {
        self.copy_up(node)?;
        let mut state = node.lock();
        match Self::which(&state, parent, name) {
            Some(which) if !node.is_dir() => self.link_up(node, &mut state, which),
            _ => Ok(()),
        }
    }

    /// Writes down what a moved node needs to be found whole in its new place.
    fn prepare(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        from: &End<'_>,
        to: &End<'_>,
    ) -> io::Result<()> {
        let Some(dir) = &node.dir else {
            // Its number comes from a lower file, and is told of where it is listed.
            let held = self.held(node, state)?;
            if node.ino != Self::number(super::UPPER_DEVICE, held.spot().stat()?.ino) {
                self.set_impure(&to.parent, &to.place)?;
            }
            return Ok(());
        };
        let held = self.held(node, state)?;
        if dir.lowers.is_empty() {
            if !to.parent.directory()?.lowers.is_empty() {
                self.mark(held.spot(), &self.words.opaque, b"y")?;
            }
            return Ok(());
        }
        self.set_impure(&to.parent, &to.place)?;
        let beside = from.parent.id == to.parent.id;
        let redirect = self.redirect_for(&from.parent, from.name, held.spot(), beside)?;
        // Without it the directory would lose its contents: better not moved at all.
        let value = redirect.value().ok_or_else(|| errno(libc::EXDEV))?;
        if !self.upper()?.xattrs {
            return Err(errno(libc::EXDEV));
        }
        held.spot().set_xattr(&self.words.redirect, &value, 0).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOSPC | libc::E2BIG | libc::ERANGE | libc::EOPNOTSUPP) => {
                errno(libc::EXDEV)
            }
            _ => e,
        })
    }

    /// Where the lower directories of what stands under `name` in `parent` stand, for one that
    /// stays in the directory (`beside`) or leaves it.
    fn redirect_for(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        spot: crate::host::Spot<'_>,
        beside: bool,
    ) -> io::Result<Redirect> {
        let kept = spot.xattr(&self.words.redirect)?.and_then(|value| Redirect::parse(&value));
        match kept {
            Some(Redirect::Path(names)) => return Ok(Redirect::Path(names)),
            Some(Redirect::Name(name)) if beside => return Ok(Redirect::Name(name)),
            None if beside => return Ok(Redirect::Name(name.to_owned())),
            _ => {}
        }
        let mut names = vec![match kept {
            Some(Redirect::Name(name)) => name,
            _ => name.to_owned(),
        }];
        // Up to the root, or to a directory that knows its own path in the lower layers.
        let mut at = parent.clone();
        while at.id != ROOT {
            let kept = match at.has_upper() {
                true => at
                    .upper_dir(&self.recent)?
                    .this()
                    .xattr(&self.words.redirect)?
                    .and_then(|value| Redirect::parse(&value)),
                false => None,
            };
            let (above, name): (Arc<Node>, OsString) = {
                let state = at.lock();
                let alias = state.names.first().ok_or_else(|| errno(libc::ENOENT))?;
                (alias.parent.clone(), alias.name.as_ref().to_owned())
            };
            match kept {
                Some(Redirect::Path(mut path)) => {
                    names.reverse();
                    path.append(&mut names);
                    return Ok(Redirect::Path(path));
                }
                Some(Redirect::Name(name)) => names.push(name),
                None => names.push(name),
            }
            at = above;
        }
        names.reverse();
        Ok(Redirect::Path(names))
    }

    /// Moves the upper file, and leaves a whiteout where lower layers show something.
    fn put_away(
        &self,
        upper: &Upper,
        from: &End<'_>,
        to: &End<'_>,
        directory: bool,
        over: Option<&Node>,
    ) -> io::Result<()> {
        let by_name = !upper.devices;
        let covered = match over {
            Some(_) => false,
            None => to.place.look(to.name)?.is_some_and(|attr| is_whiteout(&attr)),
        };
        if by_name && from.below {
            // Beside what is about to leave it hides nothing yet.
            self.hide_by_name(&from.parent, &from.place, from.name)?;
        }
        if covered && (directory || from.below) {
            // The whiteout changes places with what comes, and stays where it is needed.
            from.place.rename(from.name, &to.place, to.name, libc::RENAME_EXCHANGE)?;
            if !from.below || by_name {
                from.place.unlink(from.name)?;
            }
        } else if from.below && !by_name {
            from.place.rename(from.name, &to.place, to.name, libc::RENAME_WHITEOUT)?;
        } else {
            from.place.rename(from.name, &to.place, to.name, 0)?;
        }
        let dir = to.parent.directory()?;
        if !dir.lowers.is_empty() && self.hidden_in_upper(dir, &to.place, to.name)? {
            // A directory that comes from elsewhere has its opaque mark or its redirect.
            to.place.unlink(&whiteout_name(to.name))?;
        }
        Ok(())
    }

    fn replace(
        &self,
        upper: &Upper,
        from: &End<'_>,
        to: &End<'_>,
        moved: &Arc<Node>,
        victim: &Arc<Node>,
    ) -> io::Result<()> {
        self.before_name_goes(victim)?;
        if !victim.is_dir() && victim.has_upper() {
            self.raise(Side { parent: &to.parent, name: to.name }, victim)?;
        }
        let (mut state, mut gone) = lock_both(moved, victim);
        let which = Self::which(&gone, &to.parent, to.name).ok_or_else(|| errno(libc::ENOENT))?;
        self.prepare(moved, &mut state, from, to)?;
        if victim.is_dir() && victim.has_upper() {
            self.empty(upper, victim, &to.place, to.name)?;
            let open = to.place.child(to.name)?;
            victim.directory()?.open.pin(Arc::new(open));
        } else if !victim.is_dir() {
            self.keep_open(victim, &mut gone, which)?;
        }
        self.put_away(upper, from, to, moved.is_dir(), Some(victim.as_ref()))?;
        self.name_went(&to.parent, to.name, victim, &mut gone, which);
        self.count_down(victim, &mut gone)?;
        drop(gone);
        self.moved(moved, &mut state, from, to);
        Ok(())
    }

    fn exchange(
        &self,
        from: &End<'_>,
        to: &End<'_>,
        moved: &Arc<Node>,
        other: &Arc<Node>,
    ) -> io::Result<()> {
        let (mut state, mut second) = lock_both(moved, other);
        self.prepare(moved, &mut state, from, to)?;
        self.prepare(other, &mut second, to, from)?;
        let exchange = libc::RENAME_EXCHANGE;
        from.place.rename(from.name, &to.place, to.name, exchange)?;
        self.renamed(moved, &mut state, from, to);
        self.renamed(other, &mut second, to, from);
        self.enter_name(moved, to);
        self.enter_name(other, from);
        Ok(())
    }

    /// Notes that a node has moved.
    fn moved(&self, node: &Arc<Node>, state: &mut State, from: &End<'_>, to: &End<'_>) {
        self.nodes.remove_name(from.parent.id, from.name);
        self.unlisted(&from.parent, from.name);
        self.renamed(node, state, from, to);
        self.enter_name(node, to);
    }

    fn renamed(&self, _node: &Arc<Node>, state: &mut State, from: &End<'_>, to: &End<'_>) {
        if let Some(alias) =
            Self::which(state, &from.parent, from.name).and_then(|which| state.names.get_mut(which))
        {
            alias.parent = to.parent.clone();
            alias.name = to.name.into();
            alias.upper = true;
        }
    }

    fn enter_name(&self, node: &Arc<Node>, at: &End<'_>) {
        let name: Arc<OsStr> = at.name.into();
        self.nodes.add_name(node, at.parent.id, &name);
        self.unlisted(&at.parent, at.name);
        self.listed(&at.parent, at.name, node.ino, node.kind);
    }
}
