//! Bringing all processes of a container to a stop: by its control group where it has one that can be
//! frozen (cgroup v2), else by SIGSTOP for each of them.
//!
//! A stop by signals is seen by parents that wait for stopped children (shells with job control); a
//! frozen group is seen by nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long processes may take to stop.
const TO_STOP: Duration = Duration::from_secs(10);
/// Between two looks whether they have.
const LOOK: Duration = Duration::from_millis(2);

/// A container that stands still.
#[derive(Debug)]
pub(in crate::container) enum Frozen {
    Group(PathBuf),
    /// Those that have been stopped here; others had stopped themselves.
    Processes(BTreeSet<i32>),
}

/// A group that was made to freeze a container. It is made at the first pause: to enter one takes the kernel
/// milliseconds, which no start is to wait for.
#[derive(Debug)]
pub(in crate::container) struct Cold {
    dir: PathBuf,
    /// What says that it is in use.
    _held: File,
}

impl Drop for Cold {
    fn drop(&mut self) {
        super::remove(vec![self.dir.clone()]);
    }
}

/// Stops all processes of the container whose process 1 is `init` and which are in these groups, or comes to be in
/// one for that.
pub(in crate::container) fn freeze(
    init: i32,
    groups: &[PathBuf],
    cold: &mut Option<Cold>,
) -> io::Result<Frozen> {
    if let Some(dir) = groups.iter().find(|dir| can(dir)) {
        return freeze_group(dir);
    }
    if cold.is_none() {
        let made = super::make_freezable(&format!("vdisk-{}", std::process::id()));
        *cold = made.map(|(dir, held)| Cold { dir, _held: held });
    }
    match cold {
        // Where it may be made, processes need not be let in all the same.
        Some(Cold { dir, .. }) if gather(init, dir).is_ok() => freeze_group(dir),
        _ => stop_all(init),
    }
}

/// Moves processes into a group until a look at all of them finds none outside: each may start more meanwhile.
fn gather(init: i32, dir: &Path) -> io::Result<()> {
    let until = Instant::now() + TO_STOP;
    let procs = dir.join("cgroup.procs");
    loop {
        let inside = fs::read_to_string(&procs)?;
        let inside: BTreeSet<i32> = inside.lines().filter_map(|pid| pid.parse().ok()).collect();
        let all = members(init)?.into_iter().filter(|(_, state)| !matches!(state, 'Z' | 'X'));
        let outside: Vec<i32> =
            all.map(|(pid, _)| pid).filter(|pid| !inside.contains(pid)).collect();
        if outside.is_empty() {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(not_stopped());
        }
        for pid in outside {
            match fs::write(&procs, pid.to_string()) {
                // One that has just ended need not be there.
                Err(e) if e.raw_os_error() == Some(Errno::ESRCH as i32) => {}
                moved => moved?,
            }
        }
    }
}

/// Whether this group is one that can be frozen.
pub(super) fn can(dir: &Path) -> bool {
    dir.join("cgroup.freeze").exists()
}

/// Lets them go on.
pub(in crate::container) fn thaw(frozen: Frozen) -> io::Result<()> {
    match frozen {
        Frozen::Group(dir) => fs::write(dir.join("cgroup.freeze"), "0"),
        Frozen::Processes(stopped) => {
            let go_on = |&pid: &i32| match kill(Pid::from_raw(pid), Signal::SIGCONT) {
                Ok(()) | Err(Errno::ESRCH) => Ok(()),
                Err(e) => Err(e.into()),
            };
            stopped.iter().map(go_on).fold(Ok(()), io::Result::and)
        }
    }
}

fn freeze_group(dir: &Path) -> io::Result<Frozen> {
    let frozen = Frozen::Group(dir.to_owned());
    fs::write(dir.join("cgroup.freeze"), "1")?;
    let until = Instant::now() + TO_STOP;
    loop {
        let events = fs::read_to_string(dir.join("cgroup.events"))?;
        if events.lines().any(|line| line == "frozen 1") {
            return Ok(frozen);
        }
        if Instant::now() > until {
            thaw(frozen)?;
            return Err(not_stopped());
        }
        thread::sleep(LOOK);
    }
}

fn not_stopped() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "its processes do not come to a stop")
}

/// Stops processes until a look at all of them finds none that runs: each may start more meanwhile.
fn stop_all(init: i32) -> io::Result<Frozen> {
    let until = Instant::now() + TO_STOP;
    let mut ours = BTreeSet::new();
    loop {
        let running: Vec<i32> = members(init)?
            .into_iter()
            .filter(|(_, state)| !matches!(state, 'T' | 't' | 'Z' | 'X'))
            .map(|(pid, _)| pid)
            .collect();
        if running.is_empty() {
            return Ok(Frozen::Processes(ours));
        }
        let late = Instant::now() > until;
        for pid in running {
            // One that has ended meanwhile needs no stop.
            if !late && kill(Pid::from_raw(pid), Signal::SIGSTOP).is_ok() {
                ours.insert(pid);
            }
        }
        if late {
            thaw(Frozen::Processes(ours))?;
            return Err(not_stopped());
        }
        thread::sleep(LOOK);
    }
}

/// The processes of the container, with their states (proc_pid_stat(5)): those in the pid namespace of
/// process 1, which `exec` may have put there, and all that descend from them.
fn members(init: i32) -> io::Result<BTreeMap<i32, char>> {
    let space = fs::read_link(format!("/proc/{init}/ns/pid"))?;
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = pid else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some((state, parent)) = state_and_parent(&stat) {
            let there = fs::read_link(entry.path().join("ns/pid")).is_ok_and(|ns| ns == space);
            all.insert(pid, (state, parent, there || pid == init));
        }
    }
    let is_member = |pid: i32| {
        let mut at = pid;
        // No line of parents is longer than there are processes.
        for _ in 0..all.len() {
            match all.get(&at) {
                Some((.., true)) => return true,
                Some((_, parent, false)) => at = *parent,
                None => return false,
            }
        }
        false
    };
    Ok(all.iter().filter(|(pid, _)| is_member(**pid)).map(|(pid, found)| (*pid, found.0)).collect())
}

/// The name, which stands before them in parentheses, may hold anything.
fn state_and_parent(stat: &str) -> Option<(char, i32)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_found_behind_any_name() {
        assert_eq!(state_and_parent("7 (a) b) T 3 7 7"), Some(('T', 3)));
        assert_eq!(state_and_parent(""), None);
    }
}
