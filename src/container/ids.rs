//! Which users and groups a user namespace has: those that /etc/subuid and /etc/subgid lend to this
//! user, by way of newuidmap(1) and newgidmap(1), and where there are none, his own one as root.
//!
//! Knows no container and no disk.

use std::fs;
use std::io::{self, PipeWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, User, getegid, geteuid, getpid};

use super::sys;
use crate::error::{Error, Result};

/// Numbers that are lent: the first, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u32,
    count: u32,
}

/// What a user namespace's users are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// The host's own: there is no user namespace.
    Host,
    /// Root is the user who runs the container; the others are lent to him.
    Ranges,
    /// Root is the user who runs the container, and there is nobody else.
    One,
}

impl Ids {
    const WORDS: [(Ids, &str); 3] =
        [(Ids::Host, "host"), (Ids::Ranges, "ranges"), (Ids::One, "one")];

    /// As a word for [`from_word`](Ids::from_word).
    pub(super) fn word(self) -> &'static str {
        Ids::WORDS.iter().find(|(ids, _)| *ids == self).map_or("", |(_, word)| word)
    }

    pub(super) fn from_word(word: &str) -> Option<Ids> {
        Ids::WORDS.iter().find(|(_, other)| *other == word).map(|(ids, _)| *ids)
    }
}

/// Ranges and the programs that map them.
struct Lent {
    users: Vec<Range>,
    groups: Vec<Range>,
    tools: [PathBuf; 2],
}

/// A process outside that maps ids into the namespace that this one will be in.
pub(super) struct Mapper {
    lent: Option<(Pid, PipeWriter)>,
    user: u32,
    group: u32,
    /// Why only one id can be had.
    why_one: String,
}

impl Mapper {
    /// Gets ready, while this process is in its old namespace. It must have one thread.
    pub(super) fn start() -> Result<Mapper> {
        let (user, group) = (geteuid().as_raw(), getegid().as_raw());
        let (lent, why_one) = match find(user) {
            Ok(lent) => (Some(begin(lent, user, group)?), String::new()),
            Err(why) => (None, why),
        };
        Ok(Mapper { lent, user, group, why_one })
    }

    /// Maps, now that this process is in its new namespace. Besides what there is, says why not
    /// more where that is worth a word.
    pub(super) fn map(self) -> Result<(Ids, Option<String>)> {
        let mut why = self.why_one;
        if let Some((child, mut go)) = self.lent {
            let told = go.write_all(&[1]);
            drop(go);
            let ended = waitpid(child, None).map_err(|e| Error::io("lost newuidmap", e.into()))?;
            if told.is_ok() && ended == WaitStatus::Exited(child, 0) {
                return Ok((Ids::Ranges, None));
            }
            why = "newuidmap or newgidmap refused the ranges in /etc/subuid and /etc/subgid".into();
        }
        one("/proc/self/uid_map", self.user)?;
        // Who could leave groups might get at what a group is kept from.
        fs::write("/proc/self/setgroups", "deny")
            .map_err(|e| Error::io("cannot give up groups", e).at_path("/proc/self/setgroups"))?;
        one("/proc/self/gid_map", self.group)?;
        Ok((Ids::One, Some(why)))
    }
}

fn one(map: &str, id: u32) -> Result<()> {
    fs::write(map, format!("0 {id} 1"))
        .map_err(|e| Error::io("cannot map this user's id", e).at_path(map))
}

/// Starts the process that will map; what is written to the pipe tells it when.
fn begin(lent: Lent, user: u32, group: u32) -> Result<(Pid, PipeWriter)> {
    let doing = |e| Error::io("cannot start the process that maps ids", e);
    let (mut heard, go) = io::pipe().map_err(doing)?;
    let target = getpid();
    let mut told = Some(go);
    let child = sys::copy(|| {
        // Held open here, the pipe would have no end.
        told = None;
        let mut byte = [0];
        if heard.read_exact(&mut byte).is_err() {
            return 1;
        }
        let [users, groups] = &lent.tools;
        let users = map_by(users, target, user, &lent.users);
        let groups = map_by(groups, target, group, &lent.groups);
        let done = |tool: io::Result<Child>| {
            tool.and_then(|mut tool| tool.wait()).is_ok_and(|ended| ended.success())
        };
        u8::from(![users, groups].map(done).iter().all(|done| *done))
    });
    let child = child.map_err(doing)?;
    told.map(|go| (child, go)).ok_or_else(|| doing(io::ErrorKind::BrokenPipe.into()))
}

fn map_by(tool: &Path, target: Pid, own: u32, ranges: &[Range]) -> io::Result<Child> {
    let mut command = Command::new(tool);
    command.arg(target.to_string());
    let mut inside = 0;
    for Range { first, count } in [Range { first: own, count: 1 }].iter().chain(ranges) {
        command.args([inside, *first, *count].map(|number| number.to_string()));
        inside += count;
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()
}

/// What is lent to a user, or why nothing can be had.
fn find(user: u32) -> std::result::Result<Lent, String> {
    let name = User::from_uid(user.into()).ok().flatten().map(|user| user.name);
    let read = |file: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        match ranges(&text, name.as_deref(), user) {
            ranges if ranges.is_empty() => Err(format!("{file} lends no ids to this user")),
            ranges => Ok(ranges),
        }
    };
    let tool = |name: &str| {
        let places = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&places).chain(["/usr/bin".into(), "/bin".into()]);
        let mut found = places.map(|dir| dir.join(name)).filter(|path| path.is_file());
        found.next().ok_or_else(|| format!("{name} is not installed (package uidmap)"))
    };
    Ok(Lent {
        users: read("/etc/subuid")?,
        groups: read("/etc/subgid")?,
        tools: [tool("newuidmap")?, tool("newgidmap")?],
    })
}

/// subuid(5): a line lends `count` ids from `first` to a login name or a user's number.
fn ranges(text: &str, name: Option<&str>, user: u32) -> Vec<Range> {
    let number = user.to_string();
    let mut inside: u32 = 1;
    let mut found = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let [owner, first, count] = fields[..] else { continue };
        let (Ok(first), Ok(count)) = (first.parse::<u32>(), count.parse::<u32>()) else { continue };
        if (Some(owner) != name && owner != number) || count == 0 {
            continue;
        }
        // Neither end may be a number that no user can have.
        if first.checked_add(count).is_some()
            && let Some(next) = inside.checked_add(count)
        {
            found.push(Range { first, count });
            inside = next;
        }
    }
    // The kernel takes 340 lines.
    found.truncate(300);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lent_ids_are_found_by_name_and_by_number_and_nonsense_is_passed_over() {
        let text =
            "ann:100000:65536\nbob:1:2\n1000:300000:10\nann:x:1\nann:4294967295:9\nann:5:0\nann\n";
        let found = ranges(text, Some("ann"), 1000);
        let wanted = [(100_000, 65536), (300_000, 10)];
        assert_eq!(found, wanted.map(|(first, count)| Range { first, count }));
        assert_eq!(ranges(text, None, 7), []);
    }
}
