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
    /// The superuser, and `mkfs.xfs`: a file system whose files can share their space.
    Xfs,
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
            Need::Xfs => "xfs",
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
            Need::Xfs => Need::Root.missing().or_else(|| match run(&["mkfs.xfs", "-V"]) {
                true => None,
                false => Some("mkfs.xfs does not run".to_owned()),
            }),
            Need::Root => (!is_root()).then(|| "not the superuser".to_owned()),
        }
    }
}

/// Whether this machine has `what`. Where it has not, the test is to return at once: a line on
/// stderr says so, and where `VDISK_REQUIRE` (a comma list of words) names it, the test fails.
pub fn have(what: Need) -> bool {
    let Some(missing) = what.missing() else { return true };
    let required = std::env::var("VDISK_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|word| word.trim() == what.word()),
        "VDISK_REQUIRE names {}, but this machine lacks it: {missing}",
        what.word(),
    );
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // Not eprintln: the test runner swallows what that prints in a test that passes.
    let _ = writeln!(io::stderr(), "SKIPPED: {test}: needs {}: {missing}", what.word());
    false
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

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
