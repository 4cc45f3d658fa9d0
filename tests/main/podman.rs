//! podman: containers whose root is a disk that is mounted, or an overlay over one; and images that go
//! to and fro by a registry.

use std::ffi::OsStr;
use std::fs;
use std::time::Duration;

use crate::container::{able, work};
use crate::host::{Done, Work};
use crate::images::layers;
use crate::registry_server::Server;
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

/// $1 is the registry.
const REGISTRY_SCRIPT: &str = r#"set -e
export HOME=$PWD/home XDG_RUNTIME_DIR=$PWD/run CONTAINERS_CONF=$PWD/containers.conf
mkdir -p -m 700 home run
podman="podman --root $PWD/store --runroot $PWD/run/root --storage-driver vfs"
plain="--tls-verify=false --signature-policy $PWD/policy.json --quiet"
trap '$podman system migrate 2>/dev/null || true' EXIT
$podman pull $plain "$1/mine/box:1" >/dev/null
$podman run --rm --network none --cgroups disabled "$1/mine/box:1"
$podman run --name other --network none --cgroups disabled "$1/mine/box:1" \
  sh -c 'echo two > /root/two; busybox rm /etc/motd; busybox chown 7:8 /etc/passwd'
$podman commit --quiet other "$1/theirs/box:2" >/dev/null
$podman push $plain "$1/theirs/box:2"
"#;

fn able_as(who: Who) -> bool {
    able() && have(Need::Podman) && (who == Who::Root || have(Need::Uidmap))
}

/// Runs a script with podman's settings, and a word for it.
fn podman(work: &Work, who: Who, script: &str, word: &str) -> Done {
    work.put("containers.conf", CONFIGURATION);
    give(work);
    let words = ["sh", "-c", script, "sh", word].map(OsStr::new);
    let running = start_program(work, who, ONE_VERSION, words);
    running.finish(None, Duration::from_secs(180)).succeeds()
}

fn shows_both(who: Who) {
    if !able_as(who) {
        return;
    }
    let work = work();
    let place = if who == Who::Root { "host" } else { "unshare" };
    let done = podman(&work, who, SCRIPT, place);
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

fn comes_back_by_a_registry(who: Who) {
    if !able_as(who) || !have(Need::Registry) {
        return;
    }
    let work = work();
    let server = Server::open(&work);
    let host = &server.host;
    let plain = "--tls-verify=false --store s";
    work.put("policy.json", r#"{"default": [{"type": "insecureAcceptAnything"}]}"#);
    let command = ["--cmd", "busybox cat /etc/motd", "--tls-verify=false"];
    let image = format!("{host}/mine/box:1");
    work.vdisk_args(["push", "web.qcow2", &image].into_iter().chain(command)).succeeds();
    let done = podman(&work, who, REGISTRY_SCRIPT, host);
    assert_eq!(done.out(), "from the base\n", "{}", done.err());
    work.vdisk(&format!("pull {host}/mine/box:1 {plain}")).succeeds();
    work.vdisk(&format!("pull {host}/theirs/box:2 {plain}")).succeeds();
    // One layer of its own on those that the first image has.
    assert_eq!(layers(&work, "s").len(), 2);
    work.vdisk(&format!("clone {host}/theirs/box:2 back.qcow2 --store s")).succeeds();
    let look = "run --ephemeral back.qcow2 -- sh -c";
    let script = "cat /root/two; busybox stat -c %u:%g /etc/passwd; cat /etc/motd || echo gone";
    let done = work.vdisk_args(look.split_whitespace().chain([script])).succeeds();
    assert_eq!(done.out(), "two\n7:8\ngone\n");
    // It runs by itself what podman's container ran.
    let done = work.vdisk("run --ephemeral back.qcow2").succeeds();
    assert!(done.err().contains("can't remove '/etc/motd'"), "{}", done.err());
}

#[test]
fn podman_runs_what_was_pushed_and_what_it_pushes_runs() {
    comes_back_by_a_registry(Who::Root);
}

#[test]
fn podman_of_an_ordinary_user_runs_what_was_pushed_and_what_it_pushes_runs() {
    comes_back_by_a_registry(Who::Someone(Ids::Lent));
}
