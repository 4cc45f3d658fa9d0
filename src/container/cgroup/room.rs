//! Room for a container's control group in cgroup v2: a group has either processes or children that
//! are limited. So where the group that this process is in was lent to its user, as systemd does it
//! (`Delegate=yes`), it moves into a child of it, beside which there can be others then.
//!
//! Knows no limit and no container.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

/// A group that this process has left, and the child of it that it has moved into. Dropped, all is as
/// it was, as far as this process is concerned: the last one to leave takes the child away.
#[derive(Debug)]
pub(in crate::container) struct Room {
    lent: PathBuf,
    leaf: PathBuf,
}

impl Room {
    /// Moves this process, where it is alone in the group `own`, which its user may change; and has
    /// the controllers limit the group's children. `name` is the child's.
    ///
    /// Nothing is changed where that cannot be: groups further up may do.
    pub(in crate::container) fn make(own: &Path, controllers: &[&str], name: &str) -> Option<Room> {
        let may_write = |file: &str| access(&own.join(file), AccessFlags::W_OK).is_ok();
        let lent = ["cgroup.procs", "cgroup.subtree_control"].into_iter().all(may_write);
        if !lent || !can_be_lent(own) || !is_alone_in(own) {
            return None;
        }
        let leaf = own.join(name);
        fs::create_dir(&leaf).ok()?;
        let room = Room { lent: own.to_owned(), leaf };
        let enabled = fs::write(room.leaf.join("cgroup.procs"), "0").is_ok()
            && controllers.iter().all(|name| room.control('+', name));
        enabled.then_some(room)
    }

    /// The room whose child this is.
    pub(in crate::container) fn of(leaf: &Path) -> Option<Room> {
        Some(Room { lent: leaf.parent()?.to_owned(), leaf: leaf.to_owned() })
    }

    /// The child.
    pub(in crate::container) fn leaf(&self) -> &Path {
        &self.leaf
    }

    fn control(&self, sign: char, controller: &str) -> bool {
        fs::write(self.lent.join("cgroup.subtree_control"), format!("{sign}{controller}")).is_ok()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let enabled = fs::read_to_string(self.lent.join("cgroup.subtree_control"));
        for controller in enabled.unwrap_or_default().split_whitespace() {
            self.control('-', controller);
        }
        // Refused where somebody else still has children limited here.
        let _ = fs::write(self.lent.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.leaf);
    }
}

/// The hierarchy's root has both, processes and children that are limited, and is nobody's.
fn can_be_lent(own: &Path) -> bool {
    // Only groups below the root have a type.
    own.join("cgroup.type").exists()
}

fn is_alone_in(own: &Path) -> bool {
    let processes = fs::read_to_string(own.join("cgroup.procs")).unwrap_or_default();
    let mut processes = processes.split_whitespace();
    processes.next() == Some(std::process::id().to_string().as_str()) && processes.next().is_none()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::mountinfo;

    fn own_group() -> String {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned()
    }

    /// The hierarchy's root, and a controller of it that groups can have.
    fn hierarchy() -> Option<(PathBuf, String)> {
        let mounts = mountinfo::here().unwrap();
        let top = mounts.into_iter().find(|mount| mount.kind == "cgroup2")?.point;
        let controllers = fs::read_to_string(top.join("cgroup.controllers")).ok()?;
        let first = controllers.split_whitespace().next()?.to_owned();
        fs::write(top.join("cgroup.subtree_control"), format!("+{first}")).ok()?;
        Some((top, first))
    }

    /// What this process starts meanwhile would be in the group, and keep it: no other test is to run in it.
    #[test]
    #[ignore = "run by the test below, in a process of its own"]
    fn makes_room_in_this_process() {
        let own = own_group();
        let Some((top, controller)) = hierarchy().filter(|_| own == "/") else {
            eprintln!("SKIPPED: needs the superuser and a controller in cgroup v2");
            return;
        };
        let name = format!("vdisk-room-{}", std::process::id());
        let lent = top.join(&name);
        fs::create_dir(&lent).unwrap();
        assert!(Room::make(&lent, &[&controller], "leaf").is_none(), "it is in another group");
        fs::write(lent.join("cgroup.procs"), "0").unwrap();
        let room = Room::make(&lent, &[&controller], "leaf");
        let (within, beside) = (own_group(), lent.join("box"));
        let made = fs::create_dir(&beside);
        let limited = fs::read_to_string(beside.join("cgroup.controllers")).unwrap_or_default();
        let _ = fs::remove_dir(&beside);
        let there = room.is_some();
        drop(room);
        let after = own_group();
        fs::write(top.join("cgroup.procs"), "0").unwrap();
        let gone = fs::remove_dir(&lent);
        assert!(there && made.is_ok(), "{made:?}");
        assert_eq!(within, format!("/{name}/leaf"));
        assert_eq!(limited.trim(), controller);
        assert_eq!(after, format!("/{name}"));
        gone.unwrap();
    }

    #[test]
    fn a_process_makes_room_in_the_group_that_was_lent_to_it_and_gives_it_back() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg("container::cgroup::room::tests::makes_room_in_this_process")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        eprintln!("{said}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{said}");
    }
}
