//! podman's containers whose root is a disk that is mounted, or an overlay over one.

use std::ffi::OsStr;
use std::fs;
use std::time::Duration;

use crate::container::{able, work};
use crate::host::{Done, Work};
use crate::require::{Need, have};
use crate::someone::{Ids, Who, give, start_program};

/// Without limits of its own, which a superuser who is not the host's may not set.
const CONFIGURATION: &str = "[containers]\ndefault_ulimits = []\n\
    [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"crun\"\n";

/// crun refuses hosts with controllers in both versions of control groups.
const ONE_VERSION: &str = "if [ -e /sys/fs/cgroup/unified ]; then
    umount -l -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; fi";

/// $1 is what runs a program where the mounts are to stand.
const SCRIPT: &str = r#"set -e
export HOME=$PWD/home XDG_RUNTIME_DIR=$PWD/run CONTAINERS_CONF=$PWD/containers.conf
mkdir -p -m 700 home run mnt over upper
podman="podman --root $PWD/store --runroot $PWD/run/root --storage-driver vfs"
if [ "$1" = unshare ]; then there="$podman unshare"; else there=; fi
trap '$podman system migrate 2>/dev/null || true' EXIT
run() { $podman run --rm --network none --cgroups disabled --rootfs "$PWD/$1" sh -c "$2"; }
$there ./vdisk mount web.qcow2 mnt
run mnt 'cat /etc/motd; echo one > /root/one; busybox chown 33:34 /root/one; id -u'
$there ./vdisk umount mnt
$there ./vdisk mount --overlay upper web.qcow2 over
run over 'cat /root/one; busybox stat -c %u:%g /root/one; echo two > /root/two; busybox rm /etc/motd'
$there ./vdisk umount over
"#;

fn podman(who: Who) -> Option<(Work, Done)> {
    if !able() || !have(Need::Podman) || (who != Who::Root && !have(Need::Uidmap)) {
        return None;
    }
    let work = work();
    work.put("containers.conf", CONFIGURATION);
    give(&work);
    let place = if who == Who::Root { "host" } else { "unshare" };
    let words = ["sh", "-c", SCRIPT, "sh", place].map(OsStr::new);
    let running = start_program(&work, who, ONE_VERSION, words);
    let done = running.finish(None, Duration::from_secs(180));
    Some((work, done))
}

fn shows_both(who: Who) {
    let Some((work, done)) = podman(who) else { return };
    let done = done.succeeds();
    assert_eq!(done.out(), "from the base\n0\none\n33:34\n", "{}", done.err());
    assert_eq!(fs::read(work.path("upper/root/two")).unwrap(), b"two\n");
    // What was written to the mount is in the disk, with the owner that it was given.
    let look = "run --ephemeral web.qcow2 -- busybox stat -c %u:%g /root/one";
    assert_eq!(work.vdisk(look).succeeds().out(), "33:34\n");
    let look = "run --ephemeral web.qcow2 -- busybox ls /root /etc/motd";
    assert_eq!(work.vdisk(look).succeeds().out(), "/etc/motd\n\n/root:\none\n");
}

#[test]
fn podman_runs_on_a_mounted_disk_and_on_an_overlay() {
    shows_both(Who::Root);
}

#[test]
fn podman_of_an_ordinary_user_runs_on_what_he_has_mounted_in_his_namespace() {
    shows_both(Who::Someone(Ids::Lent));
}
