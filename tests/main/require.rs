//! What a test needs of the machine, and what happens where it is missing.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::process::{Command, Stdio};

/// Something that not every machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A `/dev/kvm` that this user may open.
    Kvm,
    /// A `/dev/fuse` that this user may open, and the right to mount.
    Fuse,
    /// QEMU's tools: `qemu-img` and `qemu-io`.
    Qemu,
    /// QEMU itself: `qemu-system-x86_64`.
    QemuSystem,
    /// libnbd's tools: `nbdcopy` and `nbdinfo`.
    Nbd,
    /// nbdkit(1): a server with habits of its own.
    Nbdkit,
    /// `openssl`: certificates.
    Tls,
    /// The superuser, `umoci` and `skopeo`: other programs for images.
    Oci,
    /// The same, and `docker-registry` with what makes certificates and passwords for it.
    Registry,
    /// The superuser, and `mkfs.xfs`: a file system whose files can share their space.
    Xfs,
    /// `mkfs.vfat` and `mcopy`: FAT file systems that others made.
    Fat,
    /// The superuser, mmdebstrap(1) and, which shows only then, Debian's packages from the network.
    Debian,
    /// newuidmap(1) and newgidmap(1).
    Uidmap,
    /// passt(1).
    Passt,
    /// pasta(1), and the device that it needs.
    Pasta,
    /// slirp4netns(1), and the device that it needs.
    Slirp,
    /// The superuser, podman(1) and crun(1).
    Podman,
    /// pjdfstest, from crates.io.
    Pjdfstest,
    /// Landlock in the kernel.
    Landlock,
    /// The superuser: loop devices, and file systems of the kernel's own.
    Root,
}

impl Need {
    /// The word in `VDISK_REQUIRE`.
    fn word(self) -> &'static str {
        match self {
            Need::Kvm => "kvm",
            Need::Fuse => "fuse",
            Need::Qemu => "qemu",
            Need::QemuSystem => "qemu-system",
            Need::Nbd => "nbd",
            Need::Nbdkit => "nbdkit",
            Need::Tls => "tls",
            Need::Oci => "oci",
            Need::Registry => "registry",
            Need::Xfs => "xfs",
            Need::Fat => "fat",
            Need::Debian => "debian",
            Need::Uidmap => "uidmap",
            Need::Pasta => "pasta",
            Need::Passt => "passt",
            Need::Slirp => "slirp",
            Need::Podman => "podman",
            Need::Pjdfstest => "pjdfstest",
            Need::Landlock => "landlock",
            Need::Root => "root",
        }
    }

    /// What is missing here, if anything is.
    fn missing(self) -> Option<String> {
        match self {
            Need::Kvm => unopenable("/dev/kvm"),
            Need::Fuse => unopenable("/dev/fuse")
                .or_else(|| if is_root() { None } else { unrunnable("fusermount3") }),
            Need::Qemu => unrunnable("qemu-img").or_else(|| unrunnable("qemu-io")),
            Need::QemuSystem => unrunnable("qemu-system-x86_64"),
            Need::Nbd => unrunnable("nbdcopy").or_else(|| unrunnable("nbdinfo")),
            Need::Nbdkit => unrunnable("nbdkit"),
            Need::Tls => unfound("openssl"),
            Need::Oci => Need::Root
                .missing()
                .or_else(|| unrunnable("umoci"))
                .or_else(|| unrunnable("skopeo")),
            Need::Registry => Need::Oci
                .missing()
                .or_else(|| unrunnable("docker-registry"))
                .or_else(|| unfound("htpasswd"))
                .or_else(|| unfound("openssl")),
            Need::Xfs => Need::Root.missing().or_else(|| match run(&["mkfs.xfs", "-V"]) {
                true => None,
                false => Some("mkfs.xfs does not run".to_owned()),
            }),
            Need::Fat => unfound("mkfs.vfat").or_else(|| unfound("mcopy")),
            Need::Debian => Need::Root.missing().or_else(|| unfound("mmdebstrap")),
            Need::Uidmap => unfound("newuidmap").or_else(|| unfound("newgidmap")),
            Need::Passt => unfound("passt"),
            Need::Pasta => unfound("pasta").or_else(|| unopenable("/dev/net/tun")),
            Need::Slirp => unfound("slirp4netns").or_else(|| unopenable("/dev/net/tun")),
            Need::Podman => {
                Need::Root.missing().or_else(|| unfound("podman")).or_else(|| unfound("crun"))
            }
            Need::Pjdfstest => unrunnable("pjdfstest"),
            Need::Landlock => landlock(),
            Need::Root => (!is_root()).then(|| "not the superuser".to_owned()),
        }
    }
}

/// Whether this machine has `what`. Where it has not, the test is to return at once: a line on
/// stderr says so, and where `VDISK_REQUIRE` (a comma list of words) names it, the test fails.
pub fn have(what: Need) -> bool {
    what.missing().is_none_or(|missing| lacks(what, &missing))
}

/// The same where it has shown only now that the machine has it not: false.
pub fn lacks(what: Need, missing: &str) -> bool {
    let required = std::env::var("VDISK_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|word| word.trim() == what.word()),
        "VDISK_REQUIRE names {}, but this machine lacks it: {missing}",
        what.word(),
    );
    skipped(&format!("needs {}: {missing}", what.word()));
    false
}

/// Says that a test does not go on here, and why.
pub fn skipped(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // Not eprintln: the test runner swallows what that prints in a test that passes.
    let _ = writeln!(io::stderr(), "SKIPPED: {test}: {why}");
}

fn unopenable(device: &str) -> Option<String> {
    let opened = OpenOptions::new().read(true).write(true).open(device);
    opened.err().map(|error| format!("{device}: {error}"))
}

fn run(words: &[&str]) -> bool {
    let run = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    run.is_ok_and(|output| output.status.success())
}

fn unrunnable(tool: &str) -> Option<String> {
    let run = Command::new(tool).arg("--version").stdin(Stdio::null()).output();
    match run {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("{tool} --version ended with {}", output.status)),
        Err(error) => Some(format!("{tool}: {error}")),
    }
}

/// The kernel says which security modules it was started with, where somebody has mounted that; its list of
/// names says at least which were built.
fn landlock() -> Option<String> {
    let has = match std::fs::read_to_string("/sys/kernel/security/lsm") {
        Ok(modules) => modules.split(',').any(|module| module.trim() == "landlock"),
        Err(_) => std::fs::read_to_string("/proc/kallsyms")
            .is_ok_and(|names| names.contains(" __x64_sys_landlock_create_ruleset\n")),
    };
    (!has).then(|| "the kernel has no Landlock, or does not say so".to_owned())
}

/// For programs that have no harmless option.
fn unfound(tool: &str) -> Option<String> {
    let places = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&places).any(|dir| dir.join(tool).is_file());
    (!found).then(|| format!("{tool} is not installed"))
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
