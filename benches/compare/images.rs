//! Images against podman, on the same layout of five layers and 20,000 files, both with stores of their own that are empty
//! at first; the start of a container from an image; and what has a limit of its own: a thousand clones, a hundred
//! instances, and the export of a small change to a large disk.
//!
//! It takes the superuser, umoci and podman (whose overlay storage is the kernel's): only where it is asked for.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::peers::{Side, place, row};
use super::seconds;

const LAYERS: usize = 5;
const FILES: usize = 4000;
/// How often what has no peer is measured.
const TIMES: usize = 5;
/// Without limits of its own, which a superuser who is not the host's may not set.
const CONFIGURATION: &str = "[containers]\ndefault_ulimits = []\n\
    [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"crun\"\n";
/// crun refuses hosts with controllers in both versions of control groups.
const ONE_VERSION: &str = "if [ -e /sys/fs/cgroup/unified ]; then
    umount -l -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; fi; exec \"$@\"";

fn run(dir: &Path, program: &str, words: &[&str]) {
    let mut command = Command::new(program);
    command.args(words).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::null());
    command.env("CONTAINERS_CONF", dir.join("containers.conf"));
    let done = command.status().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(done.success(), "{program} {words:?}");
}

fn vdisk(dir: &Path, words: &[&str]) {
    run(dir, env!("CARGO_BIN_EXE_vdisk"), words);
}

const PODMAN: [&str; 7] =
    ["podman", "--root", "theirs", "--runroot", "run", "--storage-driver", "overlay"];

/// What podman says.
fn podman(dir: &Path, words: &[&str]) -> String {
    let mut command = Command::new(PODMAN[0]);
    command.args(&PODMAN[1..]).args(words).current_dir(dir);
    let said = command.env("CONTAINERS_CONF", dir.join("containers.conf")).output().unwrap();
    assert!(said.status.success(), "podman {words:?}: {}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).trim().to_owned()
}

/// Pulls from the layout, and gives it a name: podman names all of them alike, and what has lost its name goes with the
/// next that is removed.
fn podman_pull(dir: &Path, tag: &str) {
    let id = podman(dir, &["pull", "-q", &format!("oci:lay:{tag}")]);
    podman(dir, &["tag", &id, &format!("kept:{tag}")]);
}

/// A layout with the image `one`, and `two`, which has one small layer more; and `box`, in which something runs.
fn layout(dir: &Path) {
    run(dir, "umoci", &["init", "--layout", "lay"]);
    run(dir, "umoci", &["new", "--image", "lay:one"]);
    let script = format!(
        "for l in $(seq {LAYERS}); do mkdir -p t/usr/d$l; cd t/usr/d$l; \
         for f in $(seq {FILES}); do head -c $((f % 7 * 1000 + 500)) /dev/urandom >f$f; done; cd ../../..; \
         tar -C t -cf l$l.tar .; rm -r t; umoci raw add-layer --image lay:one l$l.tar; done; \
         mkdir -p t/etc; echo x >t/etc/new; tar -C t -cf more.tar .; \
         umoci tag --image lay:one two; umoci raw add-layer --image lay:two more.tar; \
         umoci new --image lay:box; mkdir -p b/bin b/etc; cp /bin/busybox b/bin; \
         tar -C b -cf box.tar .; umoci raw add-layer --image lay:box box.tar"
    );
    run(dir, "sh", &["-ec", &script]);
}

fn forget(dir: &Path, what: &str) {
    let _ = fs::remove_dir_all(dir.join(what));
    // Nothing of what is removed is left to be written meanwhile.
    run(dir, "sync", &[]);
}

fn imports(dir: &Path) {
    let pull = |side: Side, tag: &str| {
        let from = format!("oci:lay:{tag}");
        seconds(|| match side {
            Side::Ours => vdisk(dir, &["import", &from, tag, "--store", "ours"]),
            Side::Peer => drop(podman(dir, &["pull", "-q", &from])),
        })
    };
    row("import, 5 layers, 20,000 files", "podman pull", |side| {
        forget(dir, if side == Side::Ours { "ours" } else { "theirs" });
        pull(side, "one")
    });
    podman_pull(dir, "one");
    row("a second image on the same base", "podman pull", |side| {
        match side {
            Side::Ours => {
                let _ = fs::remove_file(dir.join("ours/images/two%3alatest.json"));
                vdisk(dir, &["image", "prune", "--yes", "--store", "ours"]);
            }
            Side::Peer => drop(podman(dir, &["rmi", "--ignore", "-f", "localhost/lay:latest"])),
        }
        pull(side, "two")
    });
}

/// Containers from an image, as long as they need to run nothing.
fn starts(dir: &Path) {
    vdisk(dir, &["import", "oci:lay:box", "box", "--store", "ours"]);
    podman_pull(dir, "box");
    let shut = ["run", "--rm", "--network", "none", "--cgroups", "disabled"];
    let what = ["kept:box", "/bin/busybox", "true"];
    let theirs = [&["-m", "sh", "-c", ONE_VERSION, "sh"][..], &PODMAN, &shut, &what].concat();
    row("start of a container from an image", "podman run", |side| {
        seconds(|| match side {
            Side::Ours => {
                vdisk(dir, &["run", "--store", "ours", "box", "--", "/bin/busybox", "true"]);
            }
            Side::Peer => run(dir, "unshare", &theirs),
        })
    });
    limited("100 instances of an image", 2.0, || {
        let name = format!("bench-{}-{{:03}}", std::process::id());
        let first = ["run", "--count", "100", "--detach", "--name", &name, "--store", "ours"];
        let words = [&first[..], &["box", "--", "/bin/busybox", "sleep", "1000"]].concat();
        let took = seconds(|| vdisk(dir, &words));
        let all: Vec<String> =
            (0..100).map(|number| name.replace("{:03}", &format!("{number:03}"))).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        vdisk(dir, &[&["stop", "--time", "0"], &all[..]].concat());
        vdisk(dir, &[&["rm", "--yes"], &all[..]].concat());
        took
    });
}

/// Prints the median and the worst of what is to take `limit` seconds at most.
fn limited(what: &str, limit: f64, mut job: impl FnMut() -> f64) {
    let mut all: Vec<f64> = (0..TIMES).map(|_| job()).collect();
    all.sort_by(f64::total_cmp);
    let (median, worst) = (all[TIMES / 2], all[TIMES - 1]);
    println!("{what:<46} {median:>8.3} s  worst {worst:.3} s, at most {limit} s");
}

fn clones(dir: &Path) {
    limited("1,000 clones of an image", 1.0, || {
        let made = dir.join("clones");
        let _ = fs::remove_dir_all(&made);
        fs::create_dir(&made).unwrap();
        let words =
            ["clone", "one", "--count", "1000", "--name", "clones/{:04}.qcow2", "--store", "ours"];
        seconds(|| vdisk(dir, &words))
    });
}

fn export(dir: &Path) {
    vdisk(dir, &["import", "oci:lay:one", "large", "--size", "20G", "--store", "ours"]);
    vdisk(dir, &["clone", "large", "d.qcow2", "--store", "ours"]);
    fs::create_dir(dir.join("m")).unwrap();
    vdisk(dir, &["mount", "d.qcow2", "m"]);
    let script = "for f in $(seq 100); do echo changed >m/usr/d3/f$f; done";
    run(dir, "sh", &["-ec", script]);
    vdisk(dir, &["umount", "m"]);
    limited("export, 100 changed files in 20 GiB", 1.0, || {
        let _ = fs::remove_dir_all(dir.join("out"));
        seconds(|| vdisk(dir, &["export", "d.qcow2", "oci:out:x", "--store", "ours"]))
    });
}

/// Prints the table.
pub fn table() {
    let (dir, _) = place();
    let dir = dir.path();
    fs::write(dir.join("containers.conf"), CONFIGURATION).unwrap();
    layout(dir);
    imports(dir);
    starts(dir);
    clones(dir);
    export(dir);
    podman(dir, &["system", "reset", "-f"]);
}
