//! The limits of a container: a control group of its own, in cgroup v2 or, where the host still
//! mounts a controller there, in v1.
//!
//! Knows limits and the cgroup file system; no namespace and no program.

pub(super) mod freezer;
pub(super) mod room;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use vdisk_fuse::mount::is_host_root;

use crate::error::{Error, ErrorKind, Result};
use crate::mountinfo::{self, Mount};
use room::Room;

/// The period in which [`Limits::cpus`] counts: the kernel's default, in microseconds.
const PERIOD: u64 = 100_000;

/// What a container may use of the host; nothing given is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    /// Memory, swap included, in bytes.
    pub memory: Option<u64>,
    /// Processors' worth of time, in thousandths: 1500 is one and a half.
    pub milli_cpus: Option<u64>,
    /// Processes and threads at once.
    pub pids: Option<u64>,
}

/// A controller's name and what is to be written where, in v2 and in v1.
struct Setting {
    controller: &'static str,
    v2: Vec<(&'static str, String)>,
    v1: Vec<(&'static str, String)>,
}

impl Limits {
    /// As words for [`from_words`](Limits::from_words).
    pub(super) fn words(&self) -> [String; 3] {
        let word = |limit: Option<u64>| limit.map_or(String::new(), |limit| limit.to_string());
        [word(self.memory), word(self.milli_cpus), word(self.pids)]
    }

    pub(super) fn from_words(words: &[&OsStr]) -> Limits {
        let number = |at: usize| words.get(at)?.to_str()?.parse().ok();
        Limits { memory: number(0), milli_cpus: number(1), pids: number(2) }
    }

    fn settings(&self) -> Vec<Setting> {
        let mut settings = Vec::new();
        if let Some(bytes) = self.memory {
            let limit = bytes.to_string();
            settings.push(Setting {
                controller: "memory",
                v2: vec![("memory.max", limit.clone()), ("?memory.swap.max", "0".into())],
                v1: vec![
                    ("memory.limit_in_bytes", limit.clone()),
                    ("?memory.memsw.limit_in_bytes", limit),
                ],
            });
        }
        if let Some(milli) = self.milli_cpus {
            // The kernel takes no quota below a millisecond.
            let quota = milli.saturating_mul(PERIOD / 1000).max(1000);
            settings.push(Setting {
                controller: "cpu",
                v2: vec![("cpu.max", format!("{quota} {PERIOD}"))],
                v1: vec![
                    ("cpu.cfs_period_us", PERIOD.to_string()),
                    ("cpu.cfs_quota_us", quota.to_string()),
                ],
            });
        }
        if let Some(count) = self.pids {
            let limit = vec![("pids.max", count.to_string())];
            settings.push(Setting { controller: "pids", v2: limit.clone(), v1: limit });
        }
        settings
    }
}

/// Where limits need a control group of v2 and the one that this process is in was lent to its user,
/// moves this process so that there is room for the container's.
pub(super) fn make_room(limits: &Limits) -> Option<Room> {
    let settings = limits.settings();
    if settings.is_empty() || is_host_root() {
        return None;
    }
    let host = Host::read().ok()?;
    let wanted = host.in_v2(&settings);
    let (_, own) = host.v2_own()?;
    if wanted.is_empty() || children_have(&own, &wanted) {
        return None;
    }
    Room::make(&own, &wanted, &format!("vdisk-{}-run", std::process::id()))
}

/// The control groups of one container. They stay until [`Groups::remove`], or until somebody makes
/// another beside them when this process is gone.
#[derive(Debug, Default)]
pub(super) struct Groups {
    dirs: Vec<PathBuf>,
    /// What says that they are in use.
    held: Vec<File>,
}

impl Groups {
    /// Makes a group in each hierarchy that the limits need, below the groups this process is in,
    /// so that the limits around it go on to hold. Leaves nothing behind when it fails.
    pub(super) fn create(limits: &Limits, name: &str) -> Result<Groups> {
        let mut groups = Groups::default();
        let settings = limits.settings();
        if settings.is_empty() {
            return Ok(groups);
        }
        let made = Host::read().and_then(|host| groups.make(&host, settings, name));
        if made.is_err() {
            groups.remove();
        }
        made.map(|()| groups)
    }

    /// Where a process has to write itself to be in the groups.
    pub(super) fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    fn make(&mut self, host: &Host, settings: Vec<Setting>, name: &str) -> Result<()> {
        // A process is in one v2 group: it has to offer all that v1 does not.
        let wanted = host.in_v2(&settings);
        let unified = if wanted.is_empty() { None } else { Some(host.v2_parent(&wanted)?) };
        // Controllers can share a v1 hierarchy, too.
        let mut made: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
        for setting in settings {
            let v1 = host.v1_parent(setting.controller).map(|parent| (parent, setting.v1));
            let place = v1.or_else(|| Some((unified.clone()?, setting.v2)));
            let (parent, files) = place.ok_or_else(|| missing(&[setting.controller]))?;
            let dir = match made.get(&parent) {
                Some(dir) => dir.clone(),
                None => {
                    let one = make_dir(&parent, name).map_err(|e| lent(e, setting.controller))?;
                    let (dir, held) = one;
                    self.dirs.push(dir.clone());
                    self.held.push(held);
                    made.insert(parent, dir.clone());
                    dir
                }
            };
            for (file, value) in files {
                write_setting(&dir, file, &value).map_err(|e| lent(e, setting.controller))?;
            }
        }
        Ok(())
    }

    /// Removes the groups. Their processes have ended, but the kernel may need a moment more.
    pub(super) fn remove(&mut self) {
        remove(std::mem::take(&mut self.dirs));
    }
}

/// Makes a group in cgroup v2 for processes that are to be frozen, below the one that this process is in; and what says
/// that it is in use. Nothing where this process may not.
fn make_freezable(name: &str) -> Option<(PathBuf, File)> {
    let host = Host::read().ok()?;
    let (_, own) = host.v2_own()?;
    let (dir, held) = make_dir(&own, name).ok()?;
    // Below one of threads, a group takes no processes.
    let kind = fs::read_to_string(dir.join("cgroup.type")).unwrap_or_default();
    if kind.trim() == "domain" && freezer::can(&dir) {
        return Some((dir, held));
    }
    remove(vec![dir]);
    None
}

/// Removes groups, as far as they are there. Their processes have ended or are about to.
pub(super) fn remove(dirs: Vec<PathBuf>) {
    let deadline = Instant::now() + Duration::from_secs(5);
    for dir in dirs.iter().rev() {
        while let Err(error) = fs::remove_dir(dir) {
            if error.kind() != io::ErrorKind::ResourceBusy || Instant::now() > deadline {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Moves this process into a group.
pub(super) fn join(dir: &Path) -> Result<()> {
    let file = dir.join("cgroup.procs");
    fs::write(&file, "0").map_err(|e| Error::io("cannot enter the control group", e).at_path(file))
}

/// A file whose name begins with `?` may be missing: the kernel was built without it.
fn write_setting(dir: &Path, file: &str, value: &str) -> Result<()> {
    let (file, optional) = file.strip_prefix('?').map_or((file, false), |file| (file, true));
    let path = dir.join(file);
    if optional && !path.exists() {
        return Ok(());
    }
    fs::write(&path, value)
        .map_err(|e| Error::io(format!("cannot set the limit {value}"), e).at_path(path))
}

fn make_dir(parent: &Path, name: &str) -> Result<(PathBuf, File)> {
    sweep(parent);
    // In another pid namespace a process can have our number.
    for attempt in 0..100 {
        let dir = parent.join(format!("{name}-{attempt}"));
        match fs::create_dir(&dir) {
            Ok(()) => {
                // Else somebody has swept it away.
                if let Some(held) = hold(&dir) {
                    return Ok((dir, held));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("cannot make a control group", error).at_path(dir)),
        }
    }
    Err(Error::new(ErrorKind::Exists, "too many control groups are left over").at_path(parent))
}

/// Takes a group for this process, as long as the file lives; nothing where it is another's.
fn hold(dir: &Path) -> Option<File> {
    let held = File::open(dir).ok()?;
    flock(&held, FlockOperation::NonBlockingLockExclusive).ok()?;
    let number = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let there = fs::metadata(dir).ok().map(number)?;
    (held.metadata().ok().map(number) == Some(there)).then_some(held)
}

/// Removes the groups of containers all of whose processes were killed at once.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let numbers = name.to_str().and_then(|name| name.strip_prefix("vdisk-")?.split_once('-'));
        let ours = numbers.is_some_and(|(process, attempt)| {
            [process, attempt].iter().all(|number| number.parse::<u32>().is_ok())
        });
        if ours && let Some(_held) = hold(&entry.path()) {
            // One that still has processes stays.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// The host's cgroup mounts and this process's place in them.
struct Host {
    mounts: Vec<Mount>,
    membership: String,
}

impl Host {
    fn read() -> Result<Host> {
        let membership = fs::read_to_string("/proc/self/cgroup")
            .map_err(|e| Error::io("cannot read /proc/self/cgroup", e))?;
        let mounts = mountinfo::here().map_err(|e| Error::io("cannot read the mount table", e))?;
        Ok(Host { mounts, membership })
    }

    /// This process's group in the v1 hierarchy of a controller, if there is one.
    fn v1_parent(&self, controller: &str) -> Option<PathBuf> {
        let mut mounts = self.mounts.iter().filter(|mount| mount.kind == "cgroup");
        let mount = mounts.find(|m| m.options.split(',').any(|option| option == controller))?;
        let own = own_group(&self.membership, |list| list.split(',').any(|c| c == controller))?;
        Some(below_mount(mount, own))
    }

    /// The controllers that v1 does not have.
    fn in_v2(&self, settings: &[Setting]) -> Vec<&'static str> {
        let controllers = settings.iter().map(|setting| setting.controller);
        controllers.filter(|controller| self.v1_parent(controller).is_none()).collect()
    }

    /// This process's group in the v2 hierarchy, and where that is mounted.
    fn v2_own(&self) -> Option<(&Path, PathBuf)> {
        let mount = self.mounts.iter().find(|m| m.kind == "cgroup2")?;
        let own = own_group(&self.membership, str::is_empty)?;
        Some((&mount.point, below_mount(mount, own)))
    }

    /// The nearest group at or above this process's own, in the v2 hierarchy, whose children can
    /// have the controllers. The own group seldom can: a v2 group with processes has none.
    fn v2_parent(&self, controllers: &[&str]) -> Result<PathBuf> {
        let (top, mut dir) = self.v2_own().ok_or_else(|| missing(controllers))?;
        loop {
            if !children_have(&dir, controllers) {
                for name in controllers {
                    // Refused where processes or missing rights forbid it: the next one up may do.
                    let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{name}"));
                }
            }
            if children_have(&dir, controllers) {
                return Ok(dir);
            }
            if dir == top || !dir.pop() {
                return Err(missing(controllers));
            }
        }
    }
}

fn missing(controllers: &[&str]) -> Error {
    let names = controllers.join(" and ");
    Error::unsupported(format!(
        "this host offers no control group with the {names} controller: run without that limit, \
         or as root on a host that has it (see /sys/fs/cgroup/cgroup.controllers)"
    ))
}

/// What an ordinary user is told whom no group was lent to limit something in.
fn lent(error: Error, controller: &str) -> Error {
    // EPERM, EACCES
    if !matches!(error.raw_os_error(), Some(1 | 13)) {
        return error;
    }
    let text = format!(
        "this user may not limit {controller} here: {error}. Where {controller} is in cgroup v2, systemd \
         lends a control group: `systemd-run --user --scope -p Delegate=yes vdisk run ...`; else only root \
         can set this limit"
    );
    Error::new(ErrorKind::Denied, text)
}

fn children_have(dir: &Path, controllers: &[&str]) -> bool {
    let enabled = fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
    controllers.iter().all(|name| enabled.split_whitespace().any(|enabled| enabled == *name))
}

/// The path in the line of `/proc/PID/cgroup` (cgroups(7)) whose controllers fit.
fn own_group(membership: &str, fits: impl Fn(&str) -> bool) -> Option<&str> {
    membership.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        fits(controllers).then_some(path)
    })
}

/// A group's directory: a mount may show only a part of its hierarchy.
fn below_mount(mount: &Mount, group: &str) -> PathBuf {
    match Path::new(OsStr::new(group)).strip_prefix(&mount.root) {
        Ok(below) if below.as_os_str().is_empty() => mount.point.clone(),
        Ok(below) if !group.contains("/..") => mount.point.join(below),
        _ => mount.point.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(root: &str, point: &str, kind: &str, options: &str) -> Mount {
        Mount {
            device: "0:29".into(),
            root: root.into(),
            point: point.into(),
            kind: kind.into(),
            source: "cgroup".into(),
            options: options.into(),
        }
    }

    fn hybrid() -> Host {
        Host {
            mounts: vec![
                mount("/", "/cg/cpu", "cgroup", "rw,cpu,cpuacct"),
                mount("/box", "/cg/memory", "cgroup", "rw,memory"),
                mount("/", "/cg/unified", "cgroup2", "rw"),
            ],
            membership: "4:memory:/box/one\n2:cpu,cpuacct:/\n0::/\n".to_owned(),
        }
    }

    #[test]
    fn a_v1_controller_is_found_where_the_process_is() {
        let host = hybrid();
        assert_eq!(host.v1_parent("memory"), Some("/cg/memory/one".into()));
        assert_eq!(host.v1_parent("cpu"), Some("/cg/cpu".into()));
        assert_eq!(host.v1_parent("pids"), None);
    }

    #[test]
    fn a_missing_controller_is_said_by_name() {
        let error = hybrid().v2_parent(&["pids"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("pids"), "{error}");
    }

    #[test]
    fn a_v2_group_is_made_at_the_nearest_place_that_offers_all_controllers() {
        let top = tempfile::tempdir().unwrap();
        let (slice, scope) = (top.path().join("user"), top.path().join("user/scope"));
        fs::create_dir_all(&scope).unwrap();
        fs::write(slice.join("cgroup.subtree_control"), "cpu memory pids\n").unwrap();
        fs::write(scope.join("cgroup.subtree_control"), "memory\n").unwrap();
        let host = Host {
            mounts: vec![mount("/", top.path().to_str().unwrap(), "cgroup2", "rw")],
            membership: "0::/user/scope\n".to_owned(),
        };
        let limits = Limits { memory: Some(1 << 20), pids: Some(9), ..Limits::default() };
        let mut groups = Groups::default();
        groups.make(&host, limits.settings(), "box").unwrap();
        assert_eq!(groups.dirs(), [slice.join("box-0")]);
        let read = |file: &str| fs::read_to_string(slice.join("box-0").join(file)).unwrap();
        assert_eq!((read("memory.max"), read("pids.max")), ("1048576".into(), "9".into()));
    }

    #[test]
    fn limits_become_settings() {
        assert!(Limits::default().settings().is_empty());
        let limits = Limits { milli_cpus: Some(1500), ..Limits::default() };
        let settings = limits.settings();
        assert_eq!(settings[0].v2, [("cpu.max", "150000 100000".to_owned())]);
        assert_eq!(settings[0].v1[1].1, "150000");
    }
}
