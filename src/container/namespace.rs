//! From the host into other namespaces: this process, where it is an ordinary user's, into one of
//! users; and whoever is started by [`make`] into one of mounts.
//!
//! Knows no container: what is mounted there, and what is run, is its caller's.

use std::fs;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;
use vdisk_fuse::apart::Apart;
use vdisk_fuse::mount::is_host_root;

use super::change;
use super::ids::{Ids, Mapper};
use crate::error::{Error, ErrorKind, Result};

/// Moves this process, which must have one thread, into a user namespace unless it has the right to
/// mount. Besides, why there is only one user in it where that is so.
pub(super) fn enter() -> Result<(Ids, Option<String>)> {
    if geteuid().is_root() {
        return Ok((if is_host_root() { Ids::Host } else { found_ids() }, None));
    }
    let mapper = Mapper::start()?;
    unshare(CloneFlags::CLONE_NEWUSER).map_err(refused)?;
    mapper.map()
}

/// Runs `work` in a new mount namespace, where only `keep` is open. This process does not stay there:
/// the namespace lasts as long as what `work` has started.
pub(super) fn make<T: Send>(
    keep: &[BorrowedFd<'_>],
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let made = Apart::here().run(keep, || {
        let doing = |what: &'static str| {
            move |errno| match errno {
                // There is a user namespace, but a security module keeps its rights from it.
                Errno::EPERM | Errno::EACCES => refused(errno),
                _ => Error::io(what, errno.into()),
            }
        };
        unshare(CloneFlags::CLONE_NEWNS).map_err(doing("cannot make a mount namespace"))?;
        // What the host unmounts later goes there, too; what is mounted there stays there.
        change("/", MsFlags::MS_REC | MsFlags::MS_SLAVE)
            .map_err(doing("cannot cut the mounts off from the host's"))?;
        work()
    });
    made.map_err(|e| Error::io("cannot start a thread", e)).flatten()
}

/// What a user namespace that others have made has.
fn found_ids() -> Ids {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let ids =
        map.lines().filter_map(|line| line.split_ascii_whitespace().nth(2)?.parse::<u64>().ok());
    if ids.sum::<u64>() > 1 { Ids::Ranges } else { Ids::One }
}

/// Why an ordinary user gets no user namespace, and what can be done.
fn refused(errno: Errno) -> Error {
    let says = |file: &str, word: &str| fs::read_to_string(file).is_ok_and(|t| t.trim() == word);
    let why = if says("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "kernel.unprivileged_userns_clone is 0 (root: `sysctl kernel.unprivileged_userns_clone=1`)"
    } else if says("/proc/sys/user/max_user_namespaces", "0") || errno == Errno::ENOSPC {
        "user.max_user_namespaces is used up (root: `sysctl user.max_user_namespaces=10000`)"
    } else if says("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "AppArmor keeps them from programs without a profile (root: a profile for vdisk with \
         `userns,`, or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`)"
    } else {
        "this host does not let ordinary users have one"
    };
    let text = format!("running a container without root needs a user namespace, but {why}");
    let kind = ErrorKind::Denied;
    Error::new(kind, format!("{text}: {}", std::io::Error::from(errno)))
}
