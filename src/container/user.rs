//! Who the program is: user, groups, and what it gives up to be them.
//!
//! Names are looked up in the container's own /etc/passwd and /etc/group, read without trust.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use super::caps::Capabilities;
use super::ids::Ids;
use crate::error::{Error, ErrorKind, Result};

/// No user database of a sane system is larger, in bytes.
const LARGEST: u64 = 4 << 20;

/// A user of the container.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// The home directory; `/` where the database knows none.
    pub(super) home: PathBuf,
}

impl User {
    /// Finds `USER[:GROUP]`, names or numbers, in the root directory of this process.
    pub(super) fn find(wanted: &str) -> Result<User> {
        let read = |path: &str| {
            database(path)
                .map_err(|e| Error::io("cannot read the container's users", e).at_path(path))
        };
        lookup(wanted, &read("/etc/passwd")?, &read("/etc/group")?)
    }

    /// Becomes the user, and gives up for good all but these capabilities.
    ///
    /// Where there is one user only, there are no groups to choose from, either.
    pub(super) fn become_user(&self, may: Capabilities, ids: Ids) -> io::Result<()> {
        for bit in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            if !may.set().contains(capability) {
                match remove_capability_from_bounding_set(capability) {
                    // The kernel's last capability was the one before.
                    Err(rustix::io::Errno::INVAL) => break,
                    done => done?,
                }
            }
        }
        clear_ambient_capability_set()?;
        // What this process has not itself it cannot leave to a program.
        let left = may.set() & capabilities(None)?.permitted;
        if ids != Ids::One {
            let groups: Vec<Gid> = self.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
            setgroups(&groups)?;
        }
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        let left = if self.uid == 0 { left } else { CapabilitySet::empty() };
        let sets = CapabilitySets {
            effective: left,
            permitted: left,
            inheritable: CapabilitySet::empty(),
        };
        Ok(set_capabilities(None, sets)?)
    }

    /// Whether this is the container's superuser and in his group.
    pub(super) fn is_root(&self) -> bool {
        (self.uid, self.gid) == (0, 0)
    }
}

/// A regular file's text, nothing when there is none. A pipe in its place must not block us.
fn database(path: &str) -> io::Result<String> {
    let opened = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// passwd(5) and group(5).
fn lookup(wanted: &str, passwd: &str, group: &str) -> Result<User> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let number = name.parse::<u32>().ok();
    let entry = passwd.lines().map(fields).find(|fields| {
        fields.len() >= 6
            && (fields.first() == Some(&name) || (number.is_some() && id(fields, 2) == number))
    });
    let uid = entry.as_ref().and_then(|fields| id(fields, 2)).or(number);
    let unknown = |what: &str, name: &str| {
        Error::new(ErrorKind::NotFound, format!("the container has no {what} named {name:?}"))
    };
    let uid = uid.ok_or_else(|| unknown("user", name))?;
    let primary = entry.as_ref().and_then(|fields| id(fields, 3)).unwrap_or(0);
    let user_name = entry.as_ref().and_then(|fields| fields.first().copied());
    let home = entry.as_ref().and_then(|fields| fields.get(5)).filter(|home| !home.is_empty());
    let home = PathBuf::from(home.copied().unwrap_or("/"));
    if let Some(wanted) = group_name {
        let found = group.lines().map(fields).find(|fields| fields.first() == Some(&wanted));
        let gid = found.and_then(|fields| id(&fields, 2)).or_else(|| wanted.parse().ok());
        let gid = gid.ok_or_else(|| unknown("group", wanted))?;
        return Ok(User { uid, gid, groups: vec![gid], home });
    }
    let member = |fields: &Vec<&str>| {
        let mut members = fields.get(3).copied().unwrap_or_default().split(',');
        user_name.is_some_and(|name| members.any(|member| member == name))
    };
    let mut groups = vec![primary];
    groups.extend(group.lines().map(fields).filter(member).filter_map(|fields| id(&fields, 2)));
    groups.truncate(1000);
    Ok(User { uid, gid: primary, groups, home })
}

fn fields(line: &str) -> Vec<&str> {
    line.split(':').collect()
}

fn id(fields: &[&str], index: usize) -> Option<u32> {
    fields.get(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nann:x:1000:100::/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nwheel:x:10:bob,ann\n";

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let ann = lookup("ann", PASSWD, GROUP).unwrap();
        assert_eq!(ann, lookup("1000", PASSWD, GROUP).unwrap());
        assert_eq!((ann.uid, ann.gid, ann.groups), (1000, 100, vec![100, 10]));
        assert_eq!(ann.home, PathBuf::from("/home/ann"));
        assert_eq!(lookup("ann:wheel", PASSWD, GROUP).unwrap().gid, 10);
        assert_eq!(lookup("ann:7", PASSWD, GROUP).unwrap().gid, 7);
    }

    #[test]
    fn an_unknown_number_will_do_but_an_unknown_name_will_not() {
        let nobody = lookup("4242", "", "").unwrap();
        assert_eq!((nobody.uid, nobody.gid), (4242, 0));
        assert_eq!(nobody.home, PathBuf::from("/"));
        assert_eq!(lookup("eve", PASSWD, GROUP).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(lookup("ann:eves", PASSWD, GROUP).is_err());
    }
}
